"""Servers whose standard streams were closed, each alone; `tests/e2e/test_signals.py` closes all three."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.test_signals import check_closed_streams


@pytest.mark.parametrize("redirection", ["<&-", ">&-", "2>&-"])
def test_a_closed_stream_is_no_obstacle(redirection: str, tiny_model_dir: Path) -> None:
    check_closed_streams(redirection, tiny_model_dir)
