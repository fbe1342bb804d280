"""The long version of tests/e2e/test_abuse.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.test_abuse import abused_server, check_abuse


@pytest.mark.timeout(1800)
def test_twenty_thousand_abusive_requests_harm_nobody(tiny_model_dir: Path, tmp_path: Path) -> None:
    with abused_server(tiny_model_dir, tmp_path) as abused:
        check_abuse(abused, 20_000)
