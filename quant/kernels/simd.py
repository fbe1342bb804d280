"""Eight or sixteen float32 lanes as Numba types, so that a CPU kernel states its registers and its order of additions.

LLVM's own vectorizer may split a sum differently for every shape of loop; with explicit lanes every kernel adds in the
order that is written, so a row's result is bitwise the same whatever else is in the batch. LLVM lowers the lanes to
what the machine has: eight are one AVX register or two NEON ones, sixteen are one of AVX-512 or two of AVX. Functions
that get no lanes make eight, or sixteen where 16 is in their name.

All functions work inside `numba.njit` only. Memory is addressed as a flat C-contiguous array and an element offset;
nothing is bounds-checked. Stored types: float32, uint16 holding bfloat16 bits, int16 holding float16 bits (Numba has no
16-bit floats on a CPU).
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import config, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, models, register_model

LANES = 8

F32 = ir.FloatType()
I32 = ir.IntType(32)
I8_LANES = ir.VectorType(ir.IntType(8), LANES)


def enabled_features() -> set[str]:
    """LLVM's names of what Numba compiles for: what the machine has, or NUMBA_CPU_FEATURES."""
    features = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    return {feature.removeprefix("+") for feature in features.split(",") if feature.startswith("+")}


HAS_AVX512 = "avx512f" in enabled_features()
"""Whether there are 32 registers of sixteen lanes; elsewhere on x86 there are 16 of eight."""


class LanesType(types.Type):  # type: ignore[misc]
    """Numba's name for so many float32 lanes."""

    def __init__(self, count: int) -> None:
        self.count = count
        super().__init__(name=f"f32x{count}")


lanes, lanes16 = LanesType(LANES), LanesType(16)


@register_model(LanesType)
class LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _floats(fe_type.count))


def _floats(count: int) -> ir.VectorType:
    return ir.VectorType(F32, count)


def _integers(value: int, count: int = LANES) -> ir.Constant:
    return ir.Constant(ir.VectorType(I32, count), [value] * count)


def spread(builder: Any, value: Any, count: int) -> Any:
    """A number in every one of `count` lanes."""
    undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    single = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(single, undefined, _integers(0, count))


def array_data(context: Any, builder: Any, signature: Any, args: Any, index: int) -> Any:
    """The typed pointer to the elements of the array that is argument `index` of an intrinsic."""
    return context.make_array(signature.args[index])(context, builder, value=args[index]).data


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, vector: ir.VectorType) -> Any:
    data = context.make_array(array_type)(context, builder, value=array).data
    return builder.bitcast(builder.gep(data, [offset]), vector.as_pointer())


def vector_call(builder: Any, name: str, *operands: Any) -> Any:
    """LLVM's own function `name` on vectors of floats."""
    vector = operands[0].type
    signature = ir.FunctionType(vector, [vector] * len(operands))
    full_name = f"llvm.{name}.v{vector.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, full_name), operands)


def _make_zeros(result: LanesType) -> Any:
    @intrinsic
    def zeros(typing_context: Any) -> Any:
        return result(), lambda context, builder, sig, args: ir.Constant(_floats(result.count), None)

    return zeros


def _make_splat(result: LanesType) -> Any:
    @intrinsic
    def splat(typing_context: Any, value: Any) -> Any:
        """The float32 `value` in every lane."""
        return result(types.float32), lambda context, builder, sig, args: spread(builder, args[0], result.count)

    return splat


def lanes_at(builder: Any, data: Any, dtype: Any, offset: Any, count: int, width: int) -> Any:
    """Elements `offset .. offset + count` of a typed pointer, widened exactly to float32; zeros fill up to `width`."""
    single = {types.float32: F32, types.int16: ir.HalfType(), types.uint16: ir.IntType(16)}[dtype]
    stored = ir.VectorType(single, count)
    value = builder.load(builder.bitcast(builder.gep(data, [offset]), stored.as_pointer()))
    value.align = dtype.bitwidth // 8
    if count < width:
        index = ir.Constant(ir.VectorType(I32, width), [min(i, count) for i in range(width)])
        value = builder.shuffle_vector(value, ir.Constant(stored, None), index)
    if dtype == types.int16:
        return builder.fpext(value, _floats(width))
    if dtype == types.uint16:  # bfloat16 is the upper half of a float32
        sixteen = _integers(16, width)
        return builder.bitcast(builder.shl(builder.zext(value, sixteen.type), sixteen), _floats(width))
    return value


