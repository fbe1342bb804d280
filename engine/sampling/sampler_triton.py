"""Sampling in Triton: two launches for all rows of a step, one more for top tokens, and one copy back to the host.

The first launch reads every logit once, a program for each part of a row: its best logit, and its mass relative to
that. The second has a program for each row, which joins the parts in their order and, unless the row is greedy, draws.
Every filter leaves the tokens whose scores reach a bound: top-k, top-p and min-p one of the scaled logits, typical-p
one of their nearness to the entropy. A bound is found by bisection, for which the row is read again and again. Masses
are float32 sums over a part, added up part by part in float64. Nothing depends on the other rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.link.messages import SamplingParams
from engine.sampling.sampler import MIN_TEMPERATURE, RawRows, log_min_p, uniform
from engine.sampling.sampler_triton_kernels import RESULT, SPEC, choose_kernel, list_kernel, part_kernel
from engine.scheduling.batch import SampledBatch
from quant.kernels.launch import launch

PART, PART_WARPS = 4096, 8
"""Logits that a program of the first launch reads, by so many warps."""
TILE, LIST_TILE, TILE_WARPS = 8192, 4096, 16
"""Logits that a program reads at once where it reads a whole row: to choose a token, to list the top tokens."""
GREEDY = 0.0
"""The kernels' temperature for greedy rows."""
SPARE_PLACES = 12
"""Places for ties with the last of the top tokens. Where they are too few, the tokens are listed again."""

Records = npt.NDArray[Any]
"""An array of `SPEC` or `RESULT`."""


def sample(
    logits: torch.Tensor, params: SequenceOf[SamplingParams], positions: SequenceOf[int], raw: RawRows | None = None
) -> SampledBatch:
    """As `engine.sampling.sampler.Sample` says."""
    if not params:
        return SampledBatch([], [], [])
    max_top = min(max(param.num_top_tokens for param in params), logits.shape[1])
    chosen = ChosenRows.launch(
        logits, make_specs(params, positions, raw), raw, max_top + SPARE_PLACES if max_top else 0
    )
    rows, lists = chosen.read()
    max_listed = int(rows["num_listed"].max())
    if max_listed > chosen.capacity:
        rows, lists = chosen.list_again(max_listed).read()
    batch = SampledBatch(rows["token"].tolist(), rows["logprob"].tolist(), rows["is_finite"].astype(bool).tolist())
    if max_top:
        for num_listed, (token_ids, keys, logprobs) in zip(rows["num_listed"], lists, strict=True):
            # The best first, and equals in the order of their ids, as they were listed.
            order = np.argsort(-keys[:num_listed].astype(np.int64), kind="stable")
            batch.top_token_ids.append(token_ids[order].tolist())
            batch.top_logprobs.append(logprobs.view(np.float32)[order].tolist())
    return batch


def make_specs(params: SequenceOf[SamplingParams], positions: SequenceOf[int], raw: RawRows | None) -> Records:
    """What the kernels must know of the rows, in one array that goes to the device in one copy."""
    places = {row: place for place, row in enumerate(raw.rows)} if raw else {}
    numbers = uniform([param.seed or 0 for param in params], positions).tolist()
    return np.array(
        [
            (
                GREEDY if param.seed is None else max(param.temperature, MIN_TEMPERATURE),
                min(param.top_k, np.iinfo(np.int32).max),
                param.top_p,
                log_min_p(param),
                param.typical_p,
                min(param.num_top_tokens, np.iinfo(np.int32).max),
                param.is_logprob_filtered,
                places.get(row, -1),
                numbers[row],
            )
            for row, param in enumerate(params)
        ],
        SPEC,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class ChosenRows:
    """The rows of a step and their results, which are on the device until they are read."""

    logits: torch.Tensor
    raw_logits: torch.Tensor
    specs: torch.Tensor
    """[rows, words of `SPEC`] int32"""
    results: torch.Tensor
    """[rows, words of `RESULT` and of the top tokens] int32"""
    capacity: int
    """Places for top tokens in a row's result."""

    @classmethod
    def launch(cls, logits: torch.Tensor, specs: Records, raw: RawRows | None, capacity: int) -> ChosenRows:
        size = logits.shape[1]
        raw_logits = logits if raw is None else raw.logits
        on_device = torch.from_numpy(specs.view(np.int32).reshape(len(specs), -1)).to(logits.device)
        width = RESULT.itemsize // 4 + 3 * capacity
        results = torch.empty(len(specs), width, dtype=torch.int32, device=logits.device)
        parts = _reduce_parts(logits)
        raw_parts = parts if raw is None else _reduce_parts(raw_logits)
        num_parts = parts[0].shape[1]
        launch(
            choose_kernel,
            (len(specs),),
            logits,
            *parts,
            raw_logits,
            *raw_parts,
            on_device,
            results,
            width,
            num_warps=TILE_WARPS,
            SIZE=size,
            NUM_PARTS=num_parts,
            MAX_PARTS=1 << (num_parts - 1).bit_length(),
            TILE=TILE,
        )
        chosen = cls(logits, raw_logits, on_device, results, capacity)
        chosen._list()
        return chosen

    def list_again(self, capacity: int) -> ChosenRows:
        """The same results with more places for top tokens."""
        width = RESULT.itemsize // 4 + 3 * capacity
        results = torch.empty(len(self.results), width, dtype=torch.int32, device=self.results.device)
        results[:, : RESULT.itemsize // 4] = self.results[:, : RESULT.itemsize // 4]
        chosen = dataclasses.replace(self, results=results, capacity=capacity)
        chosen._list()
        return chosen

    def _list(self) -> None:
        if self.capacity:
            rows, width = self.results.shape
            arguments = self.logits, self.raw_logits, self.specs, self.results, width, self.capacity
            launch(list_kernel, (rows,), *arguments, num_warps=TILE_WARPS, SIZE=self.logits.shape[1], TILE=LIST_TILE)

    def read(self) -> tuple[Records, npt.NDArray[np.int32]]:
        """The rows' results, and [rows, 3, capacity] ids, keys and logprobs of the top tokens: one copy to the host."""
        words = self.results.cpu().numpy()
        num_words = RESULT.itemsize // 4
        rows = np.ascontiguousarray(words[:, :num_words]).view(RESULT)[:, 0]
        return rows, words[:, num_words:].reshape(len(words), 3, self.capacity)


def _reduce_parts(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each part of each row [rows, parts] its best logit, its mass relative to that, and the best's token."""
    rows, size = logits.shape
    num_parts = -(-size // PART)
    bests, masses = (torch.empty(rows, num_parts, device=logits.device) for _ in range(2))
    tokens = torch.empty(rows, num_parts, dtype=torch.int32, device=logits.device)
    arguments = logits, bests, masses, tokens
    launch(part_kernel, (rows, num_parts), *arguments, num_warps=PART_WARPS, SIZE=size, NUM_PARTS=num_parts, PART=PART)
    return bests, masses, tokens
