"""Flags in memory that several processes share: release stores and acquire loads, for use inside `numba.njit`.

A process that has loaded a flag's new value sees everything that another one wrote before it stored the flag (C11
memory model). Numba has no such operations.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    data = context.make_array(array_type)(context, builder, value=array).data
    return builder.gep(data, [offset])


@intrinsic
def load_flag(typing_context: Any, array: Any, offset: Any) -> Any:
    """Load element `offset` of a flat int64 array."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(context, builder, sig.args[0], *args), "acquire", 8)

    return types.int64(array, types.intp), codegen


@intrinsic
def store_flag(typing_context: Any, array: Any, offset: Any, value: Any) -> Any:
    """Set element `offset` of a flat int64 array."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store_atomic(args[2], _pointer(context, builder, sig.args[0], *args[:2]), "release", 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), codegen


@intrinsic
def relax(typing_context: Any) -> Any:
    """Tell the processor that a loop is waiting."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        name = {"x86": "llvm.x86.sse2.pause"}.get(_family(builder.module.triple))
        if name is not None:
            builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), []), name), [])
        return context.get_dummy_value()

    return types.void(), codegen


def _family(triple: str) -> str:
    return "x86" if triple.split("-")[0] in ("x86_64", "i686") else "other"
