"""Hosts that lack something: the start says what is wrong, or the server serves. These tests need root, for mounts."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.launched import STOP_TIMEOUT_S, LaunchedServer, free_port

ROOT = Path(__file__).parents[2]
COMPILE_TIMEOUT_S = 400.0
"""Without a cache that can be written or read all kernels are compiled."""
SMALL = "mount -t tmpfs -o size={size} tmpfs {folder}"


@contextlib.contextmanager
def launched_in(
    setup: str, prefix: str, environ: dict[str, str], model: Path, log_path: Path
) -> Iterator[LaunchedServer]:
    """A launcher in a mount namespace of its own, after `setup`; `prefix` is a command that runs it."""
    port = free_port()
    program = [sys.executable, "-P", "-m", "server.launcher", "--model-id", str(model), "--port", str(port)]
    command = f"{setup}\nexec {prefix} {shlex.join(program)} --hostname 127.0.0.1 --dtype float32"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            ["unshare", "-m", "sh", "-ec", command],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environ},
        )
    try:
        yield LaunchedServer(process, port, log_path)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        process.kill()
        process.wait()


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """Where a disk that is full shall be."""
    folder = tmp_path / "full"
    folder.mkdir()
    return folder


@pytest.mark.timeout(600)
def test_a_full_disk_for_the_cache_and_temporary_files(tiny_model_dir: Path, tmp_path: Path, full: Path) -> None:
    setup = (
        f"{SMALL.format(size='256k', folder=full)}; mkdir {full}/cache {full}/temporary; "
        f"head -c 1M /dev/zero > {full}/x || :"
    )
    environ = {"XDG_CACHE_HOME": f"{full}/cache", "TMPDIR": f"{full}/temporary", "HOME": str(full)}
    with launched_in(setup, "", environ, tiny_model_dir, tmp_path / "log") as server:
        server.wait_for_log("Connected", COMPILE_TIMEOUT_S)
        assert server.generate("hello", max_new_tokens=4)["details"]["generated_tokens"] == 4
        assert "No cache folder can be written" in server.log
        assert "Traceback" not in server.log


@pytest.mark.timeout(600)
def test_a_read_only_root_without_home_for_a_user_without_a_passwd_entry(tiny_model_dir: Path, tmp_path: Path) -> None:
    setup = f"mount -o bind / /; mount -o remount,bind,ro /; {SMALL.format(size='64m', folder='/dev/shm')}"
    capabilities = "--inh-caps=+dac_override --ambient-caps=+dac_override"  # to read this checkout and its Python
    prefix = f"setpriv --reuid=54321 --regid=54321 --clear-groups {capabilities}"
    with launched_in(setup, prefix, {}, tiny_model_dir, tmp_path / "log") as server:
        server.wait_for_log("Connected", COMPILE_TIMEOUT_S)
        assert server.generate("hello", max_new_tokens=4)["details"]["generated_tokens"] == 4
        assert "No cache folder can be written" in server.log
        assert "Traceback" not in server.log


@pytest.mark.timeout(120)
def test_where_nothing_can_be_written_the_start_says_so(tiny_model_dir: Path, tmp_path: Path) -> None:
    setup = (
        f"mount -o bind / /; mount -o remount,bind,ro /; {SMALL.format(size='64k', folder='/dev/shm')}; "
        "head -c 1M /dev/zero > /dev/shm/x || :"
    )
    with launched_in(setup, "", {"HOME": "/nowhere"}, tiny_model_dir, tmp_path / "log") as server:
        assert server.wait_for_end(60) == 1
        assert "No folder can be written for compiled kernels" in server.log.splitlines()[-1]
        assert server.log.splitlines()[-1].endswith("set XDG_CACHE_HOME or TMPDIR to one that can")
        assert "Traceback" not in server.log
