"""Building our image with buildah upon a base that debootstrap makes: no container engine and no image registry."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "build" / "image-test"
BASE = "localhost/pytgi-base"
IMAGE = "localhost/pytgi-test"
DEBIAN = "bookworm"
PACKAGES = "python3 python3-venv python3-distutils ca-certificates"
"""python3-distutils by its name: debootstrap does not know what provides what."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROGRAMS = "buildah debootstrap unshare nsenter ip curl pip".split()
GIT_SHA = "0123456789abcdef0123456789abcdef01234567"
DOCKER_LABEL = "sha-0123456"
PIP_FOLDERS = ("find-links", "extra-index-url", "constraint", "cert")
"""Settings of pip that may name files of this machine."""


def reasons_against() -> list[str]:
    """What this machine lacks for building and running the image."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    reasons = [f"there is no {', '.join(missing)} (Debian: apt-get install buildah debootstrap)"] if missing else []
    return reasons if os.geteuid() == 0 else [*reasons, "only root may make containers with chroot isolation"]


def buildah(*arguments: object) -> str:
    storage = ["--storage-driver", "vfs", "--root", str(FOLDER / "storage"), "--runroot", str(FOLDER / "run")]
    command = ["buildah", *storage, *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout.strip()


def make_base() -> None:
    """A minimal Debian with Python, as `python:3.11-slim` is one."""
    root = FOLDER / "debian"
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES.split())}", DEBIAN, str(root)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    archive = FOLDER / "debian.tar"
    subprocess.run(["tar", "-C", str(root), "-cf", str(archive), "."], check=True)
    container = buildah("from", "scratch")
    buildah("add", "-q", container, archive, "/")
    buildah("config", "--env", f"PATH={PATH}", container)
    buildah("commit", "-q", "--rm", container, BASE)
    archive.unlink()
    shutil.rmtree(root)


def build(target: str) -> float:
    """Build a target as `IMAGE`; returns how many seconds that took."""
    started = time.monotonic()
    arguments = {"BASE_IMAGE": BASE, "GIT_SHA": GIT_SHA, "DOCKER_LABEL": DOCKER_LABEL}
    options = [f"--build-arg={name}={value}" for name, value in arguments.items()]
    volumes = [f"--volume={source}:{place}:ro" for source, place in pip_volumes()]
    options += ["--isolation=chroot", "--format=docker", "--pull-never", f"--target={target}", f"--tag={IMAGE}"]
    buildah("build", *options, *volumes, ".")
    return time.monotonic() - started


def pip_volumes() -> list[tuple[str, str]]:
    """What lets pip in the build reach what pip reaches here: one file of settings, and the folders that it names."""
    listed = subprocess.run(["pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    settings: dict[str, str] = {}
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):  # variables win
        name, _, value = line.partition("=")
        settings[name.rpartition(".")[2]] = value.strip("'\"")
    file = FOLDER / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    paths = {
        Path(word.removeprefix("file://")).resolve()
        for name in PIP_FOLDERS
        for word in settings.get(name, "").split()
        if word.removeprefix("file://").startswith("/")
    }
    # A link to a package's file leads out of its index, to the folder beside it.
    folders = {path.parent if path.name == "simple" else path for path in paths if path.exists()}
    return [(str(file), "/etc/pip.conf"), *((str(path), str(path)) for path in sorted(folders))]


def configuration() -> dict[str, Any]:
    """The image's configuration in Docker's words."""
    inspected: dict[str, Any] = json.loads(buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]
    return inspected


def unpack() -> Path:
    """The image's files, in a folder of their own."""
    return Path(buildah("mount", buildah("from", "--pull-never", IMAGE)))


def num_bytes(root: Path) -> int:
    """Bytes of all files below a folder, those that lie on another file system left out."""
    done = subprocess.run(["du", "-sxB1", str(root)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


def remove_all() -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(FOLDER)
