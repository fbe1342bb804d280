"""Requests with every sampling parameter get the same tokens and numbers alone, in company and after preemption."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from engine.link.messages import GenerationRequest, SamplingParams
from tests.contract.harness import Outcome, make_core, make_runner, oracle_logits, run_requests

MAX_NEW_TOKENS = 24
EVERYTHING: dict[str, Any] = {
    "seed": 2**63 + 5,
    "is_watermarked": True,
    "repetition_penalty": 1.1,
    "relative_frequency_penalty": 0.5,
    "frequency_penalty": 0.2,
    "presence_penalty": 0.3,
    "logit_bias": {5: 1.5, 100: -3.0},
    "temperature": 1.3,
    "top_k": 60,
    "top_p": 0.98,
    "min_p": 0.2,
    "typical_p": 0.97,
    "num_top_tokens": 3,
}


def make_request(number: int, **changes: Any) -> GenerationRequest:
    chance = random.Random(number)
    return GenerationRequest(
        request_id=f"r{number}",
        prompt_token_ids=[chance.randrange(250) for _ in range(9 + 3 * number)],
        max_new_tokens=MAX_NEW_TOKENS,
        is_ignoring_eos=True,
        sampling=SamplingParams(**{**EVERYTHING, **changes}),
    )


def make_requests() -> list[GenerationRequest]:
    """Sixteen: the one with everything, the same after filters, and others that lack or change something."""
    lacking = [{name: getattr(SamplingParams(), name)} for name in EVERYTHING]
    return [
        make_request(0),
        make_request(1, is_logprob_filtered=True),
        *(make_request(number, **changes) for number, changes in enumerate(lacking, start=2)),
        make_request(15, seed=None, num_top_tokens=0),
    ]


def assert_same(outcome: Outcome, expected: Outcome) -> None:
    assert outcome.token_ids == expected.token_ids
    assert outcome.logprobs == expected.logprobs
    assert outcome.top_tokens == expected.top_tokens


@pytest.fixture(scope="module")
def alone(tiny_model_dir: Path) -> Outcome:
    """What each request gets in an engine of its own."""
    runner = make_runner(tiny_model_dir)
    outcomes = [run_requests(make_core(tiny_model_dir, runner=runner), [request]) for request in make_requests()]
    together = Outcome([], [], [])
    for outcome in outcomes:
        together.token_ids += outcome.token_ids
        together.logprobs += outcome.logprobs
        together.top_tokens += outcome.top_tokens
    return together


CONDITIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "in a batch of 16": ({"num_blocks": 100}, {}),
    "one joins after the other": ({"num_blocks": 100}, {"is_staggered": True}),
    "in chunks, preempted": ({"num_blocks": 24, "max_batch_tokens": 40}, {}),
}


@pytest.mark.parametrize(("options", "history"), CONDITIONS.values(), ids=CONDITIONS)
def test_company_and_preemption_change_nothing(
    options: dict[str, Any], history: dict[str, Any], alone: Outcome, tiny_model_dir: Path
) -> None:
    requests = make_requests()
    assert len(requests) == 16
    outcome = run_requests(make_core(tiny_model_dir, **options), requests, **history)
    assert_same(outcome, alone)
    assert all(len(token_ids) == MAX_NEW_TOKENS for token_ids in outcome.token_ids)
    if options["num_blocks"] == 24:
        assert outcome.num_preemptions > 0
    else:
        assert outcome.most_running == 16 or history


def test_logprobs_are_those_of_transformers(tiny_model_dir: Path) -> None:
    """Logprobs of tokens and top tokens are the model's own, whatever changes the distribution that is drawn from."""
    request = make_request(0)
    outcome = run_requests(make_core(tiny_model_dir), [request])
    (token_ids,), (logprobs,), (top_tokens,) = outcome.token_ids, outcome.logprobs, outcome.top_tokens
    rows = oracle_logits(tiny_model_dir, request.prompt_token_ids + token_ids)
    expected = rows[len(request.prompt_token_ids) - 1 : -1].log_softmax(dim=1)
    assert logprobs == pytest.approx(
        [float(row[token]) for row, token in zip(expected, token_ids, strict=True)], abs=1e-4
    )
    for row, (_, top_logprobs) in zip(expected, top_tokens, strict=True):
        assert top_logprobs == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("name", [name for name in EVERYTHING if name not in ("seed", "num_top_tokens")])
def test_every_parameter_has_an_effect(name: str, tiny_model_dir: Path) -> None:
    """Logprobs after filters tell it where the text is too short for another token."""
    requests = [
        make_request(0, is_logprob_filtered=True),
        make_request(0, is_logprob_filtered=True, **{name: getattr(SamplingParams(), name)}),
    ]
    first, second = (run_requests(make_core(tiny_model_dir), [request]) for request in requests)
    assert first.logprobs != second.logprobs