def _make_load(result: LanesType) -> Any:
    @intrinsic
    def load(typing_context: Any, array: Any, offset: Any) -> Any:
        """Elements from `offset` on of a flat array, one for each lane, widened exactly to float32."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = array_data(context, builder, sig, args, 0)
            return lanes_at(builder, data, sig.args[0].dtype, args[1], result.count, result.count)

        return result(array, types.intp), codegen

    return load


zeros, zeros16 = _make_zeros(lanes), _make_zeros(lanes16)
splat, splat16 = _make_splat(lanes), _make_splat(lanes16)
load, load16 = _make_load(lanes), _make_load(lanes16)


def _first_bytes(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    """Eight bytes of a flat 8-bit array."""
    value = builder.load(_pointer(context, builder, array_type, array, offset, I8_LANES))
    value.align = 1
    return value


def widened_bytes(builder: Any, value: Any, dtype: Any) -> Any:
    """A vector of int8 as float32, or, where the stored type is uint8, of 8-bit floats (e4m3) as float32 / 256.

    Such a float has four bits of exponent, in the place where a float16 has the lower four of its five. A float16 whose
    exponent has so many bits less stands for 2^-8 of it, its subnormals included.
    """
    count = value.type.count
    if dtype == types.int8:
        return builder.sitofp(builder.sext(value, ir.VectorType(I32, count)), _floats(count))
    halves = ir.VectorType(ir.IntType(16), count)
    shifted = builder.shl(builder.sext(value, halves), ir.Constant(halves, [7] * count))
    bits = builder.and_(shifted, ir.Constant(halves, [0xBFFF] * count))
    return builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), count)), _floats(count))


@intrinsic
def load_int8(typing_context: Any, array: Any, offset: Any) -> Any:
    """Elements `offset .. offset + 8` of a flat int8 array as float32; of a uint8 array see `widened_bytes`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = _first_bytes(context, builder, sig.args[0], args[0], args[1])
        return widened_bytes(builder, value, sig.args[0].dtype)

    return lanes(array, types.intp), codegen


@intrinsic
def load_int4_low(typing_context: Any, array: Any, offset: Any) -> Any:
    """The lower halves of bytes `offset .. offset + 8` of a flat uint8 array, 0 to 15, as float32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = builder.zext(_first_bytes(context, builder, sig.args[0], args[0], args[1]), _integers(0).type)
        return builder.sitofp(builder.and_(value, _integers(15)), _floats(LANES))

    return lanes(array, types.intp), codegen


@intrinsic
def load_int4_high(typing_context: Any, array: Any, offset: Any) -> Any:
    """The upper halves of bytes `offset .. offset + 8` of a flat uint8 array, 0 to 15, as float32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = builder.zext(_first_bytes(context, builder, sig.args[0], args[0], args[1]), _integers(0).type)
        return builder.sitofp(builder.lshr(value, _integers(4)), _floats(LANES))

    return lanes(array, types.intp), codegen


@intrinsic
def load_one(typing_context: Any, array: Any, offset: Any) -> Any:
    """One element of a flat float32 array."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(builder.gep(array_data(context, builder, sig, args, 0), [args[1]]))

    return types.float32(array, types.intp), codegen


def prefetch_at(builder: Any, data: Any, offset: Any, *, is_near: bool = False, is_written: bool = False) -> None:
    """Ask for the cache line of an element of a typed pointer, into the L2 cache, or the L1; harmless past the end.

    `is_written`: the line will be written, so that no other core should keep it.
    """
    byte = ir.IntType(8).as_pointer()
    signature = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    address = builder.bitcast(builder.gep(data, [offset]), byte)
    how = int(is_written), 3 if is_near else 2, 1
    builder.call(function, [address, *(ir.Constant(I32, value) for value in how)])


def next_tile_part(builder: Any, place: Any, size: Any, part: Any, parts: Any, line: int) -> tuple[Any, Any]:
    """Where one `part` of `parts` of the `size` weights behind those at `place` begins, and the step from line to line.

    All numbers are in elements. `line` is a cache line's, or less: the step is for as many lines as the weights have of
    those. With several parts a line is asked for more than once.
    """
    start = builder.add(builder.add(place, size), builder.mul(part, builder.sdiv(size, parts)))
    return start, builder.sdiv(ir.Constant(parts.type, line), parts)


@intrinsic
def prefetch(typing_context: Any, array: Any, offset: Any) -> Any:
    """Ask for the cache line of an element, into the L2 cache; harmless past the end."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = array_data(context, builder, sig, args, 0)
        prefetch_at(builder, data, args[1])
        return context.get_dummy_value()

    return types.none(array, types.intp), codegen


