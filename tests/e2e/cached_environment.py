"""Virtual environments for clients that can't live in ours, made once per machine in the user's cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).parent / "environments"


def cached_environment(name: str) -> Path:
    """A virtual environment with exactly the packages of `environments/<name>.txt`; whole, or not there at all."""
    pins = PINS / f"{name}.txt"
    version = hashlib.blake2b(pins.read_bytes() + sys.version.encode(), digest_size=4).hexdigest()
    parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pytgi" / "environments"
    final, building = parent / f"{name}-{version}", parent / f".{name}-{version}.building"
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not final.is_dir():
            shutil.rmtree(building, ignore_errors=True)
            _build(building, pins)
            building.rename(final)
    return final


def _build(folder: Path, pins: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "-r", str(pins)], check=True)
