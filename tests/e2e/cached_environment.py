"""Environments for clients that can't live in ours, made once per machine in the user's cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

PINS = Path(__file__).parent / "environments"


def cached_environment(name: str, cmake_args: str = "") -> Path:
    """A virtual environment with exactly the packages of `environments/<name>.txt`; whole, or not there at all.

    `cmake_args` are for packages that are built here; another choice is another environment.
    """
    pins = PINS / f"{name}.txt"
    identity = pins.read_bytes() + sys.version.encode() + cmake_args.encode()
    return cached_folder(name, identity, lambda folder: _build(folder, pins, cmake_args))


def cached_folder(name: str, identity: bytes, build: Callable[[Path], None]) -> Path:
    """The folder that `build` makes, once for each `identity`; whole, or not there at all."""
    version = hashlib.blake2b(identity, digest_size=4).hexdigest()
    parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pytgi" / "environments"
    final, building = parent / f"{name}-{version}", parent / f".{name}-{version}.building"
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / f"{final.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not final.is_dir():
            shutil.rmtree(building, ignore_errors=True)
            build(building)
            building.rename(final)
    return final


def _build(folder: Path, pins: Path, cmake_args: str) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--disable-pip-version-check"]
    command = [*pip, "install", "--quiet", "--no-compile", "--no-deps", "-r", str(pins)]
    if cmake_args:  # pip would take a wheel that it has built before, whatever it was built with
        command.append("--no-cache-dir")
    subprocess.run(command, env={**os.environ, "CMAKE_ARGS": cmake_args} if cmake_args else None, check=True)
