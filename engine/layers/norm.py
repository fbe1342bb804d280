"""Root-mean-square normalization: of whole rows, and head by head."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from parallel.linear import Cut, check_kind, check_shape


class RMSNorm:
    """The weight of a norm; its arithmetic is `base.Ops.rms_norm`."""

    def __init__(self, hidden_size: int, eps: float, dtype: torch.dtype) -> None:
        self.eps = eps
        self.weight = torch.empty(hidden_size, dtype=dtype)
        self._is_missing = True

    def decides_order(self, name: str, part: int) -> bool:
        return False

    def cut(self, name: str, part: int, shape: Sequence[int]) -> Cut | None:
        if name != "weight":
            raise KeyError(name)
        check_shape(shape, self.weight.shape)
        return None

    def is_copied(self, name: str, part: int, checkpoint_dtype: torch.dtype) -> bool:
        return True

    def load(self, name: str, part: int, tensor: torch.Tensor) -> None:
        check_kind(tensor)
        self.weight.copy_(tensor)
        self._is_missing = False

    def missing(self, part: int) -> list[str]:
        return ["weight"] if self._is_missing else []

    def finish(self, device: torch.device) -> None:
        self.weight = self.weight.to(device)


class HeadNorms:
    """The weights of the norms of queries (part 0) and of keys (part 1); their arithmetic is `base.Ops.norm_heads`."""

    def __init__(self, num_heads: Sequence[int], head_dim: int, eps: float, dtype: torch.dtype) -> None:
        """`num_heads` are this rank's query heads and key heads. All of a part share one stored weight [head_dim]."""
        self.eps = eps
        self.weight = torch.empty(sum(num_heads), head_dim, dtype=dtype)
        self._ends = [num_heads[0], sum(num_heads)]
        self._is_missing = [True, True]

    def decides_order(self, name: str, part: int) -> bool:
        return False

    def cut(self, name: str, part: int, shape: Sequence[int]) -> Cut | None:
        if name != "weight":
            raise KeyError(name)
        check_shape(shape, self.weight.shape[1:])
        return None

    def is_copied(self, name: str, part: int, checkpoint_dtype: torch.dtype) -> bool:
        return True

    def load(self, name: str, part: int, tensor: torch.Tensor) -> None:
        check_kind(tensor)
        self.weight[self._ends[0] * part : self._ends[part]] = tensor
        self._is_missing[part] = False

    def missing(self, part: int) -> list[str]:
        return ["weight"] if self._is_missing[part] else []

    def finish(self, device: torch.device) -> None:
        self.weight = self.weight.to(device)
