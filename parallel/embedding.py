"""The vocabulary table: its rows are looked up at the bottom of the model, and are the output head if it is tied."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from parallel.linear import Cut, check_kind, check_shape
from parallel.partition import length
from parallel.state import ParallelState
from quant.base import KernelChooser, LinearMethod, MatrixKernel


class VocabTable:
    """A `[vocab_size, hidden_size]` matrix used as embedding and, with a `head_method`, as output head too.

    Its rows are split over the ranks into `shards`. They are looked up as they are stored; the head may run in another
    form.
    """

    def __init__(
        self,
        shards: Sequence[slice],
        hidden_size: int,
        table_method: LinearMethod,
        head_method: LinearMethod | None,
        kernels: KernelChooser,
        parallel: ParallelState,
    ) -> None:
        self._shape = (shards[-1].stop, hidden_size)
        self._rows = shards[parallel.rank]
        self._table_method = table_method
        self._head_method = head_method
        self._kernels = kernels
        self._parallel = parallel
        self._weight: torch.Tensor | None = None
        self._head: MatrixKernel | None = None

    def decides_order(self, name: str, part: int) -> bool:
        return False

    def cut(self, name: str, part: int, shape: Sequence[int]) -> Cut | None:
        """The part of the tensor `name`, stored in `shape`, that this rank needs; None: all of it.

        Raises KeyError for an unknown name, ValueError for a wrong shape.
        """
        if name != "weight":
            raise KeyError(name)
        check_shape(shape, self._shape)
        return (0, self._rows) if length(self._rows) < self._shape[0] else None

    def is_copied(self, name: str, part: int, checkpoint_dtype: torch.dtype) -> bool:
        """Whether loading makes a copy (rather than using the file's memory)."""
        return self._table_method.is_copied(name, checkpoint_dtype)

    def load(self, name: str, part: int, tensor: torch.Tensor) -> None:
        """Take in the `cut` of a checkpoint tensor. Raises ValueError for one that can't be used."""
        check_kind(tensor)
        self._weight = self._table_method.pack({"weight": tensor}).weight

    def missing(self, part: int) -> list[str]:
        """Names of tensors not loaded yet."""
        return ["weight"] if self._weight is None else []

    def finish(self, device: torch.device) -> None:
        """Move to the device and choose the head's kernel. Raises ValueError."""
        assert self._weight is not None
        self._weight = self._weight.to(device)
        if self._head_method is not None:
            self._head = self._kernels(self._head_method.pack({"weight": self._weight}))

    @property
    def weight(self) -> torch.Tensor:
        """This rank's rows, as they are stored."""
        assert self._weight is not None
        return self._weight

    def embed(self, token_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """token_ids [tokens] int64 -> [tokens, hidden_size]."""
        assert self._weight is not None
        if self._parallel.size == 1:
            return self._weight[token_ids].to(dtype)
        rows = token_ids - self._rows.start
        is_elsewhere = (rows < 0) | (rows >= self._weight.shape[0])
        embedded = self._weight[rows.masked_fill(is_elsewhere, 0)].to(dtype)
        return self._parallel.all_reduce(embedded.masked_fill_(is_elsewhere[:, None], 0))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [rows, hidden_size] -> [rows, this rank's part of the vocabulary]."""
        assert self._head is not None, "this table is no head"
        return self._head(hidden)
