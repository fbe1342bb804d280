"""Programs: recorded calls of compiled functions, made again by one call from Python.

Between two kernels of a step Python takes longer than some kernels do: it makes views of tensors and Numba looks at the
type of each argument. A program has taken the arguments apart already. It keeps them as 64-bit words, as Numba passes
them to its own functions, and walks over a list of functions and their words.

What differs from step to step is a parameter, an array whose address and sizes are put in before each run, or the
number of rows. Kernels get that only as the sizes of arrays, so a program for any number of rows knows which sizes grow
with it. All arrays that are made while calls are recorded have as many rows as the step, or a multiple, until the
recording is told that those that follow have as many as the step has results.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from typing import Any

import llvmlite.ir as ir
import numpy as np
import numpy.typing as npt
import torch
from numba.core import cgutils, types
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from quant.kernels.arrays import flat_view, new_rows

Array = npt.NDArray[Any]
Words = npt.NDArray[np.int64]

I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
WORDS = I64.as_pointer()
SIZE_WORDS = 2, 5
"""Places of the two sizes among the words of a flat array: numbers in all, and along its only dimension."""
CALL_WORDS = 3
"""Words of a call: the function that passes the words on, the kernel, the address of its words."""


class NotRepeatableError(Exception):
    """Calls that can't be made again; the text says why."""


def words_of(value: Any) -> list[int]:
    """An argument as Numba passes it: an array without an owner, a tuple as its members. Raises NotRepeatableError."""
    if isinstance(value, np.ndarray):
        return [0, 0, value.size, value.itemsize, value.ctypes.data, *value.shape, *value.strides]
    if isinstance(value, tuple):
        return [word for member in value for word in words_of(member)]
    if isinstance(value, np.float32):
        return [int(value.view(np.uint32))]
    if isinstance(value, int):
        return [value]
    raise NotRepeatableError(f"an argument is of type {type(value).__name__}")


def array_of(tensor: torch.Tensor) -> Array:
    """The memory of a tensor in its shape, as `flat_view` gives it flat."""
    return flat_view(tensor).reshape(tensor.shape)


def arrays_of(arguments: tuple[Any, ...], first: int = 0) -> list[tuple[int, Array]]:
    """The arrays among arguments, each with the place of its words."""
    found: list[tuple[int, Array]] = []
    for value in arguments:
        if isinstance(value, np.ndarray):
            found.append((first, value))
        elif isinstance(value, tuple):
            found += arrays_of(value, first)
        first += len(words_of(value))
    return found


Rows = tuple[int, int]
"""How many rows a step has, and how many of them have results."""


class Arena:
    """Memory for what kernels write while calls are recorded. It outlives its arrays, and their successors share it.

    Calls that are made again in the same order find every array as it was when they were recorded. Programs that are
    never run at once may share an arena.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, int], list[Array]] = {}
        self._memory: dict[int, Array] = {}
        """By address."""

    def new_array(self, num_rows: int, size: int, max_rows: int) -> Array:
        """An uninitialised float32 array [num_rows, size], whose memory is free again once nobody holds it.

        The memory, which `new_rows` makes, has `max_rows`. Those that nobody has written take none.
        """
        free = self._free.setdefault((max_rows, size), [])
        if not free:
            free.append(new_rows(max_rows, size))
            self._memory[free[-1].ctypes.data] = free[-1]
        memory = free.pop()
        # By way of a buffer: a view of a view holds what owns the memory, and all views of it shall hold `whole`.
        whole = np.frombuffer(memory.data, np.float32, num_rows * size)
        weakref.finalize(whole, free.append, memory).atexit = False
        return whole.reshape(num_rows, size)

    def memory_at(self, address: int) -> Array | None:
        """All memory [max_rows, size] of the array that begins there, which others may get once nobody holds that."""
        return self._memory.get(address)

    def owns(self, address: int) -> bool:
        """Whether any of the arena's memory has this address."""
        return any(first <= address < first + memory.nbytes for first, memory in self._memory.items())


