"""Documents that follow random schemas, whatever else runs, and plain requests that do not notice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from tokenizers import Tokenizer

from engine.core import EngineCore
from engine.link.config import GRAMMAR_LIMITS
from engine.link.messages import AbortRequest, FinishReason, GenerationRequest, SamplingParams
from server.requests.grammar import GrammarCompiler
from server.requests.values import GrammarSpec
from tests.contract.harness import Outcome, make_core, make_requests, make_runner, run_requests
from tests.contract.test_drafts import eager
from tests.random_schemas import random_schema
from tests.tiny_model import EOS_TOKEN_IDS, write_tiny_qwen2

NUM_SCHEMAS = 8
MAX_NEW_TOKENS = 1000
NUM_BLOCKS = 600
SAMPLING = {"greedy": SamplingParams(), "seeds": SamplingParams(seed=5, temperature=1.0)}
SCHEMAS = [random_schema(random.Random(seed)) for seed in range(NUM_SCHEMAS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a long window: a token is a byte there, so documents are long."""
    folder = tmp_path_factory.mktemp("long-qwen2")
    write_tiny_qwen2(folder, max_position_embeddings=2048)
    return folder


def compiled(kind: str, value: Any) -> str:
    with contextlib.closing(GrammarCompiler()) as compiler:
        return asyncio.run(compiler.compile(GrammarSpec(kind, value), is_strict=False)).grammar  # type: ignore[arg-type]


def requests_with(sampling: SamplingParams) -> list[GenerationRequest]:
    """A request for each schema."""
    prompts = [[number * 7 + 1, 2, 3] for number in range(NUM_SCHEMAS)]
    requests = make_requests(prompts, max_new_tokens=MAX_NEW_TOKENS, sampling=sampling)
    return [held(request, "json", schema) for request, schema in zip(requests, SCHEMAS, strict=True)]


def held(request: GenerationRequest, kind: str, value: Any) -> GenerationRequest:
    return msgspec.structs.replace(request, grammar=compiled(kind, value))


def plain_requests(sampling: SamplingParams) -> list[GenerationRequest]:
    prompts = [[number * 11 + 2, 5, 9, 40] for number in range(NUM_SCHEMAS)]
    requests = make_requests(prompts, max_new_tokens=60, sampling=sampling)
    return [msgspec.structs.replace(request, request_id=f"plain {request.request_id}") for request in requests]


def run(core: EngineCore, requests: list[GenerationRequest]) -> Outcome:
    outcome = run_requests(core, requests)
    assert core.scheduler.stats().num_used_blocks == 0
    return outcome


def texts(folder: Path, outcome: Outcome) -> list[str]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for token_ids, event in zip(outcome.token_ids, outcome.last_events, strict=True):
        assert event.finish_reason is FinishReason.EOS_TOKEN and event.error is None
        assert token_ids[-1] in EOS_TOKEN_IDS
    return [tokenizer.decode(token_ids[:-1], skip_special_tokens=False) for token_ids in outcome.token_ids]


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
def test_documents_follow_their_schemas_in_any_company(folder: Path, sampling: SamplingParams) -> None:
    bound, plain = requests_with(sampling), plain_requests(sampling)
    options: dict[str, Any] = {"num_blocks": NUM_BLOCKS, "runner": make_runner(folder, num_blocks=NUM_BLOCKS)}
    alone = [run(make_core(folder, **options), [request]) for request in bound]
    together = run(make_core(folder, **options), [*bound, *plain])
    documents = [json.loads(text) for outcome in alone for text in texts(folder, outcome)]
    for document, schema in zip(documents, SCHEMAS, strict=True):
        jsonschema.validate(document, schema, jsonschema.Draft202012Validator)
    assert together.token_ids[:NUM_SCHEMAS] == [outcome.token_ids[0] for outcome in alone]
    assert together.token_ids[NUM_SCHEMAS:] == run(make_core(folder, **options), plain).token_ids


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
def test_drafts_and_preemption_change_no_token(folder: Path, sampling: SamplingParams) -> None:
    requests = [*requests_with(sampling)[:4], *plain_requests(sampling)[:4]]
    expected = run(make_core(folder, num_blocks=NUM_BLOCKS), requests)
    speculator = eager(8)
    outcome = run(make_core(folder, num_blocks=13, speculator=speculator), requests)
    assert (outcome.token_ids, outcome.logprobs) == (expected.token_ids, expected.logprobs)
    assert outcome.num_preemptions > 0
    assert 0 < speculator.num_accepted < speculator.num_drafted


