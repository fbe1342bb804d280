"""Drafts change how many steps a text takes and nothing else: ids and logprobs are those without, bit by bit."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.build import build_model, choose_quantization
from engine.checkpoint.files import read_model_config
from engine.core import EngineCore
from engine.link.config import EngineConfig
from engine.link.messages import FinishReason, GenerationRequest, SamplingParams, TokenEvent
from engine.runner import ModelRunner
from engine.scheduling.batch import SampledBatch, ScheduledBatch
from engine.scheduling.ngram import propose_ngram
from engine.scheduling.proposal import IntArray, Proposal
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.speculate import Proposer, Speculator
from engine.scheduling.step_costs import StepCosts
from engine.start import start_engine
from tests.contract.harness import KERNELS, Outcome, make_core, make_requests, run_requests
from tests.diagonal import diagonal, long_but

CHECKPOINTS = Path(__file__).parents[1] / "oracles" / "checkpoints"
MAX_NEW_TOKENS = 40
NUM_BLOCKS = 64


def eager(max_draft_tokens: int = 4, propose: Proposer = propose_ngram) -> Speculator:
    """A speculator that drafts whenever it can, because more rows cost nothing."""
    return Speculator(propose, StepCosts({1: 1.0, 64: 1.0}), max_draft_tokens)


def make_prompts() -> list[list[int]]:
    """Texts that repeat themselves, so that there is something to look up."""
    chance = random.Random(4)
    parts = [[chance.randrange(250) for _ in range(size)] for size in (3, 7, 12, 18)]
    return [part * 3 + part[: index + 1] for index, part in enumerate(parts)] + [parts[3] + parts[2] + parts[3][:9]]


def run(core: EngineCore, sampling: SamplingParams | None = None, **options: Any) -> Outcome:
    requests = make_requests(make_prompts(), max_new_tokens=MAX_NEW_TOKENS, sampling=sampling)
    outcome = run_requests(core, requests, **options)
    assert core.scheduler.stats().num_used_blocks == 0
    return outcome


def assert_same(outcome: Outcome, expected: Outcome) -> None:
    assert outcome.token_ids == expected.token_ids
    assert outcome.logprobs == expected.logprobs
    assert outcome.top_tokens == expected.top_tokens
    assert [event.finish_reason for event in outcome.last_events] == [
        event.finish_reason for event in expected.last_events
    ]


SAMPLING = {
    "greedy": None,
    "seeds": SamplingParams(seed=11, temperature=0.7),
    "seeds, top-k, top-p": SamplingParams(seed=12, temperature=1.1, top_k=8, top_p=0.9),
    "greedy, penalties": SamplingParams(
        repetition_penalty=1.05,
        relative_frequency_penalty=0.4,
        frequency_penalty=0.02,
        presence_penalty=0.05,
        logit_bias={3: 1.0, 77: -2.0},
        num_top_tokens=3,
    ),
    "everything": SamplingParams(
        seed=13,
        is_watermarked=True,
        repetition_penalty=1.02,
        frequency_penalty=0.05,
        logit_bias={7: 6.0, 8: 6.0, 9: 6.0},  # so that the text repeats itself
        temperature=0.7,
        top_p=0.9,
        min_p=0.02,
        typical_p=0.9,
        num_top_tokens=2,
        is_logprob_filtered=True,
    ),
}


@functools.cache
def run_plain(folder: Path, sampling: str) -> Outcome:
    """The run without drafts that the others are compared with, once for each model and sampling."""
    return run(make_core(folder), SAMPLING[sampling])


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("max_draft_tokens", [1, 8])
def test_together(tiny_model_dir: Path, max_draft_tokens: int, sampling: str) -> None:
    """The shortest and the longest; `tests/slow` has others, and most samplings under conditions."""
    check_together(tiny_model_dir, max_draft_tokens, sampling)


def check_together(tiny_model_dir: Path, max_draft_tokens: int, sampling: str) -> None:
    """Sequences beside each other have the tokens and logprobs of a run without drafts."""
    speculator = eager(max_draft_tokens)
    outcome = run(make_core(tiny_model_dir, speculator=speculator), SAMPLING[sampling])
    assert_same(outcome, run_plain(tiny_model_dir, sampling))
    assert 0 < speculator.num_accepted < speculator.num_drafted


CONDITIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tiny budget": ({"max_batch_tokens": 7}, {}),
    "chunks": ({"max_batch_tokens": 17}, {"is_staggered": True}),
    "one after the other": ({}, {"is_staggered": True}),
    "preemption": ({"num_blocks": 9}, {}),
    "preemption without a cache": ({"num_blocks": 9, "is_prefix_caching": False}, {}),
}


ENDS = ["greedy", "everything"]
"""The samplings with the least and the most to keep."""


@pytest.mark.parametrize("sampling", ENDS)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_under_conditions(tiny_model_dir: Path, condition: str, sampling: str) -> None:
    check_under_condition(tiny_model_dir, condition, sampling)


def check_under_condition(tiny_model_dir: Path, condition: str, sampling: str) -> None:
    """With little memory, small steps or late arrivals tokens and logprobs are those of a plain run without drafts."""
    options, history = CONDITIONS[condition]
    speculator = eager()
    outcome = run(make_core(tiny_model_dir, speculator=speculator, **options), SAMPLING[sampling], **history)
    assert_same(outcome, run_plain(tiny_model_dir, sampling))
    assert speculator.num_accepted > 0
    assert outcome.num_preemptions > 0 or "num_blocks" not in options


def test_with_a_warm_prefix_cache(tiny_model_dir: Path) -> None:
    """The next request does not find what rejected drafts have left in the blocks."""
    core = make_core(tiny_model_dir, speculator=eager(8))
    cold, warm = run(core), run(core)
    assert warm.most_cached_tokens > cold.most_cached_tokens
    assert_same(cold, run_plain(tiny_model_dir, "greedy"))
    assert_same(warm, cold)


CHECKPOINT_OF = {
    "gptq": "gptqmodel-v1-4bit-g32-static",
    "gptq, act-order": "auto-gptq-4bit-g32-act",
    "awq": "gptqmodel-awq-g32",
    "compressed-tensors": "llmcompressor-w4-g32",
}


DTYPES = {"exact": torch.float32, "rounding": torch.bfloat16}


@pytest.mark.parametrize(("name", "dtype"), diagonal(CHECKPOINT_OF, DTYPES))
def test_stored_layouts(name: str, dtype: torch.dtype) -> None:
    check_layout(CHECKPOINTS / name, None, dtype)


# Quantised on load for float32 has kernels of its own, which take 10 s each to compile: int4 stands for both.
@pytest.mark.parametrize(
    ("flag", "dtype"),
    diagonal(["int4", "int8", None], DTYPES, also=[("int4", "rounding"), (None, "rounding")]),
)
def test_layouts_made_on_load(tiny_model_dir: Path, flag: str | None, dtype: torch.dtype) -> None:
    check_layout(tiny_model_dir, flag, dtype)


def check_layout(folder: Path, flag: str | None, dtype: torch.dtype) -> None:
    """Drafts change nothing, whatever kernels a model's matrices have.

    `flag` says what is made of dense matrices on load, None: they stay dense.
    """
    config = read_model_config(folder)
    is_bfloat16 = dtype == torch.bfloat16
    quantization = choose_quantization(config, folder, dtype, KERNELS, flag, None, is_bfloat16=is_bfloat16)
    runner = ModelRunner(build_model(config, folder, dtype, KERNELS, quantization), KERNELS)
    runner.allocate(NUM_BLOCKS, KERNELS.kv_dtype(dtype), num_positions=256)
    speculator = eager()
    outcome = run(make_core(folder, runner=runner, speculator=speculator, is_prefix_caching=False))
    assert_same(outcome, run(make_core(folder, runner=runner, is_prefix_caching=False)))
    assert speculator.num_drafted > 0


def test_an_end_within_a_draft_is_the_end(tiny_model_dir: Path) -> None:
    """The whole continuation is drafted, and its ninth token declared an end: nothing after it is sent."""
    prompt = make_prompts()[0]
    (text,) = run_requests(make_core(tiny_model_dir), make_requests([prompt], max_new_tokens=24)).token_ids

    def foresee(token_ids: IntArray, max_tokens: int) -> Proposal:
        done = len(token_ids) - len(prompt)
        return Proposal(text[done : done + max_tokens], match_length=16)

    eos = text[8]
    first = text.index(eos)
    core = make_core(tiny_model_dir, speculator=eager(8, foresee))
    core.scheduler.eos_token_ids = frozenset([eos])
    outcome = run_requests(core, make_requests([prompt], max_new_tokens=24))
    assert outcome.token_ids == [text[: first + 1]]
    assert outcome.last_events[0].finish_reason is FinishReason.EOS_TOKEN
    core = make_core(tiny_model_dir, speculator=eager(8, foresee))
    outcome = run_requests(core, make_requests([prompt], max_new_tokens=11))
    assert outcome.token_ids == [text[:11]]
    assert outcome.last_events[0].finish_reason is FinishReason.LENGTH


def test_steps_of_one_token_have_no_place_for_drafts(tiny_model_dir: Path) -> None:
    limits = {"max_batch_prefill_tokens": 1, "max_batch_total_tokens": 512}
    config = EngineConfig(model_path=str(tiny_model_dir), dtype="float32", max_draft_tokens=2, **limits)
    core, _ = start_engine(config)
    requests = make_requests(make_prompts()[:2], max_new_tokens=4)
    assert run_requests(core, requests).token_ids == run_requests(make_core(tiny_model_dir), requests).token_ids
    assert core.scheduler.stats().num_drafted_tokens == 0


class BiasedScheduler(Scheduler):
    """A wrong acceptance rule: one draft in ten is taken although the model has chosen something else."""

    chance = random.Random(0)

    def update(
        self, batch: ScheduledBatch, sampled: SampledBatch, prompt_scores: SequenceOf[float] = ()
    ) -> list[TokenEvent]:
        for scheduled in batch.scheduled:
            for row, guess in zip(scheduled.rows, scheduled.draft, strict=False):
                if self.chance.random() < 0.1:
                    sampled.token_ids[row] = guess
        return super().update(batch, sampled, prompt_scores)


TEXTS_AT_A_TIME = 250


Counts = Counter[tuple[int, ...]]


def sample_pairs(core: EngineCore, num_samples: int, first_seed: int) -> Counts:
    """Counts of the pairs of first two tokens in so many texts at temperature 1."""
    counts: Counts = Counter()
    for start in range(first_seed, first_seed + num_samples, TEXTS_AT_A_TIME):
        requests = [
            GenerationRequest(
                request_id=str(seed),
                prompt_token_ids=[1, 2, 3, 1, 2, 3, 1, 2],
                max_new_tokens=3,
                sampling=SamplingParams(seed=seed, temperature=1.0, top_k=6),
            )
            for seed in range(start, start + TEXTS_AT_A_TIME)
        ]
        counts.update(tuple(token_ids[:2]) for token_ids in run_requests(core, requests).token_ids)
    return counts


def p_value(first: Counts, second: Counts) -> float:
    """The p-value of the chi-square test that two samples have one distribution; rare pairs are counted together."""
    pairs = [*(first | second)]
    rows = np.array([[counts[pair] for pair in pairs] for counts in (first, second)], float)
    is_common = rows.sum(axis=0) >= 40
    rows = np.concatenate([rows[:, is_common], rows[:, ~is_common].sum(axis=1, keepdims=True)], axis=1)
    rows = rows[:, rows.sum(axis=0) > 0]
    expected = rows.sum(axis=1, keepdims=True) * rows.sum(axis=0, keepdims=True) / rows.sum()
    statistic = ((rows - expected) ** 2 / expected).sum()
    freedom = rows.shape[1] - 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2.0), torch.tensor(statistic / 2.0)))


@pytest.mark.parametrize("num_samples", long_but([3_000, 8_000], 3_000))
@pytest.mark.parametrize("tiny_model_dir", ["qwen2"], indirect=True)
def test_samples_have_the_distribution_of_no_speculation(tiny_model_dir: Path, num_samples: int) -> None:
    def core_of(speculator: Speculator | None) -> EngineCore:
        return make_core(tiny_model_dir, num_blocks=600, max_batch_tokens=4096, speculator=speculator)

    without = sample_pairs(core_of(None), num_samples, 0)
    second_tokens = Counter(pair[1] for pair in without.elements())
    likely, _ = second_tokens.most_common(1)[0]

    def guess(token_ids: IntArray, max_tokens: int) -> Proposal:
        return Proposal([likely] * max_tokens, match_length=16)

    speculator = eager(propose=guess)
    drafted = sample_pairs(core_of(speculator), num_samples, 1_000_000)
    assert speculator.num_drafted == num_samples
    assert num_samples / 50 < speculator.num_accepted < num_samples / 2
    assert p_value(without, drafted) > 0.01
    core = core_of(eager(propose=guess))
    core.scheduler.__class__ = BiasedScheduler
    assert p_value(without, sample_pairs(core, num_samples, 2_000_000)) < 1e-6, "the test sees a wrong rule"
