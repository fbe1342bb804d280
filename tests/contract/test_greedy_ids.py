"""Greedy ids of EngineCore equal transformers' `generate`, however the requests are batched, cut, evicted or cached."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.link.messages import FinishReason, SamplingParams
from engine.scheduling.scheduler import NON_FINITE_ERROR
from tests.contract.harness import Outcome, make_core, make_requests, oracle_greedy, run_requests
from tests.tiny_model import EOS_TOKEN_IDS, VOCAB_SIZE, write_tiny_qwen2

MAX_NEW_TOKENS = 24
SIZES = [1, 15, 16, 17, 33, 70]
SAMPLING = SamplingParams(seed=1234, temperature=1.2, top_k=100, top_p=0.95)


def make_prompts(num_shared_tokens: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    shared = torch.randint(0, 256, (num_shared_tokens,), generator=generator).tolist()
    return [shared + torch.randint(0, 256, (size,), generator=generator).tolist() for size in SIZES]


@pytest.fixture(scope="module")
def expected(family_dir: Path) -> list[list[int]]:
    """The ids that `transformers` writes. The prompts are chosen so that no near-tie decides."""
    outputs = []
    for prompt in make_prompts():
        token_ids, smallest_gap = oracle_greedy(family_dir, prompt, MAX_NEW_TOKENS)
        assert smallest_gap > 1e-3
        outputs.append(token_ids)
    return outputs


@pytest.fixture(scope="module")
def alone(family_dir: Path) -> Outcome:
    """The outcome of each request in an engine of its own."""
    merged = Outcome([], [], [])
    for request in make_requests(make_prompts(), max_new_tokens=MAX_NEW_TOKENS):
        outcome = run_requests(make_core(family_dir, is_prefix_caching=False), [request])
        merged.token_ids += outcome.token_ids
        merged.logprobs += outcome.logprobs
        merged.last_events += outcome.last_events
    return merged


def run_all(
    folder: Path,
    *,
    num_blocks: int = 64,
    max_batch_tokens: int = 512,
    is_prefix_caching: bool = True,
    is_staggered: bool = False,
) -> Outcome:
    core = make_core(
        folder, num_blocks=num_blocks, max_batch_tokens=max_batch_tokens, is_prefix_caching=is_prefix_caching
    )
    requests = make_requests(make_prompts(), max_new_tokens=MAX_NEW_TOKENS)
    outcome = run_requests(core, requests, is_staggered=is_staggered)
    assert core.scheduler.stats().num_used_blocks == 0
    return outcome


def test_alone(expected: list[list[int]], alone: Outcome) -> None:
    assert alone.token_ids == expected
    for token_ids, event in zip(alone.token_ids, alone.last_events, strict=True):
        is_full = len(token_ids) == MAX_NEW_TOKENS
        assert event.finish_reason is (FinishReason.LENGTH if is_full else FinishReason.EOS_TOKEN)


@pytest.mark.parametrize("is_prefix_caching", [True, False])
def test_together(family_dir: Path, alone: Outcome, is_prefix_caching: bool) -> None:
    outcome = run_all(family_dir, is_prefix_caching=is_prefix_caching)
    assert outcome.most_running == len(SIZES)
    assert (outcome.token_ids, outcome.logprobs) == (alone.token_ids, alone.logprobs)


@pytest.mark.parametrize("max_batch_tokens", [6, 17])
def test_with_a_tiny_budget(family_dir: Path, alone: Outcome, max_batch_tokens: int) -> None:
    outcome = run_all(family_dir, max_batch_tokens=max_batch_tokens)
    assert (outcome.token_ids, outcome.logprobs) == (alone.token_ids, alone.logprobs)


def test_arriving_one_after_the_other(family_dir: Path, alone: Outcome) -> None:
    outcome = run_all(family_dir, is_staggered=True)
    assert outcome.most_running > 1
    assert (outcome.token_ids, outcome.logprobs) == (alone.token_ids, alone.logprobs)


@pytest.mark.parametrize("is_prefix_caching", [True, False])
@pytest.mark.parametrize("num_blocks", [6, 9])
def test_with_preemption(family_dir: Path, alone: Outcome, num_blocks: int, is_prefix_caching: bool) -> None:
    outcome = run_all(family_dir, num_blocks=num_blocks, is_prefix_caching=is_prefix_caching)
    assert outcome.num_preemptions > 0
    assert (outcome.token_ids, outcome.logprobs) == (alone.token_ids, alone.logprobs)


def test_with_a_warm_prefix_cache(family_dir: Path, alone: Outcome) -> None:
    core = make_core(family_dir)
    requests = make_requests(make_prompts(), max_new_tokens=MAX_NEW_TOKENS)
    cold = run_requests(core, requests)
    warm = run_requests(core, requests)
    assert (cold.most_cached_tokens, warm.most_cached_tokens) == (0, 69)
    assert warm.token_ids == cold.token_ids == alone.token_ids
    assert warm.logprobs == alone.logprobs


def test_prompts_that_share_a_prefix(family_dir: Path) -> None:
    requests = make_requests(make_prompts(num_shared_tokens=40), max_new_tokens=8)
    core = make_core(family_dir)
    first = run_requests(core, requests[:1])
    rest = run_requests(core, requests[1:])
    assert rest.most_cached_tokens == 40
    for request, token_ids in zip(requests, first.token_ids + rest.token_ids, strict=True):
        expected, smallest_gap = oracle_greedy(family_dir, request.prompt_token_ids, 8)
        assert smallest_gap > 1e-3
        assert token_ids == expected


@pytest.mark.parametrize("num_common", [1, 15, 16, 31, 32, 33])
def test_a_prompt_that_forks_within_a_block(family_dir: Path, num_common: int) -> None:
    """Wherever a prompt leaves another one, all before that is reused, and no bit of the answer tells."""
    first, second = make_prompts()[4:]
    forked = first[:num_common] + second[num_common:40]
    (request,) = make_requests([forked], max_new_tokens=8)
    alone = run_requests(make_core(family_dir, is_prefix_caching=False), [request])
    core = make_core(family_dir)
    run_requests(core, make_requests([first], max_new_tokens=24))
    outcome = run_requests(core, [request])
    assert outcome.most_cached_tokens == num_common
    assert (outcome.token_ids, outcome.logprobs) == (alone.token_ids, alone.logprobs)


def test_continuing_a_text_reuses_what_was_generated(family_dir: Path) -> None:
    """The second turn of a chat: the first one's prompt and answer lie in the cache."""
    core = make_core(family_dir)
    prompt = make_prompts()[4]
    (answer,) = run_requests(core, make_requests([prompt], max_new_tokens=16)).token_ids
    longer = prompt + answer + [10, 20, 30]
    outcome = run_requests(core, make_requests([longer], max_new_tokens=8))
    assert outcome.most_cached_tokens == 48
    assert outcome.token_ids == [oracle_greedy(family_dir, longer, 8)[0]]


