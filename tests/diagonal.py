"""Cases of which the default run has few that prove the same, and `make test-slow` all the others (marker `long`).

    @pytest.mark.parametrize("family", long_but(FAMILIES, "qwen2", "qwen3_moe"))
    @pytest.mark.parametrize(("layout", "dtype"), diagonal(LAYOUTS, [torch.float32, torch.bfloat16]))

Both give `pytest.param`s, for a fixture's `params`, too. An axis is a list, or a dictionary whose keys name the cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from _pytest.mark import ParameterSet

Axis = Iterable[Any] | Mapping[str, Any]


def diagonal(*axes: Axis, also: Iterable[tuple[Any, ...]] = ()) -> list[ParameterSet]:
    """The product of `axes`: a case for each value of each axis, and those of `also`; the others are long.

    Case `k` has the values `k % len(axis)`. `also` names cases by the values of their axes (keys of dictionaries), for
    pairs of values that must meet in the default run.
    """
    named = [_named(axis) for axis in axes]
    length = max(map(len, named))
    few = {tuple(axis[index % len(axis)][0] for axis in named) for index in range(length)}
    few |= {tuple(map(str, case)) for case in also}
    cases = [([name for name, _ in case], [value for _, value in case]) for case in itertools.product(*named)]
    unknown = few - {tuple(names) for names, _ in cases}
    assert not unknown, f"no such cases: {unknown}"
    return [_case(values, "-".join(names), tuple(names) in few) for names, values in cases]


def long_but(axis: Axis, *few: Any) -> list[ParameterSet]:
    """A case for each value; all but those of `few` (keys of a dictionary) are long."""
    named, names = _named(axis), {*map(str, few)}
    assert names <= {name for name, _ in named}, f"no such cases: {names}"
    return [_case([value], name, name in names) for name, value in named]


def _named(axis: Axis) -> list[tuple[str, Any]]:
    """Names and values."""
    return [*axis.items()] if isinstance(axis, Mapping) else [(str(value), value) for value in axis]


def _case(values: list[Any], name: str, is_short: bool) -> ParameterSet:
    return pytest.param(*values, id=name, marks=() if is_short else pytest.mark.long)
