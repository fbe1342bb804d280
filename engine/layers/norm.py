"""Root-mean-square normalization."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from parallel.linear import Cut, check_shape


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
        self.weight.copy_(tensor)
        self._is_missing = False

    def missing(self, part: int) -> list[str]:
        return ["weight"] if self._is_missing else []

    def finish(self, device: torch.device) -> None:
        self.weight = self.weight.to(device)
