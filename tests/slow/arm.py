"""A Debian for 64-bit ARM, with what an engine imports, and programs that run in it under qemu's emulation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.e2e.cached_environment import PINS, cached_folder
from tests.slow.debian import debian_program

ROOT = Path(__file__).parents[2]
PLATFORMS = (
    "manylinux_2_31_aarch64",
    "manylinux_2_28_aarch64",
    "manylinux_2_27_aarch64",
    "manylinux_2_24_aarch64",
    "manylinux2014_aarch64",
    "manylinux_2_17_aarch64",
    "any",
)
FEATURES = "+fp-armv8,+neon,+dotprod"
SYSTEM_PACKAGES = "python3,libgomp1,libstdc++6"
ELF_MAGIC = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
ELF_MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
"""A program for 64-bit ARM begins with the first, as far as the second has bits."""


def system() -> Path:
    """The files of a Debian for ARM with Python. No program of it is run while it is made."""

    def make(folder: Path) -> None:
        options = ["--arch=arm64", "--foreign", "--variant=minbase", f"--include={SYSTEM_PACKAGES}"]
        subprocess.run(["debootstrap", *options, "bookworm", folder], check=True)
        for package in folder.glob("var/cache/apt/archives/*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True)

    return cached_folder("aarch64-debian", SYSTEM_PACKAGES.encode(), make)


def packages() -> Path:
    """What an engine and the tests of its kernels import, for ARM; torch 2.9.1 is its last CPU build on PyPI."""
    pins = PINS / "aarch64.txt"

    def install(folder: Path) -> None:
        platforms = [word for name in PLATFORMS for word in ("--platform", name)]
        options = ["--python-version", "3.11", "--only-binary=:all:", "--no-deps", "--target", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *platforms, *options, "-r", pins], check=True)

    return cached_folder("aarch64", pins.read_bytes(), install)


def emulator() -> Path:
    """The emulator of one program."""
    return debian_program("qemu-user-static", "qemu-aarch64-static")


def arm_command(command: list[str], folder: Path) -> list[str]:
    """Run `command` in the Debian for ARM: its children are emulated, too. Paths of this host are the same there.

    `folder` is its home and what it may write. The kernel starts the emulator within a namespace of the command's own
    (Linux 6.7 or newer), so nothing of the host changes.
    """
    root, site = system(), packages()
    lines = ["set -e", "mount -t binfmt_misc none /proc/sys/fs/binfmt_misc"]
    row = f":aarch64:M::{ELF_MAGIC}:{ELF_MASK}:{emulator()}:F"
    lines.append(f"printf %s '{row}' > /proc/sys/fs/binfmt_misc/register")
    for path in (ROOT, site, folder):
        lines += [f"mkdir -p {root}{path}", f"mount --bind {path} {root}{path}"]
    lines += [f"mount --rbind /{name} {root}/{name}" for name in ("dev", "proc")]
    environ = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "PYTHONPATH": f"{site}:{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "QEMU_CPU": "max",
        # The emulator shows the host's /proc/cpuinfo, so nothing is found by itself.
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": FEATURES,
    }
    settings = " ".join(f"{name}={value}" for name, value in environ.items())
    lines.append(f'exec chroot {root} /usr/bin/env -i {settings} "$@"')
    return ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", "\n".join(lines), "arm", *command]
