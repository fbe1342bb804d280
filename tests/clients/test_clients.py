"""More clients than CI runs, each with the real demo model: what they ask, they get. `make clients` runs them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cached_environment import cached_environment
from tests.e2e.conftest import build_demo_model
from tests.e2e.launched import LaunchedServer, launched
from tests.e2e.node import node, node_packages

PROGRAMS = Path(__file__).parent / "programs"
SILENT = {"HAYSTACK_TELEMETRY_ENABLED": "False", "CREWAI_DISABLE_TELEMETRY": "true", "OTEL_SDK_DISABLED": "true"}
"""Clients report to nobody."""


@dataclasses.dataclass(frozen=True)
class Client:
    """A program, the environment that it lives in, and how much of each kind it reports."""

    environment: str
    chats: int
    calls: int = 0
    people: int = 0
    answers: int = 0


CLIENTS = {
    "llama_index": Client("agents", chats=2, calls=2, people=2, answers=1),
    "haystack": Client("agents", chats=3, calls=2, people=1, answers=1),
    "smolagents": Client("agents", chats=4, calls=2, people=1, answers=1),
    "langgraph": Client("agents", chats=2, calls=1, people=1, answers=1),
    "dspy": Client("dspy", chats=3, people=2),
    "semantic_kernel": Client("semantic-kernel", chats=2, calls=1, people=1, answers=1),
    "autogen": Client("autogen", chats=2, calls=2, people=2, answers=1),
    "llm": Client("constrained", chats=4, calls=2, people=2, answers=2),
    "outlines": Client("constrained", chats=4, people=5, answers=4),
    "guidance": Client("constrained", chats=1, people=1),
    "mirascope": Client("mirascope", chats=4, calls=2, people=6, answers=2),
    "crewai": Client("crewai", chats=2, people=2, answers=1),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    with launched(build_demo_model(), tmp_path_factory.mktemp("logs")) as server:
        yield server


def run_program(*command: str | Path, folder: Path) -> dict[str, list[Any]]:
    """What it reports. Clients write files of their own at home, so that they get another one."""
    environ = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environ |= SILENT | {"HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environ, cwd=folder)
    assert done.returncode == 0, done.stderr
    results: dict[str, list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return results


def check(results: dict[str, list[Any]], client: Client) -> None:
    """Whole and streamed texts are equal, calls and objects are right, whoever asks."""
    assert {name: len(items) for name, items in results.items()} == {
        name: count for name, count in dataclasses.asdict(client).items() if name != "environment"
    }
    assert len(set(results["chats"])) == 1 and results["chats"][0]
    assert all(call == ["get_weather", {"city": "Paris", "unit": "celsius"}] for call in results["calls"])
    assert all(person == {"name": "Anna", "age": 31} for person in results["people"])
    assert all(results["answers"])


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CLIENTS)
def test_client(server: LaunchedServer, name: str, tmp_path: Path) -> None:
    client = CLIENTS[name]
    python = cached_environment(client.environment) / "bin" / "python"
    check(run_program(python, PROGRAMS / f"{name}_client.py", server.url, folder=tmp_path), client)


@pytest.mark.timeout(1800)
def test_npm(server: LaunchedServer, tmp_path: Path) -> None:
    """OpenAI's runner of tools and Responses, Anthropic's, LangChain's and Hugging Face's packages."""
    command = [node(), PROGRAMS / "node_clients.mjs", server.url, node_packages("node-more")]
    check(run_program(*command, folder=tmp_path), Client("node-more", chats=10, calls=6, people=7))


def test_every_program_has_its_row() -> None:
    programs = {path.stem.removesuffix("_client") for path in PROGRAMS.glob("*_client.py")}
    assert programs == set(CLIENTS)
