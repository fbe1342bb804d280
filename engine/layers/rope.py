"""Rotary positions: how config.json and the flags stretch them, and the tables the layers rotate with.

The rotary embedding is Su et al. 2021; the scalings are `linear` (Chen et al. 2023), `dynamic` (NTK by length), `yarn`
(Peng et al. 2023) and `llama3`, each computed as `transformers` does in `modeling_rope_utils`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from engine.layers.base import RotaryTable, Rotation
from engine.link.errors import StartError

DEFAULT_THETA = 10_000.0
MAX_POSITIONS = 2**31 - 1
KEPT_UNDER_FLAGS = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
"""Keys of config.json's scaling that the flags keep: facts about the training, which flags can't state."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """One model's rotary embedding, resolved and checked."""

    kind: str
    """Key of `ROPE_TYPES`."""
    theta: float
    original_window: int
    """Positions that the model was trained on before they were stretched."""
    max_window: int
    """Positions that make sense: more than the model's max_position_embeddings if `factor` stretches beyond them."""
    factor: float = 1.0
    attention_factor: float = 1.0
    """Queries and keys are both multiplied by it."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    is_truncating: bool = True
    """Whether yarn rounds the range of dimensions that it blends over to whole dimensions."""


def read_rope(config: Mapping[str, Any]) -> Rope:
    """Read what config.json says, in any of its spellings. Raises StartError for an unknown type or a bad number.

    `rope_scaling` with `type` or `rope_type`, or transformers 5's `rope_parameters`, which also holds `rope_theta`;
    the former wins where both are there, as in transformers.
    """
    scaling = _config_scaling(config)
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    if kind not in ROPE_TYPES:
        raise StartError(f"rope scaling {kind!r} is not supported; supported: {', '.join(sorted(ROPE_TYPES))}")
    window = config["max_position_embeddings"]
    theta = _number(kind, "rope_theta", _theta(config))
    if kind == "default":
        return Rope(kind=kind, theta=theta, original_window=window, max_window=window)
    factor = _factor(kind, scaling.get("factor"))
    # transformers grows `dynamic` from max_position_embeddings whatever else the configuration says.
    original = window if kind == "dynamic" else _original_window(kind, config, scaling)
    if factor * original > MAX_POSITIONS:
        raise StartError(
            f"rope scaling {kind!r} with a factor of {factor:g} stretches {original} positions too far: "
            "lower it in config.json, or by --rope-factor"
        )
    return Rope(
        kind=kind,
        theta=theta,
        original_window=original,
        max_window=max(window, int(factor * original)),
        factor=factor,
        **_details(kind, scaling, factor),
    )


def replace_rope_scaling(config: Mapping[str, Any], kind: str | None, factor: float | None) -> dict[str, Any]:
    """`config` with --rope-scaling and --rope-factor in place of its own scaling (`docs/command-line.md`, 4.3)."""
    if kind is None and factor is None:
        return dict(config)
    if kind == "default" and factor is not None:
        raise StartError("--rope-factor has no effect with --rope-scaling default: leave one of them out")
    replaced = _config_scaling(config)
    facts = {key: replaced[key] for key in KEPT_UNDER_FLAGS if key in replaced}
    scaling = {
        **facts,
        "rope_type": kind or "linear",
        "rope_theta": _theta(config),
        "factor": 1.0 if factor is None else factor,
    }
    return {**config, "rope_scaling": scaling, "rope_parameters": None}


def _config_scaling(config: Mapping[str, Any]) -> Mapping[str, Any]:
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise StartError(f"rope_scaling in config.json is {scaling!r}, not an object: correct it or remove it")
    if per_layer := [key for key, value in scaling.items() if isinstance(value, Mapping)]:
        raise StartError(f"rope_parameters in config.json differ by layer ({', '.join(per_layer)}): not supported")
    return scaling


def _theta(config: Mapping[str, Any]) -> Any:
    """The rotary base. Where `rope_scaling` was added to a file that has it in `rope_parameters`, it is still found."""
    parameters = config.get("rope_parameters")
    sources = (_config_scaling(config), config, parameters if isinstance(parameters, Mapping) else {})
    return next((source["rope_theta"] for source in sources if source.get("rope_theta") is not None), DEFAULT_THETA)


def _factor(kind: str, value: Any) -> float:
    if not _is_number(value) or value < 1:
        raise StartError(
            f"rope scaling {kind!r} needs a factor of at least 1, not {value!r}: "
            "correct it in config.json, or give --rope-scaling and --rope-factor"
        )
    return float(value)


def _original_window(kind: str, config: Mapping[str, Any], scaling: Mapping[str, Any]) -> int:
    key = "original_max_position_embeddings"
    return int(_number(kind, key, config.get(key) or scaling.get(key) or config["max_position_embeddings"]))


def _details(kind: str, scaling: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The fields of `Rope` that only this type has."""
    if kind == "llama3":
        low, high = (_number(kind, key, scaling.get(key)) for key in ("low_freq_factor", "high_freq_factor"))
        if high <= low:
            raise StartError(f"rope scaling {kind!r} needs a high_freq_factor above its low_freq_factor {low}")
        return {"low_freq_factor": low, "high_freq_factor": high}
    if kind == "yarn":
        betas = {key: _number(kind, key, scaling[key]) for key in ("beta_fast", "beta_slow") if scaling.get(key)}
        is_truncating = bool(scaling.get("truncate", True))
        return {**betas, "attention_factor": _attention_factor(scaling, factor), "is_truncating": is_truncating}
    return {}


