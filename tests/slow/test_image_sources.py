"""What the Dockerfile names, looked up where it comes from: none of the images for GPUs can be built here.

A linter reads the Dockerfile; pip resolves all packages of the `cuda` target against the index without fetching them,
and finds those of `cpu` for 64-bit ARM; apt knows Debian's. PyTorch's index, which has those of `rocm`, is not asked.
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
from tests.slow.arm import PLATFORMS

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
OURS_TO_CHOOSE = {"torch", "triton"}
"""Not held to constraints.txt in images: `packages.sh` says which torch, and that brings its Triton."""
OF_GPUS = ("cuda-", "nvidia-", "triton")


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


@pytest.fixture(scope="module")
def settings() -> dict[str, str]:
    """Without this machine's settings of pip, which may prefer another build of torch."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PIP_FIND_")}
    return {**environ, "PIP_CONFIG_FILE": os.devnull}


@pytest.fixture(scope="module")
def on_x86_64(environment: Path, settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> version of all that pip would install into the target `cuda` on this machine."""
    folder = tmp_path_factory.mktemp("resolved")
    kept = {name: version for name, version in pins().items() if name not in OURS_TO_CHOOSE}
    (folder / "others.txt").write_text("".join(f"{name}=={version}\n" for name, version in kept.items()))
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    command = [environment / "python", "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
    options = ["--only-binary=:all:", "--report", folder / "report", "-c", folder / "others.txt"]
    subprocess.run([*command, *options, f"torch=={pins()['torch']}", *requirements], env=settings, check=True)
    return {name_of(item): item["metadata"]["version"] for item in read_report(folder / "report")}


@pytest.mark.timeout(1200)
def test_the_index_has_what_the_cuda_target_installs(on_x86_64: dict[str, str]) -> None:
    assert {"triton", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"} <= set(on_x86_64)
    expected = {name: version for name, version in pins().items() if name in on_x86_64 and name != "triton"}
    assert expected.items() <= on_x86_64.items()
    assert tuple(map(int, on_x86_64["triton"].split(".")[:2])) >= (3, 6)  # the extra `cuda` asks for it


@pytest.mark.timeout(1200)
def test_the_index_has_what_the_cpu_target_installs_on_64_bit_arm(
    on_x86_64: dict[str, str], environment: Path, settings: dict[str, str], tmp_path: Path
) -> None:
    """Every package of the other processor but those of GPUs, at the same version, and the torch of `packages.sh`."""
    (torch,) = re.findall(r"default=(torch==[\d.]+)", (ROOT / "scripts" / "image" / "packages.sh").read_text())
    others = {name: version for name, version in on_x86_64.items() if not name.startswith(OF_GPUS)}
    pairs = [torch, *(f"{name}=={version}" for name, version in others.items() if name != "torch")]
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    command = [environment / "python", "-m", "pip", "install", "--dry-run", "--quiet", "--target", tmp_path / "nothing"]
    options = ["--python-version=3.11", "--only-binary=:all:", "--no-deps", "--report", tmp_path / "report"]
    subprocess.run([*command, *options, *platforms, *pairs], env=settings, check=True)
    assert {name_of(item) for item in read_report(tmp_path / "report")} == others.keys()


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
