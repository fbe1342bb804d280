"""Programs out of Debian's packages that are of use here without being installed, fetched once per machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.e2e.cached_environment import cached_folder


def debian_program(package: str, program: str) -> Path:
    """A program that needs nothing but what every system has; the package's newest version when first asked for."""

    def fetch(folder: Path) -> None:
        folder.mkdir()
        # The lists of packages may be too old, or not there at all.
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
        (archive,) = folder.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
        archive.unlink()

    return cached_folder(package, package.encode(), fetch) / "usr" / "bin" / program
