"""Drafts of other lengths, and more samplings under every condition, than `tests/contract/test_drafts.py` has."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.conftest import tiny_model_dir
from tests.contract.test_drafts import CONDITIONS, ENDS, SAMPLING, check_together, check_under_condition

__all__ = ["tiny_model_dir"]


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("max_draft_tokens", [2, 4])
def test_together(tiny_model_dir: Path, max_draft_tokens: int, sampling: str) -> None:
    check_together(tiny_model_dir, max_draft_tokens, sampling)


@pytest.mark.parametrize("sampling", [name for name in SAMPLING if name not in ENDS])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_under_conditions(tiny_model_dir: Path, condition: str, sampling: str) -> None:
    check_under_condition(tiny_model_dir, condition, sampling)
