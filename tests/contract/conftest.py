"""The tiny model of contract tests: one of each family."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.models import MODELS
from tests.contract.oracles import FAMILIES


@pytest.fixture(scope="session", params=[*MODELS])
def tiny_model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of the family, in float32."""
    folder = tmp_path_factory.mktemp(f"tiny-{request.param}")
    FAMILIES[request.param].write(folder)
    return folder
