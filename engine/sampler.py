"""Batched sampling: one call chooses the next token of every sequence in the step.

Randomness is a pure function of a request's seed and the position of the token: nothing is kept between steps, so a
seeded request draws the same numbers whatever else runs, and also after preemption.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt
import torch

from engine.scheduler import SampledBatch
from engine.types import SamplingParams

SAMPLERS: dict[str, str] = {
    "cpu": "engine.sampler_cpu:sample",
    "torch": "engine.sampler:sample",
}
"""Name -> lazy "module:function" with the signature of `sample` below, which is the plain twin of the others."""

NUCLEUS_CANDIDATES = 1024
"""Top-p first looks among this many best tokens, and sorts the vocabulary only if they don't hold the mass."""
MIN_TEMPERATURE = 1e-30
"""Less would be 0 in float32."""


def sample(logits: torch.Tensor, params: SequenceOf[SamplingParams], positions: SequenceOf[int]) -> SampledBatch:
    """Choose a token per row of logits [rows, vocab] float32; `positions` are the rows' output positions.

    Greedy rows take the largest logit. Other rows go through temperature, top-k, top-p (reference `tgi-http.md` 5.1)
    and the inverse of the cumulated distribution. Logprobs are those of the distribution that was chosen from (5.3).
    """
    random_rows = [row for row, param in enumerate(params) if param.seed is not None]
    greedy_rows = [row for row, param in enumerate(params) if param.seed is None]
    columns = torch.empty(3, len(params), dtype=torch.float64, device=logits.device)
    if greedy_rows:
        columns[:, greedy_rows] = _take_best(logits if not random_rows else logits[greedy_rows])
    if random_rows:
        drawn = [params[row] for row in random_rows]
        numbers = uniform([param.seed or 0 for param in drawn], [positions[row] for row in random_rows])
        scaled = filter_logits(logits if not greedy_rows else logits[random_rows], drawn)
        columns[:, random_rows] = _draw(scaled, torch.from_numpy(numbers).to(logits.device))
    # One device-to-host copy for everything the step needs to know.
    token_ids, logprobs, is_finite = columns.tolist()
    return SampledBatch([int(token) for token in token_ids], logprobs, [bool(value) for value in is_finite])


def _take_best(logits: torch.Tensor) -> torch.Tensor:
    """Rows of token, logprob, is_finite [3, rows] for the largest logits."""
    best, chosen = logits.max(dim=-1)
    normaliser = logits.logsumexp(dim=-1)
    return torch.stack([chosen.double(), (best - normaliser).double(), normaliser.isfinite().double()])


def _draw(scaled: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Rows of token, logprob, is_finite [3, rows]: the first token at which the cumulated mass exceeds the number.

    scaled [rows, vocab]: logits relative to the best one, so that no exponential overflows; numbers [rows] in [0, 1).
    """
    cumulated = scaled.exp().cumsum(dim=-1, dtype=torch.float64)
    total = cumulated[:, -1:]
    chosen = torch.searchsorted(cumulated, numbers.unsqueeze(1) * total, right=True)
    chosen.clamp_(max=scaled.shape[1] - 1)
    logprobs = scaled.gather(1, chosen).double() - total.log()
    return torch.cat([chosen.double(), logprobs, total.isfinite().double()], dim=1).T


def filter_logits(logits: torch.Tensor, params: SequenceOf[SamplingParams]) -> torch.Tensor:
    """Temperature, then top-k, then top-p over rows [rows, vocab]: the best becomes 0, what is not allowed -inf."""
    device = logits.device
    # The best logit becomes 0 first: a tiny temperature then leaves only it, instead of overflowing.
    temperatures = torch.tensor([[max(param.temperature, MIN_TEMPERATURE)] for param in params], device=device)
    logits = (logits - logits.max(dim=-1, keepdim=True).values).div_(temperatures)
    vocab_size = logits.shape[1]
    top_ks = [min(param.top_k, vocab_size) for param in params]
    if any(top_ks):
        rows = torch.tensor([row for row, top_k in enumerate(top_ks) if top_k], device=device)
        limits = torch.tensor([[top_k - 1] for top_k in top_ks if top_k], device=device)
        best = logits[rows].topk(max(top_ks), dim=-1).values
        kept = logits[rows]
        logits[rows] = kept.masked_fill(kept < best.gather(1, limits), -torch.inf)
    if any(param.top_p < 1.0 for param in params):
        rows = torch.tensor([row for row, param in enumerate(params) if param.top_p < 1.0], device=device)
        top_ps = torch.tensor([[param.top_p] for param in params if param.top_p < 1.0], device=device)
        logits[rows] = _keep_nucleus(logits[rows], top_ps)
    return logits


def _keep_nucleus(logits: torch.Tensor, top_ps: torch.Tensor) -> torch.Tensor:
    """Keep the smallest set of best tokens whose mass reaches top_p [rows, 1]; ties with the last one stay."""
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    for num_candidates in (min(NUCLEUS_CANDIDATES, logits.shape[1]), logits.shape[1]):
        best = logits.topk(num_candidates, dim=-1).values
        mass = (best - normaliser).exp().cumsum(dim=-1)
        if num_candidates == logits.shape[1] or bool((mass[:, -1:] >= top_ps).all()):
            break
    last = (mass < top_ps).sum(dim=-1, keepdim=True).clamp_(max=num_candidates - 1)
    return logits.masked_fill(logits < best.gather(1, last), -torch.inf)


def uniform(seeds: SequenceOf[int], positions: SequenceOf[int]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per (64-bit seed, position), by the SplitMix64 finaliser (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        state = _mix(np.array(seeds, np.uint64)) + np.array(positions, np.uint64)
        mixed = _mix(state * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