class Recording:
    """The calls of one block; implements `arrays.CallObserver`. It keeps no argument alive."""

    def __init__(self, arena: Arena, parameters: Sequence[torch.Tensor], num_rows: Rows, max_rows: Rows) -> None:
        """`num_rows` are those of the step whose calls are recorded, `max_rows` the most of any that will make them."""
        self.arena = arena
        self._max_rows = max_rows
        self.parameters = list(parameters)
        self.num_rows = num_rows
        self.uses: list[dict[bool, list[int]]] = [{False: [], True: []} for _ in parameters]
        """Places of each parameter among `words`: where it has its shape, where it is flat."""
        self.sizes: list[tuple[int, int, int]] = []
        """The place of each array that grows with the rows, its numbers in a row, which of `num_rows` it has."""
        self.words: list[int] = []
        self.calls: list[tuple[str, int, int, int]] = []
        """The kernel's name, the addresses of its passer and of itself, the place of its words."""
        self.refusal: str | None = None
        """The reason why the calls can't be made again."""
        self._forms = [(array_of(tensor), flat_view(tensor)) for tensor in parameters]
        self._kind = 0
        self._made: dict[int, tuple[int, int | None]] = {}
        """By address, bytes of the array that was made there last, and which of `num_rows` it has; None: neither."""

    def narrow(self) -> None:
        """Let arrays that are made from now on have as many rows as the step has results."""
        self._kind = 1

    def new_array(self, num_rows: int | None, size: int) -> Array:
        kind, rows = self._kind, self.num_rows[self._kind]
        if num_rows is None:
            array = self.arena.new_array(1, size, 1)
            self._made[array.ctypes.data] = array.nbytes, None
            return array
        if not num_rows:
            return new_rows(0, size)
        if not rows or num_rows % rows:
            self.refusal = f"an array has {num_rows} rows in a step of {rows}"
            return new_rows(num_rows, size)
        array = self.arena.new_array(num_rows, size, num_rows // rows * self._max_rows[kind])
        self._made[array.ctypes.data] = array.nbytes, kind
        return array

    def kind_of(self, address: int) -> int | None:
        """Which of `num_rows` the array has that was made there; None: no array, or one that does not grow."""
        return self._made.get(address, (0, None))[1]

    def take(self, kernel: Any, arguments: tuple[Any, ...]) -> None:
        try:
            self._take(kernel, arguments)
        except NotRepeatableError as error:  # the block goes on
            self.refusal = str(error)

    def _take(self, kernel: Any, arguments: tuple[Any, ...]) -> None:
        signature, address = _compiled(kernel, arguments)
        first = len(self.words)
        for place, array in arrays_of(arguments, first):
            if array.size:  # nobody reads what is empty
                self._note_use(place, array)
        self.words += words_of(arguments)
        self.calls.append((kernel.__name__, _passer(signature)[1], address, first))

    def _note_use(self, place: int, array: Array) -> None:
        address = array.ctypes.data
        if address in self._made:
            self._note_size(place, array, *self._made[address])
        elif self.arena.owns(address):
            raise NotRepeatableError("a kernel gets a part of an array that grows with the rows")
        else:
            self._note_parameter(place, array)

    def _note_size(self, place: int, array: Array, num_bytes: int, kind: int | None) -> None:
        if kind is None:
            return
        size, rest = divmod(array.size, self.num_rows[kind])
        if array.ndim != 1 or array.nbytes != num_bytes or rest:
            raise NotRepeatableError("a kernel gets an array that grows with the rows, and not flat or not all of it")
        self.sizes.append((place, size, kind))

    def _note_parameter(self, place: int, array: Array) -> None:
        address, words = array.ctypes.data, words_of(array)
        for uses, (shaped, flat) in zip(self.uses, self._forms, strict=True):
            if shaped.ctypes.data <= address < shaped.ctypes.data + shaped.nbytes:
                is_flat = words == words_of(flat)
                if not is_flat and words != words_of(shaped):
                    raise NotRepeatableError("a kernel gets a part of what changes from step to step")
                uses[is_flat].append(place)


class Program:
    """Recorded calls. Memory that is no parameter must stay where it is as long as the program is used."""

    def __init__(self, recording: Recording, result: torch.Tensor | None = None) -> None:
        """`result` is what the calls make, an array of the arena's; None: nobody asks for it.

        Raises NotRepeatableError for any other result.
        """
        self.names = [name for name, *_ in recording.calls]
        """The kernels' names, in order."""
        self._words = np.array(recording.words, np.int64)
        start = self._words.ctypes.data
        rows = [(passer, kernel, start + self._words.itemsize * place) for _, passer, kernel, place in recording.calls]
        self._calls = np.array(rows, np.int64).reshape(-1, CALL_WORDS)
        self._calls_address = self._calls.ctypes.data
        self._parameters = recording.parameters
        self._uses = [
            [(is_flat, _word_places(places, 1 if is_flat else parameter.dim())) for is_flat, places in uses.items()]
            for parameter, uses in zip(recording.parameters, recording.uses, strict=True)
        ]
        places, sizes, kinds = np.array(recording.sizes, np.int64).reshape(-1, 3).T
        self._size_places = places[:, None] + np.array(SIZE_WORDS)
        self._sizes, self._kinds = sizes, kinds
        self._num_rows = recording.num_rows
        self.result = result
        """What the last run has made. The next one writes over it."""
        self._result = None if result is None or not len(result) else _result_memory(recording, result)
        """All memory of the result, and which of the numbers of rows it has; None: it has no rows."""
        if self._result is not None and result is not None:
            self.result = self._result[0][: len(result)]  # which does not hold the array

    def run(self, parameters: Sequence[torch.Tensor], num_rows: Rows, stamps: Words | None = None) -> None:
        """Make the calls. `parameters` have the dtypes and dimensions of those that were recorded.

        `stamps` [calls + 1] gets the processor's count of cycles before each call and after the last one.
        """
        for index, parameter in enumerate(parameters):
            if parameter is not self._parameters[index]:
                self._put(index, parameter)
        if num_rows != self._num_rows:
            self._resize(num_rows)
        address = 0 if stamps is None else stamps.ctypes.data
        if _walker()[1](self._calls_address, len(self._calls), address):
            raise MemoryError("a kernel found no memory")  # the only thing for which one raises

    def _resize(self, num_rows: Rows) -> None:
        """Let the calls be those of a step of so many rows."""
        self._num_rows = num_rows
        self._words[self._size_places] = (self._sizes * np.array(num_rows)[self._kinds])[:, None]
        if self._result is not None:
            memory, kind = self._result
            self.result = memory[: num_rows[kind]]

    def _put(self, index: int, parameter: torch.Tensor) -> None:
        """Let the calls take another tensor."""
        self._parameters[index] = parameter
        for is_flat, places in self._uses[index]:
            if len(places):
                self._words[places] = words_of(flat_view(parameter) if is_flat else array_of(parameter))


def _result_memory(recording: Recording, result: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The memory [max_rows, size] of what calls made, and which of `num_rows` it has. Raises NotRepeatableError."""
    address = result.data_ptr()
    memory, kind = recording.arena.memory_at(address), recording.kind_of(address)
    if memory is None or kind is None or result.shape != (recording.num_rows[kind], memory.shape[1]):
        raise NotRepeatableError("the result is no array that a kernel has written")
    return torch.from_numpy(memory), kind


def _word_places(starts: list[int], num_dimensions: int) -> Words:
    """Places [arrays, words] of the words of arrays of so many dimensions, which begin at `starts`."""
    num_words = len(words_of(np.empty((0,) * num_dimensions)))
    return np.array(starts, np.int64)[:, None] + np.arange(num_words)


def _compiled(kernel: Any, arguments: tuple[Any, ...]) -> tuple[tuple[types.Type, ...], int]:
    """The types for which a kernel that was called so is compiled, and its address."""
    if not hasattr(kernel, "overloads"):
        raise NotRepeatableError(f"{kernel.__name__} is no compiled function, so there is no version of it")
    signature = tuple(kernel.typeof_pyval(argument) for argument in arguments)
    result = kernel.overloads.get(signature)
    if result is None or result.signature.return_type != types.none:
        raise NotRepeatableError(f"{kernel.__name__} has no version for exactly these types, or returns something")
    return signature, result.library.get_pointer_to_function(result.fndesc.llvm_func_name)


@functools.cache
def _passer(signature: tuple[types.Type, ...]) -> tuple[Any, int]:
    """A function (kernel, words) -> status, which calls the kernel with its arguments; what keeps it, its address."""
    context = cpu_target.target_context
    kind = context.call_conv.get_function_type(types.none, signature)

    def write(builder: ir.IRBuilder, kernel: Any, words: Any) -> Any:
        arguments = []
        for index, argument in enumerate(kind.args[2:]):
            place = builder.gep(builder.inttoptr(words, WORDS), [ir.Constant(I64, index)])
            arguments.append(builder.load(builder.bitcast(place, argument.as_pointer())))
        result, error = (cgutils.alloca_once(builder, pointer.pointee) for pointer in kind.args[:2])
        return builder.call(builder.inttoptr(kernel, kind.as_pointer()), [result, error, *arguments])

    function: tuple[Any, int] = _function("pass_words", 2, write)
    return function


@functools.cache
def _walker() -> tuple[Any, Any]:
    """A function (calls, number of calls, stamps) -> status; it stops at the first call that fails."""
    passer = ir.FunctionType(I32, [I64, I64])
    counter = ir.FunctionType(I64, [])

    def write(builder: ir.IRBuilder, calls: Any, count: Any, stamps: Any) -> Any:
        read = cgutils.get_or_insert_function(builder.module, counter, "llvm.readcyclecounter")
        rows, marks = builder.inttoptr(calls, WORDS), builder.inttoptr(stamps, WORDS)
        is_stamped = builder.icmp_unsigned("!=", stamps, ir.Constant(I64, 0))
        status = cgutils.alloca_once_value(builder, ir.Constant(I32, 0))

        def stamp(index: Any) -> None:
            with builder.if_then(is_stamped):
                builder.store(builder.call(read, []), builder.gep(marks, [index]))

        with cgutils.for_range(builder, count) as loop:
            stamp(loop.index)
            first = builder.mul(loop.index, ir.Constant(I64, CALL_WORDS))
            places = [builder.add(first, ir.Constant(I64, offset)) for offset in range(CALL_WORDS)]
            function, kernel, words = (builder.load(builder.gep(rows, [place])) for place in places)
            failed = builder.call(builder.inttoptr(function, passer.as_pointer()), [kernel, words])
            with builder.if_then(builder.icmp_unsigned("!=", failed, ir.Constant(I32, 0))):
                builder.store(failed, status)
                loop.do_break()
        stamp(count)
        return builder.load(status)

    library, address = _function("walk", 3, write)
    return library, ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(address)


@global_compiler_lock
def _function(name: str, num_arguments: int, write: Any) -> tuple[Any, int]:
    """Compile a function of integers that returns a status; the library that keeps it, and its address."""
    library = cpu_target.target_context.codegen().create_library(name)
    module = library.create_ir_module(name)
    name = f"{name}_{id(library)}"  # unique in this process: libraries are never let go
    function = ir.Function(module, ir.FunctionType(I32, [I64] * num_arguments), name)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    builder.ret(write(builder, *function.args))
    library.add_ir_module(module)
    library.finalize()
    return library, library.get_pointer_to_function(name)
