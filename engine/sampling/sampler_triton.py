"""Sampling in Triton: two launches for all rows of a step, one more for top tokens, and one copy back to the host.

Nobody waits for them: parameters go through pinned memory, and the results are waited for when they are read.

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
from engine.sampling.sampler import (
    FinishedTokens,
    PendingTokens,
    RawRows,
    bounded_temperature,
    log_min_p,
    take_rows,
    uniform,
)
from engine.sampling.sampler_triton_kernels import RESULT, SPEC, choose_kernel, list_kernel, part_kernel
from engine.scheduling.batch import SampledBatch
from quant.kernels.launch import launch
from quant.kernels.transfer import HostCopy, to_device

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
Integers = npt.NDArray[np.int32]
WORD_BYTES = 4
RESULT_WORDS = RESULT.itemsize // WORD_BYTES


def word_of(record: np.dtype[Any], name: str) -> int:
    """Where a field begins among the words of its record."""
    places: Any = record.fields
    return int(places[name][1]) // WORD_BYTES


TOKEN_WORD = word_of(RESULT, "token")


def sample(
    logits: torch.Tensor, params: SequenceOf[SamplingParams], positions: SequenceOf[int], raw: RawRows | None = None
) -> SampledBatch:
    """As `engine.sampling.sampler.Sample` says."""
    return launch_sample(logits, params, positions, raw).read()


def launch_sample(
    logits: torch.Tensor, params: SequenceOf[SamplingParams], positions: SequenceOf[int], raw: RawRows | None = None
) -> PendingTokens:
    """As `engine.sampling.sampler.LaunchSample` says."""
    if not params:
        return FinishedTokens(torch.empty(0, dtype=torch.int32, device=logits.device), SampledBatch([], [], []))
    return LaunchedTokens(logits, make_specs(params, positions, raw), raw)


def make_specs(params: SequenceOf[SamplingParams], positions: SequenceOf[int], raw: RawRows | None) -> Records:
    """What the kernels must know of the rows, in one array that goes to the device in one copy."""
    places = {row: place for place, row in enumerate(raw.rows)} if raw else {}
    numbers = uniform([param.seed or 0 for param in params], positions).tolist()
    return np.array(
        [
            (
                GREEDY if param.seed is None else bounded_temperature(param),
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


class LaunchedTokens:
    """Implements `PendingTokens`."""

    def __init__(self, logits: torch.Tensor, specs: Records, raw: RawRows | None) -> None:
        self._listed_rows = np.flatnonzero(specs["num_top"]).tolist()
        max_top = min(int(specs["num_top"].max()), logits.shape[1])
        self._chosen = ChosenRows.launch(logits, specs, raw, max_top + SPARE_PLACES if max_top else 0)
        self._copy = HostCopy(self._chosen.results)
        # More tokens may have to be listed once the logits are another step's.
        self._listed_logits = take_rows(logits, self._listed_rows) if self._listed_rows else logits

    @property
    def token_ids(self) -> torch.Tensor:
        return self._chosen.results[:, TOKEN_WORD]

    def read(self) -> SampledBatch:
        rows, lists = split_results(self._copy.read(), self._chosen.capacity)
        batch = SampledBatch(rows["token"].tolist(), rows["logprob"].tolist(), rows["is_finite"].astype(bool).tolist())
        if self._listed_rows:
            self._add_top_tokens(batch, rows["num_listed"], lists[self._listed_rows])
        return batch

    def _add_top_tokens(self, batch: SampledBatch, num_listed: Integers, lists: Integers) -> None:
        """num_listed [rows], and lists [listed rows, 3, places] with ids, keys and logprobs of the top tokens."""
        if num_listed.max() > self._chosen.capacity:
            again = self._chosen.list_again(self._listed_rows, self._listed_logits, int(num_listed.max()))
            _, lists = split_results(HostCopy(again.results).read(), again.capacity)
        batch.top_token_ids.extend([] for _ in num_listed)
        batch.top_logprobs.extend([] for _ in num_listed)
        for row, (token_ids, keys, logprobs) in zip(self._listed_rows, lists, strict=True):
            # The best first, and equals in the order of their ids, as they were listed.
            order = np.argsort(-keys[: num_listed[row]].astype(np.int64), kind="stable")
            batch.top_token_ids[row] = token_ids[order].tolist()
            batch.top_logprobs[row] = logprobs.view(np.float32)[order].tolist()


@dataclasses.dataclass(frozen=True, slots=True)
class ChosenRows:
    """Rows of logits and what is chosen of them, on the device."""

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
        on_device = to_device(specs.view(np.int32).reshape(len(specs), -1), logits.device)
        results = torch.empty(len(specs), RESULT_WORDS + 3 * capacity, dtype=torch.int32, device=logits.device)
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
            results.shape[1],
            num_warps=TILE_WARPS,
            SIZE=size,
            NUM_PARTS=num_parts,
            MAX_PARTS=1 << (num_parts - 1).bit_length(),
            TILE=TILE,
        )
        chosen = cls(raw_logits, on_device, results, capacity)
        if capacity:
            chosen._list(logits)
        return chosen

    def list_again(self, rows: list[int], logits: torch.Tensor, capacity: int) -> ChosenRows:
        """The results of some rows with more places for top tokens; `logits` [len(rows), vocab] are theirs."""
        index = to_device(np.array(rows, np.int64), logits.device)
        results = torch.empty(len(rows), RESULT_WORDS + 3 * capacity, dtype=torch.int32, device=logits.device)
        results[:, :RESULT_WORDS] = self.results.index_select(0, index)[:, :RESULT_WORDS]
        chosen = ChosenRows(self.raw_logits, self.specs.index_select(0, index), results, capacity)
        chosen._list(logits)
        return chosen

    def _list(self, logits: torch.Tensor) -> None:
        rows, width = self.results.shape
        arguments = logits, self.raw_logits, self.specs, self.results, width, self.capacity
        launch(list_kernel, (rows,), *arguments, num_warps=TILE_WARPS, SIZE=logits.shape[1], TILE=LIST_TILE)


def split_results(words: Integers, capacity: int) -> tuple[Records, Integers]:
    """The results [rows], and ids, keys and logprobs of the top tokens [rows, 3, capacity]."""
    rows = np.ascontiguousarray(words[:, :RESULT_WORDS]).view(RESULT)[:, 0]
    return rows, words[:, RESULT_WORDS:].reshape(len(words), 3, capacity)


def _reduce_parts(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each part of each row [rows, parts] its best logit, its mass relative to that, and the best's token."""
    rows, size = logits.shape
    num_parts = -(-size // PART)
    bests, masses = (torch.empty(rows, num_parts, device=logits.device) for _ in range(2))
    tokens = torch.empty(rows, num_parts, dtype=torch.int32, device=logits.device)
    arguments = logits, bests, masses, tokens
    launch(part_kernel, (rows, num_parts), *arguments, num_warps=PART_WARPS, SIZE=size, NUM_PARTS=num_parts, PART=PART)
    return bests, masses, tokens
