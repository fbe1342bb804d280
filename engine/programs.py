"""Steps of few rows as programs: the calls of their kernels are recorded once, and then made by one call from Python.

The model stays as it is written, and is what a program is made of: there is nothing to keep equal by hand. Steps with
the same numbers of rows and of parts of attention make the same calls, on other memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.layers.base import FEW_ROWS
from quant.kernels.arrays import observed_calls
from quant.kernels.program_cpu import Arena, Program, Recording

logger = logging.getLogger(__name__)

MAX_PROGRAMS = 64


class StepPrograms:
    """The programs of one model, by what makes the calls of a step differ."""

    def __init__(self) -> None:
        self.is_off = False
        """Whether every step is computed call by call: because the model's can't be repeated, or to compare."""
        self._arena = Arena(FEW_ROWS)
        self._programs: dict[Hashable, tuple[Program, torch.Tensor] | None] = {}

    def clear(self) -> None:
        """Forget the programs: memory that they use has moved."""
        self._programs.clear()

    def run(
        self, num_rows: int, variant: Hashable, parameters: Sequence[torch.Tensor], work: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Do `work`, or make its calls again: its result, which the next step overwrites.

        `parameters` are all memory that `work` reads or writes and that may move, the arena's aside. Steps of
        as many rows and of the same `variant` make the same calls. They are recorded when they come a second time.
        """
        key = num_rows, variant
        if self.is_off or num_rows > FEW_ROWS:
            return work()
        if key not in self._programs:
            self._note(key, None)
            return work()
        known = self._programs[key]
        if known is None:
            return self._record(key, parameters, work)
        program, result = known
        program.run(parameters)
        return result

    def _record(
        self, key: Hashable, parameters: Sequence[torch.Tensor], work: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        recording, others = Recording(self._arena, parameters), _Operations()
        with others, observed_calls(recording):
            result = work()
        if refusal := recording.refusal or others.refusal:
            logger.debug("Steps are computed call by call: %s", refusal)
            self.is_off = True
        else:
            self._note(key, (Program(recording), self._arena.alias(result)))
        return result

    def _note(self, key: Hashable, entry: tuple[Program, torch.Tensor] | None) -> None:
        self._programs.pop(key, None)
        if len(self._programs) >= MAX_PROGRAMS:
            del self._programs[next(iter(self._programs))]
        self._programs[key] = entry


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
        if not is_view or all(result.data_ptr() != arg.data_ptr() for arg in args if isinstance(arg, torch.Tensor)):
            self.refusal = f"torch does {func.name()} between kernels"
        return result
