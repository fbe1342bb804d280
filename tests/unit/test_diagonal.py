"""Cases that the default run leaves to the long one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.diagonal import diagonal, long_but


def short(cases: list[Any]) -> list[tuple[Any, ...]]:
    return [case.values for case in cases if not case.marks]


def test_each_value_of_each_axis_is_in_a_short_case() -> None:
    cases = diagonal({"one": 1, "two": 2, "three": 3}, [True, False], also=[("three", False)])
    assert short(cases) == [(1, True), (2, False), (3, True), (3, False)]
    assert [case.id for case in cases][:3] == ["one-True", "one-False", "two-True"]
    assert len(cases) == 6 and all(mark.name == "long" for case in cases for mark in case.marks)


def test_few_of_one_axis() -> None:
    assert short(long_but([3, 4, 5], 3, 5)) == [(3,), (5,)]
    assert [case.id for case in long_but({"a": 1, "b": 2}, "b")] == ["a", "b"]


def test_a_case_that_does_not_exist_is_no_case() -> None:
    with pytest.raises(AssertionError, match="no such cases"):
        diagonal([1, 2], [3], also=[(2, 4)])
    with pytest.raises(AssertionError, match="no such cases"):
        long_but([1, 2], 3)
