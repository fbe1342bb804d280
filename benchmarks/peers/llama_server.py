"""llama.cpp's own server, built for this machine from the sources inside llama-cpp-python's archive."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.e2e.cached_environment import PINS, cached_folder

CMAKE_ARGS = (
    "-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=ON -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF "
    "-DLLAMA_USE_PREBUILT_UI=OFF"
)


def llama_server() -> Path:
    """The program, of the same version as the side's library; its first build takes ten minutes on 2 cores.

    Raises CalledProcessError or OSError without a C++ compiler or cmake.
    """
    pins = (PINS / "llama.txt").read_text().split()
    (pin,) = (pin for pin in pins if pin.startswith("llama-cpp-python=="))
    return (
        cached_folder("llama-server", f"{pin} {CMAKE_ARGS}".encode(), lambda folder: _build(folder, pin))
        / "llama-server"
    )


def _build(folder: Path, pin: str) -> None:
    folder.mkdir()
    sources = folder / "sources"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    _run([*pip, "--no-binary", "llama-cpp-python", "--dest", str(sources), pin])
    (archive,) = sources.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(sources, filter="data")
    (project,) = sources.glob("*/vendor/llama.cpp")
    build = sources / "build"
    _run(["cmake", "-S", str(project), "-B", str(build), *CMAKE_ARGS.split()])
    _run(["cmake", "--build", str(build), "--target", "llama-server", "--parallel", "2"])
    (build / "bin" / "llama-server").rename(folder / "llama-server")
    shutil.rmtree(sources)


def _run(command: list[str]) -> None:
    subprocess.run(command, stdout=sys.stderr, check=True)
