"""What the Dockerfile names, looked up where it comes from: none of the images for GPUs can be built here.

A linter reads the Dockerfile; pip resolves all packages of the `cuda` target against the index without fetching them;
apt knows Debian's. PyTorch's index, which has the packages of `rocm`, is not asked.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cached_environment import cached_environment

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
OURS_TO_CHOOSE = {"torch", "triton"}
"""Not held to constraints.txt in images: TORCH_SPEC says which torch, and that brings its Triton."""


@pytest.fixture(scope="module")
def environment() -> Path:
    return cached_environment("image") / "bin"


def pins() -> dict[str, str]:
    pairs = (line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_the_linter_has_nothing_to_say(environment: Path) -> None:
    done = subprocess.run(
        [environment / "hadolint", "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


@pytest.mark.timeout(1200)
def test_the_index_has_what_the_cuda_target_installs(environment: Path, tmp_path: Path) -> None:
    (torch,) = set(re.findall(r"^ARG TORCH_SPEC=(.+)$", DOCKERFILE, re.MULTILINE))
    constraints = tmp_path / "others.txt"
    kept = {name: version for name, version in pins().items() if name not in OURS_TO_CHOOSE}
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in kept.items()))
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    # Without this machine's settings, which may prefer another build of torch.
    settings = {name: value for name, value in os.environ.items() if not name.startswith("PIP_FIND_")}
    command = [environment / "python", "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
    options = ["--only-binary=:all:", "--report", tmp_path / "report", "-c", constraints, torch, *requirements]
    subprocess.run([*command, *options], env={**settings, "PIP_CONFIG_FILE": os.devnull}, check=True)
    installed = {name_of(item): item["metadata"]["version"] for item in read_report(tmp_path / "report")}
    assert f"torch=={installed['torch']}" == torch
    assert {"triton", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"} <= set(installed)
    assert {name: kept[name] for name in installed if name in kept} == {
        name: version for name, version in installed.items() if name in kept
    }
    assert tuple(map(int, installed["triton"].split(".")[:2])) >= (3, 6)  # the extra `cuda` asks for it


def read_report(path: Path) -> list[Any]:
    items: list[Any] = json.loads(path.read_text())["install"]
    return items


def name_of(item: Any) -> str:
    return str(item["metadata"]["name"]).lower().replace("_", "-")


def test_debian_has_what_the_targets_install() -> None:
    lists = re.findall(r"apt-get install -y --no-install-recommends ([^\\]+)", DOCKERFILE)
    names = [name for words in lists for name in words.split()]
    assert len(names) >= 3
    for name in names:
        shown = subprocess.run(["apt-cache", "show", name], capture_output=True, text=True, check=False)
        assert shown.returncode == 0 and f"Package: {name}" in shown.stdout, f"{name}: {shown.stderr}"
