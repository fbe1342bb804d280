"""generation_config.json gives OpenAI's routes the values that a request leaves out, and no other route."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from engine.link.errors import StartError
from engine.link.messages import SamplingParams
from server.app import create_app
from server.requests.sampling_defaults import read_sampling_defaults
from server.requests.serde import round_to_f32
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import FakeEngine, client_of, make_config, one_by_one

QWEN = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "do_sample": True}
F32_QWEN = {
    name: value if name == "top_k" else round_to_f32(value) for name, value in QWEN.items() if name != "do_sample"
}
USER = {"messages": [{"role": "user", "content": "Hello"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": USER,
    "/v1/completions": {"prompt": "Hello", "model": "m"},
    "/v1/messages": {**USER, "max_tokens": 5},
    "/v1/responses": {"input": "Hello"},
    "/generate": {"inputs": "Hello", "parameters": {}},
}
OPENAI = [path for path in BODIES if path.startswith("/v1")]
SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


async def sampled(
    folder: Path, model_folder: Path, path: str, generation: Any = QWEN, *, flags: Any = None, **body: Any
) -> dict[str, Any]:
    """The parameters that a request to `path` asks the engine for, as far as they are not off, and whether it draws."""
    (folder / "generation_config.json").write_text(json.dumps(generation))
    engine = FakeEngine()
    engine.script.events = one_by_one([5])
    config = dataclasses.replace(make_config(**(flags or {})), model_path=str(folder))
    tokenizer = TextTokenizer.from_folder(str(model_folder), 1)
    async with client_of(create_app(engine, config, tokenizer)) as client:
        response = await client.post(path, json={**BODIES[path], **body})
        assert response.status_code == 200, response.text
    sampling = engine.requests[0].sampling
    values = {name: getattr(sampling, name) for name in SETTINGS}
    shown = {name: value for name, value in values.items() if value != getattr(SamplingParams(), name)}
    return {**shown, "is_drawn": sampling.seed is not None}


@pytest.mark.parametrize("path", OPENAI)
async def test_what_a_request_leaves_out_is_the_files(tmp_path: Path, model_folder: Path, path: str) -> None:
    assert await sampled(tmp_path, model_folder, path) == {**F32_QWEN, "is_drawn": True}


@pytest.mark.parametrize("path", OPENAI)
async def test_null_leaves_it_out_as_well(tmp_path: Path, model_folder: Path, path: str) -> None:
    nothing = dict.fromkeys(("temperature", "top_p"))
    assert await sampled(tmp_path, model_folder, path, **nothing) == {**F32_QWEN, "is_drawn": True}


@pytest.mark.parametrize("parameters", [{}, {"temperature": None, "top_p": None}, {"do_sample": True}])
async def test_native_routes_have_none(tmp_path: Path, model_folder: Path, parameters: dict[str, Any]) -> None:
    drawn = {"is_drawn": "do_sample" in parameters}
    assert await sampled(tmp_path, model_folder, "/generate", parameters=parameters) == drawn


@pytest.mark.parametrize("path", OPENAI[:2])
@pytest.mark.parametrize(
    "flags", [{"is_strict_tgi": True}, {"generation_config": "none"}, {"generation_config": "vllm"}]
)
async def test_a_flag_turns_them_off(tmp_path: Path, model_folder: Path, path: str, flags: dict[str, Any]) -> None:
    assert await sampled(tmp_path, model_folder, path, flags=flags) == {"is_drawn": True}


@pytest.mark.parametrize("path", OPENAI[:2])
@pytest.mark.parametrize(
    ("body", "changes"),
    [
        ({"top_p": 1}, {"top_p": ...}),
        ({"top_p": 0.5, "temperature": 1.5}, {"top_p": 0.5, "temperature": 1.5}),
        ({"temperature": 1}, {"temperature": ...}),
        ({"top_k": -1}, {"top_k": ...}),
        ({"top_k": 0}, {"top_k": ...}),
        ({"top_k": 5}, {"top_k": 5}),
        ({"repetition_penalty": 1}, {"repetition_penalty": ...}),
        ({"min_p": 0.25}, {"min_p": 0.25}),
        ({"temperature": 0}, {"temperature": ..., "top_p": ..., "top_k": ..., "is_drawn": False}),
        ({"top_p": 0}, {"temperature": ..., "top_p": ..., "top_k": ..., "is_drawn": False}),
    ],
)
async def test_the_request_decides_where_it_says_something(
    tmp_path: Path, model_folder: Path, path: str, body: dict[str, Any], changes: dict[str, Any]
) -> None:
    expected = {**F32_QWEN, "is_drawn": True, **changes}
    expected = {name: value for name, value in expected.items() if value is not ...}
    assert await sampled(tmp_path, model_folder, path, **body) == expected


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {"is_drawn": True}),
        ({"do_sample": False}, {"is_drawn": True}),
        ({"do_sample": False, "temperature": 0.5}, {"temperature": 0.5, "is_drawn": True}),
        ({"temperature": 0, "top_p": 0.5}, {"is_drawn": False}),
        ({"temperature": None, "top_p": 1.0, "top_k": 0}, {"is_drawn": True}),
        ({"min_p": 0.125, "typical_p": 0.5, "max_new_tokens": 3}, {"min_p": 0.125, "is_drawn": True}),
    ],
)
async def test_files_that_say_less(
    tmp_path: Path, model_folder: Path, generation: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert await sampled(tmp_path, model_folder, "/v1/chat/completions", generation) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": "0.7"},
        {"temperature": float("inf")},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"top_k": 2.5},
        {"top_k": -2},
        {"repetition_penalty": 0},
        {"min_p": [0.5]},
        {"top_k": True},
    ],
)
def test_a_value_that_no_request_could_have_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wrong: dict[str, Any]
) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.5, "top_k": 20, **wrong}))
    config = dataclasses.replace(make_config(), model_path=str(tmp_path))
    with caplog.at_level("INFO"):
        defaults = read_sampling_defaults(config)
    ((name, value),) = wrong.items()
    assert name not in defaults and defaults
    assert f"{name} of {path} has no effect: no request could have {value!r}" in caplog.text


def test_the_log_says_what_applies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(QWEN))
    config = dataclasses.replace(make_config(), model_path=str(tmp_path))
    with caplog.at_level("INFO"):
        read_sampling_defaults(config)
    shown = "temperature 0.7, top_p 0.8, top_k 20, repetition_penalty 1.05"
    assert f"Defaults of OpenAI's routes, from generation_config.json: {shown} (--generation" in caplog.text


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_file_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_bytes(content.encode("latin-1"))
    config = dataclasses.replace(make_config(), model_path=str(tmp_path))
    with pytest.raises(StartError, match="generation_config.json .*: fetch the model again"):
        read_sampling_defaults(config)
