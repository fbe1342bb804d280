"""What the image is built of, as far as it can be told without building it (`make image-test` does)."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize(
    ("words", "port"),
    [
        ("python text-generation-launcher --model-id m", 80),
        ("python text-generation-launcher --port 8123 --model-id m", 8123),
        ("python text-generation-launcher --port=8123", 8123),
        ("python text-generation-launcher -p 8123 --prometheus-port 9000", 8123),
        ("python text-generation-launcher --prometheus-port 9000 --master-port=29500", 80),
        ("python text-generation-launcher --port 1 --port 2", 2),
    ],
)
def test_the_health_check_asks_the_port_of_the_launcher(words: str, port: int) -> None:
    port_of = runpy.run_path(str(ROOT / "scripts" / "image" / "health.py"))["port_of"]
    assert port_of("".join(f"{word}\0" for word in words.split()), "80") == port


INDEX = "file:///an index/simple"
(TORCH,) = re.findall(r"^torch==.+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("build", "machine", "variables", "expected"),
    [
        ("cpu", "x86_64", {}, [TORCH]),
        ("cpu", "aarch64", {}, ["torch==2.9.1"]),
        ("cuda", "aarch64", {}, [TORCH]),
        ("hip", "aarch64", {"TORCH_INDEX": INDEX}, ["--extra-index-url", INDEX, TORCH]),
        ("cpu", "aarch64", {"TORCH_INDEX": INDEX}, ["--extra-index-url", INDEX, TORCH]),
        ("cpu", "x86_64", {"TORCH_INDEX": INDEX}, ["--extra-index-url", INDEX, TORCH]),
        ("cpu", "aarch64", {"TORCH_SPEC": "torch >= 2.8, < 2.10"}, ["torch >= 2.8, < 2.10"]),
        ("cuda", "x86_64", {"TORCH_SPEC": "torch==2.14.1"}, ["torch==2.14.1"]),
    ],
)
def test_the_torch_that_a_target_installs(
    build: str, machine: str, variables: dict[str, str], expected: list[str], tmp_path: Path
) -> None:
    """`packages.sh` with programs that only say how they are called."""
    programs = {"uname": f"echo {machine}", "pip": 'printf "%s\\n" "$@" >> calls', "python": ":", "python3": ":"}
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "constraints.txt").write_bytes((ROOT / "constraints.txt").read_bytes())
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCH_SPEC": "", "TORCH_INDEX": "", **variables}
    script = ROOT / "scripts" / "image" / "packages.sh"
    subprocess.run(["sh", script, build], cwd=tmp_path, env=environ, check=True)
    first_call = (tmp_path / "calls").read_text().split("\ninstall\n")[0].splitlines()
    assert first_call == ["install", "--no-cache-dir", "--no-compile", "-c", "others.txt", *expected]


def test_the_default_target_is_the_last_stage() -> None:
    stages = re.findall(r"^FROM (?:\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)
    assert {"cuda", "rocm", "cpu", "sagemaker"} <= set(stages)
    assert stages[-1] == "cuda"


def test_the_context_has_what_the_stages_copy_and_the_wheel_is_made_of() -> None:
    """What `.dockerignore` lets through, one name a line; a stage that copies all takes the wheel's folders."""
    let_through = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    copied = {
        word
        for words in re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", DOCKERFILE, re.MULTILINE)
        for word in words.split()
        if word != "."
    }
    assert len(copied) >= 4
    assert all((ROOT / name).exists() for name in copied)
    needed = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks", "tests"}
    assert {name.split("/")[0] for name in copied} | needed | {"setup.py", "README.md"} <= let_through


def test_no_registry_is_named() -> None:
    """Base images and indexes are arguments: a default has no host."""
    files = [ROOT / "Dockerfile", *sorted((ROOT / "scripts" / "image").iterdir())]
    for file in files:
        if file.is_file():
            assert not re.search(r"https?://(?!127\.0\.0\.1)", file.read_text()), file
    defaults = re.findall(r"^ARG \w+=(.*)$", DOCKERFILE, re.MULTILINE)
    assert len(defaults) >= 4
    assert all("/" not in default for default in defaults)
