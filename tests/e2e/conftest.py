"""The demo models, built once per machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return build_demo_model()


@pytest.fixture(scope="session")
def small_demo_model() -> Path:
    return build_demo_model("--small")


def build_demo_model(*flags: str) -> Path:
    command = [sys.executable, str(REPOSITORY / "scripts" / "demo_model.py"), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return Path(done.stdout.splitlines()[-1])
