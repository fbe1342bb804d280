"""Steps as programs: the calls of their kernels are recorded once, and then made by one call from Python.

The model stays as it is written, and is what a program is made of: there is nothing to keep equal by hand. Kernels know
the rows of a step by the sizes of their arrays, so one program serves any number of rows, with prompts among them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quant.kernels.arrays import observed_calls
from quant.kernels.program_cpu import Arena, NotRepeatableError, Program, Recording, Rows

logger = logging.getLogger(__name__)

MAX_PROGRAM_ROWS = 512
"""Rows for which there is an arena: larger steps take a hundred times as long as the Python between their kernels."""
MAX_RESULT_ROWS = 64
"""Rows of logits for which there is one: 39 MB with a vocabulary of 152,000."""


class StepPrograms:
    """The programs of one model, by what makes the calls of a step differ."""

    def __init__(self, max_rows: int = MAX_PROGRAM_ROWS, max_results: int = MAX_RESULT_ROWS) -> None:
        """Steps of more than `max_rows`, or with more than `max_results` of results, are computed call by call."""
        self.max_rows, self.max_results = max_rows, max_results
        self.is_off = False
        """Whether every step is computed call by call, to compare."""
        self.refusals: dict[Hashable, str] = {}
        """The steps whose calls can't be made again, by variant and which rows have results, each with the reason."""
        self.programs: dict[Hashable, Program] = {}
        self._arena = Arena()
        self._recording: Recording | None = None

    def clear(self) -> None:
        """Forget the programs: memory that they use has moved."""
        self.programs.clear()
        self.refusals.clear()

    def narrow(self) -> None:
        """`work` calls this before it goes on with the rows alone that have results."""
        if self._recording is not None:
            self._recording.narrow()

    def run(
        self, variant: Hashable, num_rows: Rows, parameters: Sequence[torch.Tensor], work: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Do `work`, or make its calls again: its result, which the next step overwrites.

        `parameters` are all memory that `work` reads or writes and that may move, the arena's aside. `num_rows` are the
        step's rows and those of them that have results. Steps of one `variant` make the same calls whatever their
        numbers of rows, if all of those have results, or some, or none.
        """
        if self.is_off or num_rows[0] > self.max_rows or num_rows[1] > self.max_results:
            return work()
        key = variant, num_rows[0] == num_rows[1], num_rows[1] > 0
        if key in self.refusals:
            return work()
        program = self.programs.get(key)
        if program is None:
            return self._record(key, num_rows, parameters, work)
        program.run(parameters, num_rows)
        assert program.result is not None
        return program.result

    def _record(
        self, key: Hashable, num_rows: Rows, parameters: Sequence[torch.Tensor], work: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        # Where all rows have results there are never more rows than that: their logits would be the largest array.
        max_rows = self.max_results if num_rows[0] == num_rows[1] else self.max_rows, self.max_results
        recording, others = Recording(self._arena, parameters, num_rows, max_rows), _Operations()
        self._recording = recording
        try:
            with others, observed_calls(recording):
                result = work()
        finally:
            self._recording = None
        try:
            refusal = recording.refusal or others.refusal
            if refusal is None:
                self.programs[key] = Program(recording, result)
        except NotRepeatableError as error:
            refusal = str(error)
        if refusal is not None:
            logger.debug("Steps are computed call by call: %s", refusal)
            self.refusals[key] = refusal
        return result


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches for operations of torch that are no views: no program has them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.refusal: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False keeps torch from importing its compiler, of hundreds of modules, when the first operation is seen."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_view = isinstance(result, torch.Tensor) and not func._schema.is_mutable
        if is_view and not result.numel():  # what is empty has no address, and nobody reads it
            return result
        if not is_view or all(result.data_ptr() != arg.data_ptr() for arg in args if isinstance(arg, torch.Tensor)):
            self.refusal = f"torch does {func.name()} between kernels"
        return result