def test_eos_ends_a_text(family_dir: Path) -> None:
    """The fourth token is declared an end: the text stops where it first stands, and holds it."""
    prompt = make_prompts()[3]
    (token_ids,) = run_requests(make_core(family_dir), make_requests([prompt], max_new_tokens=6)).token_ids
    core = make_core(family_dir)
    core.scheduler.eos_token_ids = frozenset([token_ids[3], *EOS_TOKEN_IDS])
    outcome = run_requests(core, make_requests([prompt], max_new_tokens=6))
    assert outcome.token_ids == [token_ids[: token_ids.index(token_ids[3]) + 1]]
    assert outcome.last_events[0].finish_reason is FinishReason.EOS_TOKEN


def test_seeded_sampling_does_not_depend_on_the_batch(family_dir: Path) -> None:
    requests = make_requests(make_prompts(), max_new_tokens=MAX_NEW_TOKENS, sampling=SAMPLING)
    alone = [run_requests(make_core(family_dir), [request]) for request in requests]
    together = run_requests(make_core(family_dir), requests)
    preempted = run_requests(make_core(family_dir, num_blocks=9), requests)
    assert preempted.num_preemptions > 0
    for outcome in (together, preempted):
        assert outcome.token_ids == [one.token_ids[0] for one in alone]
        assert outcome.logprobs == [one.logprobs[0] for one in alone]
    greedy = run_requests(make_core(family_dir), make_requests(make_prompts(), max_new_tokens=MAX_NEW_TOKENS))
    assert all(first != second for first, second in zip(together.token_ids, greedy.token_ids, strict=True))


def test_a_broken_row_fails_its_request_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """NaN in one token's embedding: its request ends with an error, its neighbour and its successors don't notice."""
    write_tiny_qwen2(tmp_path, is_tied=False)
    good = make_prompts()[4]
    bad = good[:20] + [VOCAB_SIZE - 1] + good[20:]
    (expected,) = run_requests(make_core(tmp_path), make_requests([good], max_new_tokens=8)).token_ids
    core = make_core(tmp_path, num_blocks=7, is_prefix_caching=False)
    table = core.runner._model.embed_tokens  # type: ignore[attr-defined]
    table._weight = table._weight.clone()  # as nothing would load it
    table._weight[VOCAB_SIZE - 1] = torch.nan
    outcome = run_requests(core, make_requests([bad, good], max_new_tokens=8))
    assert (outcome.last_events[0].error, outcome.token_ids[0]) == (NON_FINITE_ERROR, [])
    assert outcome.token_ids[1] == expected
    for _ in range(2):  # in the blocks full of NaN
        assert run_requests(core, make_requests([good], max_new_tokens=8)).token_ids == [expected]
