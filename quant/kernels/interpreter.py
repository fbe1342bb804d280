"""Triton's interpreter without what it does over and over, or for nothing, which is half the time of our kernels.

It knows Triton's inner names, and leaves alone what a version does not have. Numbers stay what they are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any


def speed_up_interpreter() -> None:
    """Change the interpreter of this process, once."""
    from triton.runtime import interpreter

    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = functools.cache(functools.partial(_patch_for_good, interpreter._patch_lang))
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _remember_dtypes(interpreter._get_np_dtype)
    options = interpreter.interpreter_builder.options
    if not getattr(options, "debug", True):  # integers are looked at for overflows, and what was found is thrown away
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _patch_for_good(patch_language: Callable[[Any], Any], function: Any) -> Any:
    """Triton gives its language the form that NumPy runs at each launch, and at each call within a kernel: 4 ms each.

    What the scope that this returns does not know is not put back.
    """
    scope = patch_language(function)
    scope._changes.clear()
    return scope


def _remember_dtypes(find_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Triton writes its table of dtypes anew to look one up. Those of blocks and pointers have no hash."""
    known = functools.cache(find_dtype)
    return lambda dtype: find_dtype(dtype) if dtype.is_block() or dtype.is_ptr() else known(dtype)
