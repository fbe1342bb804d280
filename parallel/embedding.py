"""The vocabulary table: rows looked up at the bottom of the model, and multiplied with at the top where it is tied."""

from __future__ import annotations

import torch

from quant.base import Kernels, LinearMethod, RunningWeight


class VocabTable:
    """A `[vocab_size, hidden_size]` matrix used as embedding and, with a `head_method`, as output head too.

    Rows are looked up as they are stored; the head may run in another form of its own.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        table_method: LinearMethod,
        head_method: LinearMethod | None,
        kernels: Kernels,
    ) -> None:
        self._shape = (vocab_size, hidden_size)
        self._table_method = table_method
        self._head_method = head_method
        self._kernels = kernels
        self._weight: torch.Tensor | None = None
        self._head: RunningWeight | None = None

    def is_copied(self, name: str, part: int, checkpoint_dtype: torch.dtype) -> bool:
        """Whether loading makes a copy (rather than using the file's memory)."""
        return self._table_method.is_copied(name, checkpoint_dtype)

    def load(self, name: str, part: int, tensor: torch.Tensor) -> None:
        """Take in a checkpoint tensor. Raises KeyError for an unknown name, ValueError for a wrong shape."""
        if name != "weight":
            raise KeyError(name)
        if tuple(tensor.shape) != self._shape:
            raise ValueError(f"has shape {list(tensor.shape)}, the model needs {list(self._shape)}")
        self._weight = self._table_method.pack({"weight": tensor}).weight

    def missing(self, part: int) -> list[str]:
        """Names of tensors not loaded yet."""
        return ["weight"] if self._weight is None else []

    def finish(self, device: torch.device) -> None:
        assert self._weight is not None
        self._weight = self._weight.to(device)
        if self._head_method is not None:
            self._head = self._kernels(self._head_method.pack({"weight": self._weight}))

    def embed(self, token_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """token_ids [tokens] int64 -> [tokens, hidden_size]."""
        assert self._weight is not None
        return self._weight[token_ids].to(dtype)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [rows, hidden_size] -> [rows, vocab_size]."""
        assert self._head is not None, "this table is no head"
        return self._head(hidden)