def _attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    """The factor that config.json has, else 0.1 ln(factor) + 1 as yarn's authors found it.

    `mscale` and `mscale_all_dim` bend the latter.
    """
    stored, mscale, mscale_all_dim = (scaling.get(key) for key in "attention_factor mscale mscale_all_dim".split())
    if stored is not None:
        return _number("yarn", "attention_factor", stored)
    growth = 0.1 * math.log(factor)
    if mscale and mscale_all_dim:
        above, below = _number("yarn", "mscale", mscale), _number("yarn", "mscale_all_dim", mscale_all_dim)
        return (growth * above + 1.0) / (growth * below + 1.0)
    return growth + 1.0


def _is_number(value: Any) -> bool:
    # The comparison refuses NaN, and integers too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _number(kind: str, key: str, value: Any) -> float:
    if not _is_number(value) or value <= 0:
        raise StartError(f"rope scaling {kind!r} needs {key} as a number above 0, not {value!r}: put it in config.json")
    return float(value)


class Rotary:
    """Turns a step's positions into the angles that layers rotate by. `allocate` comes before the first step."""

    is_prompt_dependent = False
    """Whether a token's rotation depends on how long its prompt is, so that prompts can't share keys."""

    def __init__(self, rope: Rope, head_dim: int, device: torch.device) -> None:
        self.rope = rope
        self._exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self._device = device

    def allocate(self, num_positions: int) -> None:
        """Make the table for positions below `num_positions`."""
        self.table = self._table(self._angles(torch.arange(num_positions)))

    def prepare(
        self, rows: torch.Tensor, starts: Sequence[int], seq_lens: Sequence[int], prompt_lens: Sequence[int]
    ) -> Rotation:
        """The angles of a step, whose tokens stand at the positions `rows` [num_tokens] int64.

        Tokens `starts[i] : starts[i + 1]` are the last of the first `seq_lens[i]` of a request whose prompt has
        `prompt_lens[i]`; starts [num_seqs + 1], seq_lens and prompt_lens [num_seqs].
        """
        return Rotation(self.table, rows)

    def _angles(self, positions: torch.Tensor) -> torch.Tensor:
        """positions [n] int64 -> [n, head_dim / 2] float32."""
        return torch.outer(positions.to(torch.float32), ROPE_TYPES[self.rope.kind](self.rope, self._exponents))

    def _table(self, angles: torch.Tensor) -> RotaryTable:
        scale = self.rope.attention_factor
        return RotaryTable((angles.cos() * scale).to(self._device), (angles.sin() * scale).to(self._device))