def bfloat16_bits(builder: Any, value: Any) -> Any:
    """Every lane of a vector of float32 as the bits of the nearest bfloat16; ties go to the even one."""
    count = value.type.count
    sixteen, one, below_half, nan = (_integers(number, count) for number in (16, 1, 0x7FFF, 0x7FC0))
    bits = builder.bitcast(value, sixteen.type)
    is_odd = builder.and_(builder.lshr(bits, sixteen), one)
    rounded = builder.lshr(builder.add(bits, builder.add(is_odd, below_half)), sixteen)
    is_number = builder.fcmp_ordered("ord", value, value)
    return builder.trunc(builder.select(is_number, rounded, nan), ir.VectorType(ir.IntType(16), count))


@intrinsic
def store(typing_context: Any, array: Any, offset: Any, value: Any) -> Any:
    """Write lanes to a flat float32 or bfloat16 (as uint16) array, rounding to the nearest, ties to even."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        dtype = sig.args[0].dtype
        stored = bfloat16_bits(builder, args[2]) if dtype == types.uint16 else args[2]
        written = builder.store(stored, _pointer(context, builder, sig.args[0], args[0], args[1], stored.type))
        written.align = dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.none(array, types.intp, value), codegen


@intrinsic
def fma(typing_context: Any, x: Any, y: Any, z: Any) -> Any:
    """`x * y + z`, rounded once."""
    return x(x, y, z), lambda context, builder, sig, args: vector_call(builder, "fma", *args)


@intrinsic
def multiply(typing_context: Any, x: Any, y: Any) -> Any:
    return x(x, y), lambda context, builder, sig, args: builder.fmul(*args)


@intrinsic
def divide(typing_context: Any, x: Any, y: Any) -> Any:
    return x(x, y), lambda context, builder, sig, args: builder.fdiv(*args)


@intrinsic
def subtract(typing_context: Any, x: Any, y: Any) -> Any:
    return x(x, y), lambda context, builder, sig, args: builder.fsub(*args)


@intrinsic
def add(typing_context: Any, x: Any, y: Any) -> Any:
    return x(x, y), lambda context, builder, sig, args: builder.fadd(*args)


@intrinsic
def max_of(typing_context: Any, x: Any, y: Any) -> Any:
    """The larger of each pair of lanes; y where either is NaN."""
    return x(x, y), lambda context, builder, sig, args: larger(builder, *args)


@intrinsic
def first_lanes(typing_context: Any, count: Any, value: Any, other: float) -> Any:
    """Lanes with an index below `count` from `value`, the rest from the float32 `other`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        num_lanes = args[1].type.count
        counts = spread(builder, builder.trunc(args[0], I32), num_lanes)
        is_first = builder.icmp_signed("<", ir.Constant(counts.type, list(range(num_lanes))), counts)
        return builder.select(is_first, args[1], spread(builder, args[2], num_lanes))

    return value(types.intp, value, types.float32), codegen


def _fold(builder: Any, value: Any, combine: Any) -> Any:
    """Halve the vector until one lane is left: a fixed tree, so the rounding never changes."""
    width = value.type.count
    while width > 1:
        width //= 2
        undefined = ir.Constant(value.type, ir.Undefined)
        index = ir.VectorType(I32, width)
        low = builder.shuffle_vector(value, undefined, ir.Constant(index, list(range(width))))
        high = builder.shuffle_vector(value, undefined, ir.Constant(index, list(range(width, 2 * width))))
        value = combine(low, high)
    return builder.extract_element(value, ir.Constant(I32, 0))


def fold_sum(builder: Any, value: Any) -> Any:
    """The sum of all lanes."""
    return _fold(builder, value, builder.fadd)


@intrinsic
def sum_lanes(typing_context: Any, value: Any) -> Any:
    return types.float32(value), lambda context, builder, sig, args: fold_sum(builder, args[0])


def larger(builder: Any, x: Any, y: Any) -> Any:
    """The larger of two numbers, or of each pair of lanes; y where x is NaN."""
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def fold_max(builder: Any, value: Any) -> Any:
    """The largest of all lanes."""
    return _fold(builder, value, lambda low, high: larger(builder, low, high))


@intrinsic
def max_lanes(typing_context: Any, value: Any) -> Any:
    return types.float32(value), lambda context, builder, sig, args: fold_max(builder, args[0])
