"""The tiny models of contract tests, and the devices of those that start an engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import engine.start
from engine.models import MODELS
from tests.contract.harness import KERNELS, REFERENCES
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


@pytest.fixture(params=["kernels", "torch"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engines start on the CPU with its kernels, then with the reference implementations of all."""
    chosen = KERNELS if request.param == "kernels" else dataclasses.replace(REFERENCES, matrices="torch")
    monkeypatch.setattr(engine.start, "detect_device", lambda local_rank, name: chosen)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engines start on the CPU with its kernels."""
    monkeypatch.setattr(engine.start, "detect_device", lambda local_rank, name: KERNELS)


def _write(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(f"tiny-{family}")
    FAMILIES[family].write(folder)
    return folder