class DynamicRotary(Rotary):
    """NTK scaling by length: beyond the original window the base grows with the present length.

    `transformers` recomputes the frequencies once per forward pass and never rotates cached keys again. In `generate` a
    prompt of n tokens is thus rotated for length n, and a later token at position p for length p + 1. Both follow from
    the request alone, whatever the chunks, the batch or a preemption: row p of the table is made for length p + 1, and
    the tokens of a prompt beyond the original window get rows of their own in each step.
    """

    is_prompt_dependent = True

    def prepare(
        self, rows: torch.Tensor, starts: Sequence[int], seq_lens: Sequence[int], prompt_lens: Sequence[int]
    ) -> Rotation:
        long_prompts = [
            (start, min(end, start + prompt_len - first), first, prompt_len)
            for start, end, seq_len, prompt_len in zip(starts, starts[1:], seq_lens, prompt_lens, strict=False)
            if prompt_len > self.rope.original_window and (first := seq_len - (end - start)) < prompt_len
        ]
        if not long_prompts:
            return Rotation(self.table, rows)
        cos, sin = self.table.cos[rows], self.table.sin[rows]
        for start, end, first, prompt_len in long_prompts:
            frequencies = self._frequencies(torch.tensor([prompt_len]))[0]
            positions = torch.arange(first, first + end - start, dtype=torch.float32)
            part = self._table(torch.outer(positions, frequencies))
            cos[start:end], sin[start:end] = part.cos, part.sin
        return Rotation(RotaryTable(cos, sin), torch.arange(len(rows), device=self._device))

    def _angles(self, positions: torch.Tensor) -> torch.Tensor:
        angles = super()._angles(positions)
        grown = positions[self.rope.original_window :]
        angles[self.rope.original_window :] = grown.to(torch.float32)[:, None] * self._frequencies(grown + 1)
        return angles

    def _frequencies(self, lengths: torch.Tensor) -> torch.Tensor:
        """lengths [n] int64, beyond the original window -> [n, head_dim / 2]; in float32 as transformers computes."""
        factor, half = self.rope.factor, len(self._exponents)
        growth = factor * lengths / self.rope.original_window - (factor - 1)
        thetas = self.rope.theta * growth ** (half / (half - 1))
        return 1.0 / thetas[:, None] ** self._exponents


def make_rotary(config: Mapping[str, Any], head_dim: int, device: torch.device) -> Rotary:
    """The rotary embedding that config.json describes. Raises StartError."""
    if head_dim % 2:
        raise StartError(
            f"heads have {head_dim} features by config.json (head_dim, or hidden_size over num_attention_heads), and "
            "rotary positions take pairs: correct it"
        )
    rope = read_rope(config)
    rotary = (DynamicRotary if rope.kind == "dynamic" else Rotary)(rope, head_dim, device)
    try:
        rotary.allocate(2)
        is_finite = bool((rotary.table.cos + rotary.table.sin).isfinite().all())
    except (ArithmeticError, ValueError):
        is_finite = False
    if not is_finite:
        raise StartError(
            f"rope scaling {rope.kind!r} cannot be computed with these numbers: correct config.json's rope_theta "
            f"({rope.theta:g}) and rope_scaling"
        )
    return rotary


def _plain(rope: Rope, exponents: torch.Tensor) -> torch.Tensor:
    return 1.0 / rope.theta**exponents


def _linear(rope: Rope, exponents: torch.Tensor) -> torch.Tensor:
    return _plain(rope, exponents) / rope.factor


def _llama3(rope: Rope, exponents: torch.Tensor) -> torch.Tensor:
    """High frequencies stay, low ones are divided by the factor, those between are blended."""
    plain = _plain(rope, exponents)
    turns = rope.original_window * plain / (2 * math.pi)  # full turns within the original window
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * plain / rope.factor + blend * plain


def _yarn(rope: Rope, exponents: torch.Tensor) -> torch.Tensor:
    """The blend of llama3, but linear over a range of dimensions."""
    plain, num_dims = _plain(rope, exponents), 2 * len(exponents)

    def dimension(num_turns: float) -> float:
        """The dimension that makes `num_turns` full turns within the original window."""
        turns = math.log(rope.original_window / (num_turns * 2 * math.pi))
        return num_dims * turns / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.is_truncating:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, num_dims - 1)
    if low == high:
        high += 0.001
    blend = 1 - ((torch.arange(len(exponents), dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * plain / rope.factor + blend * plain


ROPE_TYPES: dict[str, Callable[[Rope, torch.Tensor], torch.Tensor]] = {
    "default": _plain,
    "dynamic": _plain,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
"""Type -> inverse frequencies [head_dim / 2], given the exponents 2i / head_dim (`dynamic`: in the original window)."""
