"""The wheel in a fresh environment, among foreign packages called `server`, `engine`, `parallel` and `quant`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.launched import free_port
from tests.wheels import ROOMS, build, copy_tree, environment_with, files_of

FOREIGN_PACKAGE = """\
import os
open(os.environ["FOREIGN_IMPORTS"], "a").write(__file__ + "\\n")
raise ImportError("a foreign package")
"""
START_TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    return build("wheel", tree, tree.with_name("wheel"))


class Host:
    """An environment with the wheel, and foreign packages wherever Python looks."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        packages = environment_with(wheel, folder / "environment")
        self.bin = folder / "environment" / "bin"
        self.directory = folder / "directory"
        for place in (packages, self.directory, folder / "path"):
            for name in ROOMS:
                (place / name).mkdir(parents=True)
                (place / name / "__init__.py").write_text(FOREIGN_PACKAGE)
        self._foreign_imports = folder / "foreign-imports"
        self.cache = folder / "cache"
        self.environ = {
            **os.environ,
            "PYTHONPATH": f":{folder / 'path'}:",
            "FOREIGN_IMPORTS": str(self._foreign_imports),
            "XDG_CACHE_HOME": str(self.cache),  # kernels are kept by their place, which is gone after these tests
        }
        del self.environ["NUMBA_CACHE_DIR"]

    @property
    def foreign_imports(self) -> str:
        return self._foreign_imports.read_text() if self._foreign_imports.exists() else ""

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Let a command of the environment end, which it must do well."""
        line = [self.bin / command[0], *command[1:]]
        done = subprocess.run(line, cwd=self.directory, env=self.environ, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done

    @contextlib.contextmanager
    def serving(self, *command: str | Path) -> Iterator[tuple[str, int]]:
        """A server's address and process id, from its first answer on; it must end well."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        path, log = self.bin / command[0], self.directory.with_name("log")
        with log.open("w") as stream:
            process = subprocess.Popen(
                [path, *command[1:], f"--port={port}"],
                cwd=self.directory,
                env=self.environ,
                stdout=stream,
                stderr=stream,
            )
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while "Connected" not in log.read_text():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield url, process.pid
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def host(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Host:
    """A host whose kernels are compiled, by the command that does so."""
    host = Host(tmp_path_factory.mktemp("host"), wheel)
    host.run("pytgi", "compile")
    return host


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
REQUESTS: dict[str, dict[str, Any]] = {
    "/generate": {"inputs": "x", "parameters": {"max_new_tokens": 4}},
    "/v1/chat/completions": CHAT,
    "/v1/completions": {
        "prompt": "x",
        "max_tokens": 40,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
    },
    "/tokenize": {"inputs": "word " * 40_000},
}
"""Requests for which the webserver starts each of its own children."""


@pytest.mark.parametrize(
    "command",
    [("text-generation-launcher", "--model-id"), ("pytgi", "serve"), ("python", "-P", "-m", "pytgi", "serve")],
    ids="launcher pytgi module".split(),
)
def test_every_process_of_a_server_has_our_packages(command: tuple[str, ...], host: Host, tiny_model_dir: Path) -> None:
    with host.serving(*command, tiny_model_dir, "--num-shard=2") as (url, pid):
        for route, body in REQUESTS.items():
            answer = httpx.post(f"{url}{route}", json=body, timeout=120)
            assert answer.status_code == 200, answer.text
        commands = [process.cmdline() for process in psutil.Process(pid).children(recursive=True)]
    modules = {line[line.index("-m") + 1] for line in commands if "-m" in line}
    children = {"server.chat.rendering", "server.requests.grammar_check", "server.text.long_texts"}
    assert modules >= {"engine", "server", *children}
    assert host.foreign_imports == ""


def test_the_tools_have_our_packages(host: Host, tiny_model_dir: Path, tmp_path: Path) -> None:
    assert list(host.cache.rglob("*.nbi")), "nothing was compiled"
    assert host.run("pytgi", "download", tiny_model_dir).stdout.strip() == str(tiny_model_dir)
    host.run("pytgi", "quantize", tiny_model_dir, tmp_path / "int8", "--method=int8")
    assert (tmp_path / "int8" / "model.safetensors").exists()
    assert host.foreign_imports == ""


PROGRAM = """\
import json, subprocess, sys
before = list(sys.path)
from pytgi import LLM
with LLM(sys.argv[1]) as llm:
    result = llm.generate(["a", "b"], max_new_tokens=3)
    message = llm.chat([{"role": "user", "content": "Hello"}], max_tokens=3)
rooms = ("server", "engine", "parallel", "quant", "torch")
loaded = [name for name in rooms if name in sys.modules]
print(json.dumps([len(result), message.finish_reason, loaded, before == sys.path]))
"""


def test_a_program_keeps_its_own_packages_and_generates(host: Host, tiny_model_dir: Path) -> None:
    (host.directory / "program.py").write_text(PROGRAM)
    done = host.run("python", "program.py", tiny_model_dir)
    assert json.loads(done.stdout) == [2, "length", [], True]
    assert host.foreign_imports == ""


def test_the_sdist_builds_the_same_wheel(wheel: Path, tree: Path, tmp_path: Path) -> None:
    source = build("sdist", tree, tmp_path / "sdist")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    [unpacked] = (tmp_path / "source").iterdir()
    assert files_of(build("wheel", unpacked, tmp_path / "wheel")) == files_of(wheel)


def test_installed_it_adds_one_package_and_its_commands(wheel: Path, tmp_path: Path) -> None:
    packages = environment_with(wheel, tmp_path / "environment")
    assert {path.name for path in packages.iterdir() if path.is_dir() and not path.name.endswith("-info")} == {"pytgi"}
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for command in ("pytgi", "text-generation-launcher"):
        path = packages.parents[2] / "bin" / command
        done = subprocess.run([path, "--version"], env=environ, cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.startswith("pytgi "), done.stderr
    done = subprocess.run(
        [path.with_name("text-generation-server"), "download-weights", "--help"],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "MODEL_ID" in done.stdout, done.stderr


def test_the_foreign_packages_are_in_the_way(host: Host) -> None:
    """Otherwise the tests above would prove nothing."""
    for name in ROOMS:
        done = subprocess.run([host.bin / "python", "-c", f"import {name}"], env=host.environ, cwd=host.directory)
        assert done.returncode == 1
    assert len(host.foreign_imports.splitlines()) == len(ROOMS)
