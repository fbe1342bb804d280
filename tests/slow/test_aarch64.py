"""The CPU kernels on 64-bit ARM with dot products, in qemu's emulation of one program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.cached_environment import PINS, cached_folder
from tests.slow.debian import debian_program

ROOT = Path(__file__).parents[2]
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64", "any")
FEATURES = "+fp-armv8,+neon,+dotprod"
TESTS = ("tests/contract/kernels", "tests/unit/quant", "tests/unit/parallel/test_partition.py")
COMPARED = ("tests/contract/kernels/test_sampler.py", "tests/unit/quant/test_oracle_files.py")
"""Not among them: they compare with transformers, which this environment does without."""
SYSTEM_PACKAGES = "python3,libgomp1,libstdc++6"


def system() -> Path:
    """The files of a Debian for ARM with Python. No program of it is run while it is made."""

    def make(folder: Path) -> None:
        options = ["--arch=arm64", "--foreign", "--variant=minbase", f"--include={SYSTEM_PACKAGES}"]
        subprocess.run(["debootstrap", *options, "bookworm", folder], check=True)
        for package in folder.glob("var/cache/apt/archives/*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True)

    return cached_folder("aarch64-debian", SYSTEM_PACKAGES.encode(), make)


def packages() -> Path:
    """What the tests of the kernels import, for ARM; torch 2.9.1 is its last CPU build on PyPI."""
    pins = PINS / "aarch64.txt"

    def install(folder: Path) -> None:
        platforms = [word for name in PLATFORMS for word in ("--platform", name)]
        options = ["--python-version", "3.11", "--only-binary=:all:", "--no-deps", "--target", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *platforms, *options, "-r", pins], check=True)

    return cached_folder("aarch64", pins.read_bytes(), install)


@pytest.mark.timeout(7200)
def test_the_kernels_pass_their_tests(tmp_path: Path) -> None:
    root = system()
    emulator = debian_program("qemu-user-static", "qemu-aarch64-static")
    environ = {
        **os.environ,
        "PYTHONPATH": f"{packages()}:{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "NUMBA_CACHE_DIR": str(tmp_path),
        # The emulator shows the host's /proc/cpuinfo, so nothing is found by itself.
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": FEATURES,
    }
    command = [emulator, "-cpu", "max", "-L", root, root / "usr/bin/python3.11", "-m", "pytest", "-q"]
    ignored = [f"--ignore={file}" for file in COMPARED]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "--timeout=3600", *TESTS, *ignored], cwd=ROOT, env=environ
    )
    assert done.returncode == 0