def test_a_regex_holds_the_whole_output_and_its_end_ends_the_sequence(folder: Path) -> None:
    pattern = r"(ä|bc){2,5}-\d{3}/x?"
    for sampling in SAMPLING.values():
        (request,) = make_requests([[1, 2, 3]], max_new_tokens=100, sampling=sampling)
        request = msgspec.structs.replace(held(request, "regex", pattern), is_ignoring_eos=True)
        (text,) = texts(folder, run(make_core(folder), [request]))
        assert re.fullmatch(pattern, text)


def test_a_forced_text_is_drafted(folder: Path) -> None:
    """A step computes the first token and its draft of eight, the next step the ninth and its draft, and so on."""
    text = "The only answer is this."
    (request,) = make_requests([[1, 2, 3]], max_new_tokens=100)
    speculator = eager(8)
    outcome = run(make_core(folder, speculator=speculator), [held(request, "json", {"const": text})])
    assert texts(folder, outcome) == [json.dumps(text)]
    assert speculator.num_accepted == speculator.num_drafted > len(text) * 0.8


def test_the_length_ends_a_document_too(folder: Path) -> None:
    (request,) = make_requests([[1, 2, 3]], max_new_tokens=5)
    outcome = run(make_core(folder), [held(request, "json", {"const": "longer"})])
    assert outcome.last_events[0].finish_reason is FinishReason.LENGTH and len(outcome.token_ids[0]) == 5


def test_what_fails_is_an_error_of_its_request_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grammar that compiles and then needs more states than it may have."""
    monkeypatch.setitem(GRAMMAR_LIMITS, "max_lexer_states", 100)
    good, bad, plain = make_requests([[1, 2, 3]] * 3, max_new_tokens=120)
    good, bad = held(good, "regex", "[ab]{30}"), held(bad, "regex", "[ab]*a[ab]{60}c")
    outcome = run(make_core(folder), [good, bad, plain])
    assert [event.error is None for event in outcome.last_events] == [True, False, True]
    assert "cannot be held to the grammar" in (outcome.last_events[1].error or "")
    assert len(outcome.token_ids[0]) == 31
    assert outcome.token_ids[2] == run(make_core(folder), [plain]).token_ids[0]


def test_an_abort_within_a_document_leaves_nothing(folder: Path) -> None:
    core = make_core(folder)
    request = requests_with(SAMPLING["greedy"])[0]
    run_requests(core, [msgspec.structs.replace(request, max_new_tokens=3)])
    core.take(AbortRequest(request.request_id))
    assert core.scheduler.stats().num_used_blocks == 0 and not core.scheduler.has_work


def test_logprobs_are_the_models_own_or_those_after_the_masks(folder: Path) -> None:
    """The only token that is allowed has probability 1 after the masks."""
    penalized = SamplingParams(seed=3, repetition_penalty=1.3, logit_bias={65: 5.0})
    filtered = msgspec.structs.replace(penalized, is_logprob_filtered=True)
    prompts = [[1, 2, 3], [4, 5, 6]]
    requests = [
        held(make_requests([prompt], max_new_tokens=100, sampling=sampling)[0], "json", {"const": "ABC"})
        for prompt in prompts
        for sampling in (penalized, filtered)
    ]
    outcome = run(make_core(folder), [msgspec.structs.replace(r, request_id=str(i)) for i, r in enumerate(requests)])
    assert texts(folder, outcome) == ['"ABC"'] * 4
    for own, after in zip(outcome.logprobs[::2], outcome.logprobs[1::2], strict=True):
        assert max(own[:-1]) < -0.5 and after[:-1] == [0.0] * 5
