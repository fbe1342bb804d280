"""The samplers: their protocol, the table of them, and what all of them share.

Randomness is a pure function of a request's seed and the position of the token: nothing is kept between steps, so a
seeded request draws the same numbers whatever else runs, and also after preemption.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.link.messages import SamplingParams
from engine.scheduling.batch import SampledBatch
from quant.kernels.transfer import to_device

SAMPLERS: dict[str, str] = {
    "cpu": "engine.sampling.sampler_cpu:sample",
    "torch": "engine.sampling.sampler_torch:sample",
    "triton": "engine.sampling.sampler_triton:sample",
}
"""Backend name -> lazy "module:function", a `Sample`. `torch` is the reference implementation, and runs anywhere."""
LAUNCHED_SAMPLERS: dict[str, str] = {"triton": "engine.sampling.sampler_triton:launch_sample"}
"""Backend name -> lazy "module:function", a `LaunchSample`, for those samplers whose choice is made later."""

MIN_TEMPERATURE = 1e-30
"""A smaller temperature would be 0 in float32."""
MAX_TEMPERATURE = 2.0**126
"""Division may take the inverse of a larger one for 0, and -inf times that, a token that may not come, is no number."""


class Sample(Protocol):
    """Chooses a token for each row of logits."""

    def __call__(
        self,
        logits: torch.Tensor,
        params: SequenceOf[SamplingParams],
        positions: SequenceOf[int],
        raw: RawRows | None = None,
    ) -> SampledBatch:
        """Tokens of logits [rows, vocab] float32, which stay as they are; `positions` are the rows' output positions.

        Greedy rows take the largest logit. Other rows go through temperature, top-k, top-p, min-p and typical-p in this
        order, which is TGI's with min-p where transformers has it, and the inverse of the cumulated distribution.
        Logprobs and top tokens are those of the distribution that was chosen from where `is_logprob_filtered`, else of
        the model's own, of which `raw` has the rows that were changed since.
        """


class PendingTokens(Protocol):
    """A step's tokens, which are on the device until they are read."""

    @property
    def token_ids(self) -> torch.Tensor:
        """[rows] integers, on the device, valid ids in any case; a later launch there may read them."""

    def read(self) -> SampledBatch:
        """Wait for them; nothing that was launched since is waited for."""


@dataclasses.dataclass(frozen=True, slots=True)
class FinishedTokens:
    """Implements `PendingTokens` where nothing is waited for."""

    token_ids: torch.Tensor
    batch: SampledBatch

    def read(self) -> SampledBatch:
        return self.batch


class LaunchSample(Protocol):
    """Chooses as a `Sample` does, and returns before the device has begun."""

    def __call__(
        self,
        logits: torch.Tensor,
        params: SequenceOf[SamplingParams],
        positions: SequenceOf[int],
        raw: RawRows | None = None,
    ) -> PendingTokens:
        """As `Sample`; other steps may change the logits before the tokens are read."""


@dataclasses.dataclass(frozen=True, slots=True)
class RawRows:
    """The model's own logits of some rows of a step, kept before penalties and masks change them."""

    rows: list[int]
    """Ascending."""
    logits: torch.Tensor
    """[len(rows), vocab] float32"""

    @classmethod
    def of(cls, logits: torch.Tensor, rows: Iterable[int], params: SequenceOf[SamplingParams]) -> RawRows | None:
        """Copies of those of `rows` whose logprobs are the model's own; None where there are none.

        logits [all rows, vocab]; `params` is for all rows.
        """
        kept = sorted(row for row in rows if not params[row].is_logprob_filtered)
        return cls(kept, take_rows(logits, kept)) if kept else None


def take_rows(logits: torch.Tensor, rows: SequenceOf[int]) -> torch.Tensor:
    """Copies of rows of logits [all rows, vocab], for which the host does not wait."""
    return logits.index_select(0, to_device(np.array(rows, np.int64), logits.device))


def bounded_temperature(param: SamplingParams) -> float:
    """The temperature of a row that is drawn; float32 holds it and its inverse."""
    return min(max(param.temperature, MIN_TEMPERATURE), MAX_TEMPERATURE)


def log_min_p(param: SamplingParams) -> float:
    """How far below the best a scaled logit may be, as a number <= 0; -inf where min-p is off."""
    return math.log(param.min_p) if param.min_p > 0.0 else -math.inf


def uniform(seeds: SequenceOf[int], positions: SequenceOf[int]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per (64-bit seed, position), by the SplitMix64 finalizer (Steele et al. 2014)."""
    state = _mix(np.array(seeds, np.uint64)) + np.array(positions, np.uint64)
    mixed = _mix(state * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix the bits of an array, whose products wrap around without a warning."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
