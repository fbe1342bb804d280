"""The rows of the parameters: whatever dialect a client writes, the same row checks, describes and logs its values."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated, Any

import httpx
import pytest

from engine.link.messages import SamplingParams
from server.requests.dialects import rows_in
from server.requests.native import GenerateParameters
from server.requests.openai import ChatRequest, CompletionRequest
from server.requests.rows import Dialect
from server.requests.sampling import ROWS
from server.requests.serde import WireModel
from tests.unit.server.harness import FakeEngine

MODELS: dict[Dialect, type[WireModel]] = {
    Dialect.NATIVE: GenerateParameters,
    Dialect.CHAT: ChatRequest,
    Dialect.COMPLETIONS: CompletionRequest,
}
SHAPED = {"stop", "response_format", "logit_bias", "seed"}
"""Fields that OpenAI's bodies read in a way of their own."""


@pytest.mark.parametrize("dialect", Dialect)
def test_the_wire_models_have_what_the_rows_say(dialect: Dialect) -> None:
    model = MODELS[dialect]
    assert model.__name__ == dialect.value
    for _, (key, *_), row in rows_in(dialect):
        field = model.model_fields[key]
        is_tgi = row.spellings[dialect].is_tgi
        assert (key in model.extensions) != is_tgi, key
        if key not in SHAPED or dialect is Dialect.NATIVE:
            expected = row.type_in(dialect)
            annotation = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
            assert annotation == expected, key
            assert field.default == row.default, key


def test_the_native_body_has_exactly_the_rows() -> None:
    assert list(GenerateParameters.model_fields) == [name for name, _, _ in rows_in(Dialect.NATIVE)]


def test_every_row_that_concerns_the_sampler_fills_a_field_that_it_has() -> None:
    fields = {row.engine_field_for(is_openai=is_openai) for row in ROWS.values() for is_openai in (False, True)}
    assert fields - {None} == set(SamplingParams.__struct_fields__) - {"is_logprob_filtered"}


LOGGED = "{'temperature': 0.699999988079071, 'frequency_penalty': 0.5, 'top_k': 7, 'do_sample': True, "
LOGGED_END = "'details': True, 'seed': 1, 'logit_bias': {5: 1.0}, 'ignore_eos': True}"
SAID: dict[str, Any] = {
    "temperature": 0.7,
    "frequency_penalty": 0.5,
    "top_k": 7,
    "seed": 1,
    "stop": ["secret"],
    "logit_bias": {"5": 1},
    "ignore_eos": True,
}


@pytest.mark.parametrize(
    ("path", "body", "logged"),
    [
        (
            "/generate",
            {"inputs": "x", "parameters": SAID | {"do_sample": True, "details": True, "max_new_tokens": 9}},
            f"{LOGGED}'max_new_tokens': 9, {LOGGED_END}",
        ),
        ("/", {"inputs": "x", "parameters": {"min_p": 0.5}}, "{'return_full_text': True, 'min_p': 0.5}"),
        ("/generate", {"inputs": "x"}, "{'do_sample': True}"),
        ("/generate", {"inputs": "x", "parameters": {}}, "{}"),
        (
            "/v1/chat/completions",
            SAID | {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9, "response_format": None},
            f"{LOGGED}'max_new_tokens': 9, {LOGGED_END}",
        ),
        ("/v1/completions", SAID | {"prompt": "x", "max_tokens": 9}, f"{LOGGED}'max_new_tokens': 9, {LOGGED_END}"),
        (
            "/v1/completions",
            {"prompt": "x", "temperature": 0, "top_p": 1, "top_k": -1, "logprobs": 2, "echo": True},
            "{'details': True, 'decoder_input_details': True, 'top_n_tokens': 2}",
        ),
        ("/vertex", {"instances": [{"inputs": "x"}]}, "{'do_sample': True}"),
    ],
)
async def test_the_log_tells_parameters_alike_in_every_dialect(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    caplog: pytest.LogCaptureFixture,
    path: str,
    body: dict[str, Any],
    logged: str,
) -> None:
    with caplog.at_level("INFO", "server"):
        response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    (record,) = (record for record in caplog.records if record.message == "Success")
    assert vars(record)["span"]["parameters"] == logged


STRANGER = """
import asyncio, dataclasses, pathlib, tempfile
import msgspec
from engine.link import messages

sampling_params = [("cooling", float, 1.0)]
messages.SamplingParams = msgspec.defstruct(
    "SamplingParams", sampling_params, bases=(messages.SamplingParams,), frozen=True, kw_only=True
)
from server.requests import sampling
from server.requests.rows import IN_ALL_OF_OURS, Bounds, Refusal, Row, parameter, rows_of
from server.requests.serde import F32

@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Parameters(sampling.Parameters):
    cooling: float | None = parameter(
        Row(
            F32,
            IN_ALL_OF_OURS,
            bounds=Bounds(above=0, max=2),
            refusal=Refusal(6, "`cooling` must be > 0.0 and <= 2.0"),
            engine_field="cooling",
            is_for_drawing=True,
        )
    )

sampling.Parameters, sampling.ROWS = Parameters, rows_of(Parameters)

from server.app import create_app
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import FakeEngine, client_of, make_config, one_by_one, write_model_folder

BODIES = {
    "/generate": lambda **said: {"inputs": "x", "parameters": {"do_sample": True} | said},
    "/v1/chat/completions": lambda **said: {"messages": [{"role": "user", "content": "x"}]} | said,
    "/v1/completions": lambda **said: {"prompt": "x"} | said,
}

async def main():
    with tempfile.TemporaryDirectory() as folder:
        write_model_folder(pathlib.Path(folder))
        engine = FakeEngine()
        engine.script.events = one_by_one([5])
        app = create_app(engine, make_config(), TextTokenizer.from_folder(folder, 1))
        async with client_of(app) as client:
            for path, body in BODIES.items():
                assert (await client.post(path, json=body(cooling=0.5))).status_code == 200
                assert engine.requests.pop().sampling.cooling == 0.5
                refused = await client.post(path, json=body(cooling=3))
                status = 400 if path.startswith("/v1/") else 422
                assert refused.status_code == status and "`cooling` must be > 0.0 and <= 2.0" in refused.text
            schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
            for name in ("GenerateParameters", "ChatRequest", "CompletionRequest"):
                number, null = schemas[name]["properties"]["cooling"]["anyOf"]
                assert number == {"type": "number", "exclusiveMinimum": 0, "maximum": 2}

asyncio.run(main())
"""


def test_a_new_row_and_its_field_of_the_message_are_all_that_the_server_needs() -> None:
    """In a process of its own, as the wire models are made of the rows when they are imported."""
    subprocess.run([sys.executable, "-c", STRANGER], check=True, timeout=60)
