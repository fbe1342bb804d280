"""Numbers as TGI prints them."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.answers.json import f32


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        (-0.65478515625, b"-0.65478516"),
        (0.1, b"0.1"),
        (0.0, b"0.0"),
        (-10.0, b"-10.0"),
        (1 / 3, b"0.33333334"),
        (16777216.0, b"16777216.0"),
        (math.nan, b"null"),
        (math.inf, b"null"),
        (-math.inf, b"null"),
    ],
)
def test_f32(value: float, printed: bytes) -> None:
    assert bytes(f32(value)) == printed


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_f32_round_trips_and_is_short(value: float) -> None:
    printed = bytes(f32(value)).decode()
    assert struct.pack("<f", float(printed)) == struct.pack("<f", value)
    assert len(printed.split("e")[0].strip("-").replace(".", "").strip("0")) <= 9
