"""The tiny models of contract tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.models import MODELS
from tests.contract.oracles import FAMILIES

PLAINEST, RICHEST = "qwen2", "qwen3_moe"


@pytest.fixture(scope="session", params=[PLAINEST, RICHEST])
def tiny_model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model in float32: one of the family without differences, one of that with the most."""
    return _write(request.param, tmp_path_factory)


@pytest.fixture(scope="session", params=[*MODELS])
def family_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of each family, in float32."""
    return _write(request.param, tmp_path_factory)


def _write(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(f"tiny-{family}")
    FAMILIES[family].write(folder)
    return folder
