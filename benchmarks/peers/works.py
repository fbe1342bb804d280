"""What is measured, how often, and the smallest ratio to the best peer that passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

OURS = "pytgi"
LONG_ROUNDS = 3
"""Rounds at most of what takes long."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Prompts of one length, and `num_new` tokens decoded after each; `kinds` of its two parts are compared."""

    num_sequences: int
    prompt_tokens: int
    num_new: int
    kinds: tuple[str, ...]
    is_long: bool = False
    """Whether a turn takes so long that there are `LONG_ROUNDS` at most."""

    def label(self, kind: str) -> str:
        if kind == "prefill":
            return f"prompt of {self.prompt_tokens:,}"
        sequences = "1 sequence" if self.num_sequences == 1 else f"{self.num_sequences} sequences"
        return f"decode {sequences} after {self.prompt_tokens:,}"

    @property
    def labels(self) -> list[str]:
        return [self.label(kind) for kind in self.kinds]

    def num_rounds(self, num_rounds: int) -> int:
        return min(num_rounds, LONG_ROUNDS) if self.is_long else num_rounds


WORKS = (
    Work(1, 512, 64, ("prefill", "decode")),
    Work(1, 4096, 32, ("prefill", "decode"), is_long=True),
    Work(8, 128, 64, ("decode",)),
    Work(32, 128, 96, ("decode",), is_long=True),
)
DECODE_RATIOS = {"16-bit": 1.2, "int8": 1.5, "int4": 1.5}
BATCH_RATIO = 1.5
PREFILL_RATIO = 1.2
AVX2_DECODE_RATIOS = {"16-bit": 1.0, "int8": 1.5, "int4": 1.2}
"""One sequence on machines without VNNI and AMX; everything else there must be 1.0."""
BOUND = "bound"
"""The column of what is not another engine: the memory, or our own figure that ours is compared with."""
FLOOR_WORK = "share of the memory's bandwidth"
FLOOR_SHARES = {"16-bit": 0.80, "int8": 0.82, "int4": 0.75}
"""Smallest share of the bandwidth that passes, while one sequence decodes after 512 tokens."""


def has_integer_dot_product() -> bool:
    """Whether this CPU has VNNI or AMX."""
    words = set(Path("/proc/cpuinfo").read_text().split())
    return bool(words & {"avx512_vnni", "avx_vnni", "amx_int8"})


def demanded(form: str, work: Work, kind: str, is_vnni: bool) -> float:
    """The smallest ratio to the best peer that passes."""
    if not is_vnni:
        return AVX2_DECODE_RATIOS[form] if kind == "decode" and work.num_sequences == 1 else 1.0
    if kind == "prefill":
        return PREFILL_RATIO
    return DECODE_RATIOS[form] if work.num_sequences == 1 else BATCH_RATIO


@dataclasses.dataclass(frozen=True)
class Row:
    """A work in one form: what we and each peer reached, and the ratio to the best that passes."""

    form: str
    label: str
    rates: Mapping[str, float]
    demanded: float
    is_time: bool = False
    """Whether less is better."""

    @property
    def best_peer(self) -> str | None:
        """None: no peer could do it."""
        peers = [name for name in self.rates if name != OURS]
        return (min if self.is_time else max)(peers, key=lambda name: self.rates[name], default=None)

    @property
    def ratio(self) -> float | None:
        return round(self.rates[OURS] / self.rates[self.best_peer], 2) if self.best_peer else None

    @property
    def has_passed(self) -> bool:
        if self.ratio is None:
            return True
        return self.ratio <= self.demanded if self.is_time else self.ratio >= self.demanded
