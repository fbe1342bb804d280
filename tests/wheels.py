"""The wheel, built from a copy of this tree, and environments that have it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("server", "engine", "parallel", "quant")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def copy_tree(folder: Path) -> Path:
    """What a clone has that the wheel is made of, without what builds leave in a checkout."""
    for name in ("pytgi", *ROOMS):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in "pyproject.toml setup.py README.md LICENSE NOTICE".split():
        shutil.copy(ROOT / name, folder)
    return folder


def build(kind: str, tree: Path, target: Path) -> Path:
    """Let setuptools build the `wheel` or the `sdist` of a tree."""
    target.mkdir(exist_ok=True)
    command = [sys.executable, "-P", "-c", BUILD, f"build_{kind}", str(target)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    [path] = target.iterdir()
    return path


def files_of(wheel: Path) -> dict[str, int]:
    """The checksums of a wheel's files; its list of them repeats those."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.CRC for info in archive.infolist() if not info.filename.endswith("RECORD")}


def environment_with(wheel: Path, folder: Path) -> Path:
    """A virtual environment with the wheel, whose dependencies are this environment's. Returns its site-packages.

    A line in a .pth file puts the packages of this environment on the path, and runs none of its hooks: what is
    installed here as editable is not there.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    return packages
