"""Checks of sampling, masks and penalties on the device.

A drawn token must be one whose share of the cumulated distribution, in float64, holds the number that was drawn;
sums in float32 may be off by `EDGE` at its edges.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.gpu_proof.checks import Check, poisoned_memory
from benchmarks.gpu_proof.inputs import Inputs
from engine.link.messages import GenerationRequest, SamplingParams
from engine.link.registry import import_entry
from engine.sampling.grammar import MASKS, num_words
from engine.sampling.grammar_torch import apply_masks as apply_masks_in_torch
from engine.sampling.penalties import Penalties
from engine.sampling.sampler import SAMPLERS, uniform
from engine.sampling.sampler_torch import filter_logits
from engine.sampling.sampler_torch import sample as sample_in_torch
from engine.scheduling.batch import SampledBatch, ScheduledBatch
from engine.scheduling.sequence import Sequence

EDGE = 1e-4
LOGPROB_ERROR = 1e-3
VOCABULARY, TOY_VOCABULARY = 152_064, 1500
GREEDY = SamplingParams()

DRAWS: dict[str, SamplingParams] = {
    "temperature": SamplingParams(seed=1, temperature=0.7),
    "a hot temperature": SamplingParams(seed=2, temperature=3.0, is_logprob_filtered=True),
    "top-k": SamplingParams(seed=3, top_k=50),
    "top-k of one": SamplingParams(seed=4, top_k=1),
    "top-p": SamplingParams(seed=5, top_p=0.9, is_logprob_filtered=True),
    "a small top-p": SamplingParams(seed=6, top_p=0.05),
    "min-p": SamplingParams(seed=7, min_p=0.02),
    "typical-p": SamplingParams(seed=8, typical_p=0.9),
    "all filters": SamplingParams(seed=9, temperature=0.9, top_k=400, top_p=0.95, min_p=0.001, num_top_tokens=5),
}


def sampling_checks(*, is_toy: bool) -> Iterator[Check]:
    size = TOY_VOCABULARY if is_toy else VOCABULARY
    for rows in (1, 3) if is_toy else (1, 33, 128):
        yield _check(f"greedy tokens of {rows} rows", [GREEDY] * rows, size)
    for name, params in DRAWS.items():
        yield _check(f"tokens drawn with {name}", [params] * (3 if is_toy else 8), size)
    yield _check("rows of all kinds together", [GREEDY, SamplingParams(num_top_tokens=4), *DRAWS.values()], size)
    yield Check("a row that is not finite", functools.partial(_bad_row_complaints, size=size))
    yield Check("masks", functools.partial(_mask_complaints, size=size))
    yield Check("penalties, biases and watermarks", functools.partial(_penalty_complaints, size=size))


def _check(name: str, params: list[SamplingParams], size: int) -> Check:
    return Check(name, lambda inputs: _complaints(inputs, inputs.normal(len(params), size, spread=3.0), params))


def _sample(inputs: Inputs, logits: torch.Tensor, params: list[SamplingParams]) -> SampledBatch:
    sample = import_entry(SAMPLERS, inputs.device.sampler, "sampler")
    batch: SampledBatch = sample(logits, params, list(range(len(params))))
    return batch


def _complaints(inputs: Inputs, logits: torch.Tensor, params: list[SamplingParams]) -> list[str]:
    before = logits.clone()
    with poisoned_memory():
        batch, again = (_sample(inputs, logits, params) for _ in range(2))
    complaints = [] if batch == again else ["two runs differ: a race"]
    complaints += [] if torch.equal(before, logits) else ["the logits have changed"]
    for row, param in enumerate(params):
        complaints += [f"row {row}: {text}" for text in _row_complaints(logits[row], param, row, batch)]
    tops = sample_in_torch(logits.double(), params, list(range(len(params)))).top_token_ids
    if any(param.num_top_tokens for param in params) and batch.top_token_ids != tops:
        complaints.append("other top tokens than the reference's")
    return complaints


def _row_complaints(logits: torch.Tensor, param: SamplingParams, row: int, batch: SampledBatch) -> list[str]:
    token, wide = batch.token_ids[row], logits.double()
    if not batch.is_finite[row]:
        return ["is said not to be finite"]
    reported = wide
    if param.seed is None:
        complaints = [] if float(wide[token]) == float(wide.max()) else [f"{token} is not the best token"]
    else:
        scaled = filter_logits(wide.unsqueeze(0), [param])[0]
        reported = scaled if param.is_logprob_filtered else wide
        mass = torch.cat([wide.new_zeros(1), scaled.exp().cumsum(0)])
        number = float(uniform([param.seed], [row])[0])
        below, above = (float(mass[token + index] / mass[-1]) for index in (0, 1))
        is_drawn = below - EDGE <= number <= above + EDGE
        complaints = [] if is_drawn else [f"{token} lies at {below:.6f} to {above:.6f}, {number:.6f} was drawn"]
    logprob = float(reported[token] - reported.logsumexp(0))
    if not abs(batch.logprobs[row] - logprob) <= LOGPROB_ERROR:
        complaints.append(f"logprob {batch.logprobs[row]:.5f} instead of {logprob:.5f}")
    return complaints


def _bad_row_complaints(inputs: Inputs, size: int) -> list[str]:
    logits = inputs.normal(3, size)
    logits[1, size // 2] = torch.nan
    is_finite = _sample(inputs, logits, [GREEDY] * 3).is_finite
    return [] if is_finite == [True, False, True] else [f"rows are said to be finite: {is_finite}"]


def _mask_complaints(inputs: Inputs, size: int) -> list[str]:
    apply_masks = import_entry(MASKS, inputs.device.masks, "mask")
    chance = np.random.default_rng(inputs.generator.initial_seed())
    masks = chance.integers(-(2**31), 2**31, (3, num_words(size)), np.int32)
    rows = np.array([0, 2, 3], np.int32)
    logits = inputs.normal(5, size)
    expected = logits.cpu()
    apply_masks_in_torch(expected, rows, masks)
    apply_masks(logits, rows, masks)
    return [] if torch.equal(expected, logits.cpu()) else ["other logits than the reference's"]


def _penalty_complaints(inputs: Inputs, size: int) -> list[str]:
    """The device's logits, with every penalty and the watermark, against those of plain torch on the CPU."""
    sampling = SamplingParams(
        is_watermarked=True,
        repetition_penalty=1.3,
        relative_frequency_penalty=0.5,
        frequency_penalty=0.4,
        presence_penalty=0.3,
        logit_bias={5: 1.5, size - 1: -2.0},
    )
    prompt = inputs.integers(size, 300).tolist()
    batch = ScheduledBatch()
    for index in range(2):
        request = GenerationRequest(
            request_id=str(index), prompt_token_ids=prompt[index:], max_new_tokens=9, sampling=sampling
        )
        batch.add(Sequence(request, arrival_time=0.0), len(prompt) - index, prompt[: 2 * index])
    logits = inputs.normal(batch.num_rows, size)
    expected = logits.cpu()
    Penalties(backend=inputs.device.penalties).apply(Penalties.select(batch), logits)
    Penalties(backend="torch").apply(Penalties.select(batch), expected)
    error = float((logits.cpu() - expected).abs().max())
    return [] if error <= 1e-5 else [f"logits are off by {error:.1e}"]
