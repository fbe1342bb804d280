"""Hosts that lack something: the start says what is wrong, or the server serves. These tests need root, for mounts."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import build_demo_model
from tests.e2e.launched import STOP_TIMEOUT_S, LaunchedServer, free_port

ROOT = Path(__file__).parents[2]
COMPILE_TIMEOUT_S = 400.0
"""Without a cache that can be written or read all kernels are compiled."""
GROUPS = Path("/sys/fs/cgroup")
CACHED = {"HOME": str(Path.home())}
"""Where compiled kernels are."""
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


@pytest.fixture
def group_of_512_mb() -> Iterator[Path]:
    """A control group of version 1, or of version 2, with which this was never run."""
    (mount, name) = next(
        (folder, limit)
        for folder, limit in ((GROUPS / "memory", "memory.limit_in_bytes"), (GROUPS, "memory.max"))
        if (folder / "cgroup.procs").exists()
    )
    group = mount / f"pytgi-{os.getpid()}"
    group.mkdir()
    (group / name).write_text(str(512 << 20))
    yield group
    for _ in itertools.takewhile(lambda _: (group / "cgroup.procs").read_text(), range(100)):
        time.sleep(0.1)
    group.rmdir()


@pytest.mark.timeout(600)
def test_512_mb_of_memory_serve_a_tiny_model(tiny_model_dir: Path, tmp_path: Path, group_of_512_mb: Path) -> None:
    """All processes are in the group, also those that render chats and check grammars."""
    setup = f"echo $$ > {group_of_512_mb}/cgroup.procs"
    with launched_in(setup, "", CACHED, tiny_model_dir, tmp_path / "log") as server:
        server.wait_for_log("Connected", COMPILE_TIMEOUT_S)
        grammar = {"type": "regex", "value": "[a-z]{4,8}"}
        assert server.generate("hello", max_new_tokens=8, grammar=grammar)["generated_text"].islower()
        chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=chat, timeout=60).status_code == 200
        assert server.process.poll() is None and "Traceback" not in server.log


@pytest.mark.timeout(600)
def test_a_model_that_hardly_fits_512_mb_serves_or_is_refused(tmp_path: Path, group_of_512_mb: Path) -> None:
    """How much is left for the KV cache of the small demo model depends on what the other processes take just then."""
    setup = f"echo $$ > {group_of_512_mb}/cgroup.procs"
    with launched_in(setup, "", CACHED, build_demo_model("--small"), tmp_path / "log") as server:
        while server.process.poll() is None and "Connected" not in server.log:
            time.sleep(0.1)
        if server.process.poll() is None:
            assert server.generate("hello", max_new_tokens=8)["details"]["generated_tokens"] == 8
        else:
            assert server.process.returncode == 1
            assert "Not enough memory for " in server.log and "give the process more memory" in server.log
        assert "Traceback" not in server.log


@pytest.mark.timeout(600)
def test_512_mb_of_memory_refuse_a_model_that_needs_more(tmp_path: Path, group_of_512_mb: Path) -> None:
    setup = f"echo $$ > {group_of_512_mb}/cgroup.procs"
    with launched_in(setup, "", CACHED, build_demo_model(), tmp_path / "log") as server:
        assert server.wait_for_end(COMPILE_TIMEOUT_S) == 1
        assert "Not enough memory for the model: its weights take 1.0 GB" in server.log
        assert "serve a smaller model, or give the process more memory" in server.log
        assert "Traceback" not in server.log


@pytest.mark.timeout(120)
def test_512_mb_of_address_space_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    with launched_in(f"ulimit -v {512 << 10}", "", CACHED, tiny_model_dir, tmp_path / "log") as server:
        assert server.wait_for_end(60) == 1
        assert (
            "limited to 0.5 GB, less than what the libraries map: lift that limit (ulimit -v unlimited)" in server.log
        )
        assert "Traceback" not in server.log
