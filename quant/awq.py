"""AWQ checkpoints, "gemm" packing, 4 bits, as autoawq and gptqmodel write them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from quant.base import FormatError, LinearMethod, MatrixShard, PackedWeight, ParamSpec
from quant.packing import pack_groups, pack_words, unpack_words
from quant.rounding import RoundedMatrix
from quant.settings import describe, read_group_size, read_integer

FIELDS = 8
FIELD_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)
"""Output 8c + o is in field `FIELD_OF_OUTPUT[o]` of word c."""
OUTPUT_OF_FIELD = (0, 2, 4, 6, 1, 3, 5, 7)
"""The inverse of `FIELD_OF_OUTPUT`."""
OLD_KEYS = {"w_bit": "bits", "q_group_size": "group_size"}
"""Keys in the quant_config.json of AutoAWQ before its settings went into config.json. That file names no format."""


@dataclasses.dataclass(frozen=True, slots=True)
class AwqMethod(LinearMethod):
    """`qweight` [k, n / 8] and `qzeros` [groups, n / 8], interleaved along the outputs; `scales` [groups, n]."""

    group_size: int

    def param_specs(self, in_features: int, out_features: int, has_bias: bool) -> dict[str, ParamSpec]:
        group_size = in_features if self.group_size == -1 else self.group_size
        if in_features % group_size or out_features % FIELDS:
            raise FormatError(
                f"a matrix of {in_features} inputs and {out_features} outputs can't have groups of {group_size}: "
                "config.json and the weights do not belong together"
            )
        num_groups = in_features // group_size
        by_group: dict[str, Any] = {"output_dim": 1, "input_dim": 0, "group_size": group_size}
        return {
            "qweight": ParamSpec((in_features, out_features // FIELDS), output_dim=1, input_dim=0, is_integer=True),
            "qzeros": ParamSpec((num_groups, out_features // FIELDS), **by_group, is_integer=True),
            "scales": ParamSpec((num_groups, out_features), **by_group),
            "bias": ParamSpec((out_features,), output_dim=0, input_dim=None, is_optional=not has_bias),
        }

    def pack(self, params: Mapping[str, torch.Tensor], shard: MatrixShard | None = None) -> PackedWeight:
        bias = params.get("bias")
        return pack_groups(
            _outputs(params["qweight"]).T.contiguous(),
            params["scales"].T.contiguous(),
            _outputs(params["qzeros"]).T,
            bits=4,
            bias=None if bias is None else bias.float(),
        )


def _outputs(words: torch.Tensor) -> torch.Tensor:
    """Unpack [rows, n / 8] words into [rows, n] fields, in the order of the outputs."""
    fields = unpack_words(words, 4, dim=1).reshape(words.shape[0], -1, FIELDS)
    return fields[:, :, list(FIELD_OF_OUTPUT)].flatten(1)


class AwqFormat:
    """Implements `quant.base.CheckpointFormat`."""

    MARKER = "qweight"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        settings = {OLD_KEYS.get(key, key): value for key, value in settings.items()}
        version = str(settings.get("version") or settings.get("checkpoint_format") or "gemm").lower()
        if version != "gemm":
            raise FormatError(f"the checkpoint is AWQ in the form {version!r}; only gemm can be loaded")
        bits = read_integer(settings, "bits", lambda value: value == 4)
        self._method = AwqMethod(read_group_size(settings))
        self.description = describe("awq", bits, self._method.group_size)

    @staticmethod
    def is_recognized(settings: Mapping[str, Any]) -> bool:
        return "w_bit" in settings

    def size_factor(self, *, is_exact: bool) -> float:
        return 1.0

    def method_for(self, module: str) -> AwqMethod:
        return self._method


def stored_tensors(matrix: RoundedMatrix) -> dict[str, torch.Tensor]:
    """The tensors of a matrix of 4 bits whose groups are in order, without a bias."""
    return {
        "qweight": _packed(matrix.q.T),
        "qzeros": _packed(matrix.zero_points.T),
        "scales": matrix.scales.T.contiguous(),
    }


def _packed(fields: torch.Tensor) -> torch.Tensor:
    """Pack [rows, n] fields into [rows, n / 8] words; the inverse of `_outputs`."""
    interleaved = fields.reshape(fields.shape[0], -1, FIELDS)[:, :, list(OUTPUT_OF_FIELD)]
    return pack_words(interleaved.flatten(1), 4, dim=1)
