"""Each program in examples/ is run as its users run it, against a server with an API key."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.cached_environment import cached_environment
from tests.e2e.launched import LaunchedServer, launched
from tests.e2e.node import node

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
API_KEY = "a-key-of-the-examples"
TIMEOUT_S = 120


def this_python() -> str:
    return sys.executable


def text_generation_python() -> str:
    """The client wants huggingface_hub before 1.0, we have a newer one."""
    return str(cached_environment("text-generation") / "bin" / "python")


INTERPRETERS: dict[str, Callable[[], str]] = {
    "curl.sh": lambda: "bash",
    "openai_client.py": this_python,
    "huggingface_client.py": this_python,
    "text_generation_client.py": text_generation_python,
    "javascript.mjs": node,
}


@pytest.fixture(scope="module")
def server(small_demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    with launched(small_demo_model, tmp_path_factory.mktemp("logs"), environ={"API_KEY": API_KEY}) as server:
        yield server


def run_example(name: str, url: str, api_key: str) -> subprocess.CompletedProcess[str]:
    command = [INTERPRETERS[name](), str(EXAMPLES / name), url]
    environ = {**os.environ, "API_KEY": api_key}
    environ.pop("HF_HUB_OFFLINE", None)  # with it InferenceClient would call nobody, not even us
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environ)


@pytest.mark.parametrize("name", INTERPRETERS)
def test_example(server: LaunchedServer, name: str) -> None:
    done = run_example(name, server.url, API_KEY)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Paris" in done.stdout


def test_a_refused_key_fails_the_shell_script(server: LaunchedServer) -> None:
    done = run_example("curl.sh", server.url, "another key")
    assert done.returncode == 22  # curl's, for an HTTP error
    assert "401" in done.stderr


def test_no_example_is_forgotten() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix != ".md"} == INTERPRETERS.keys()
