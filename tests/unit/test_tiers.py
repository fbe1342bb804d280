"""The tiers of the tests: which folders `make test` runs, and what the fast ones never load."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_test_is_in_a_tier() -> None:
    """`make test` runs the folders of pyproject.toml, then tests/interpreted; `make test-fast` most of tests/unit.

    `make test-slow` runs tests/slow, `make ray-test` tests/replicas, `make clients` and `make image-test` theirs.
    """
    settings = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    tiers = {*settings["testpaths"], *(f"tests/{name}" for name in "interpreted slow replicas clients image".split())}
    folders = {f"tests/{path.relative_to(TESTS).parts[0]}" for path in TESTS.rglob("test_*.py")}
    assert tiers == folders


def test_the_tests_of_the_server_load_neither_torch_nor_transformers() -> None:
    program = "import sys, tests.conftest, tests.unit.server.conftest; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=TESTS.parent, capture_output=True, text=True, check=True)
    assert {"torch", "numba", "transformers", "schemathesis"}.isdisjoint(done.stdout.split())
