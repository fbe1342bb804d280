"""Processes that share a folder of compiled kernels."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = "import numba\n@numba.njit(cache=True)\ndef double(x):\n    return 2 * x\n"
RUN = """
import sys, time
from numba.core import caching
import engine.kernel_cache

load = caching.IndexDataCacheFile._load_index

def load_slowly(index):
    found = load(index)
    time.sleep(0.3)
    return found

caching.IndexDataCacheFile._load_index = load_slowly
engine.kernel_cache.MAX_WAIT_S = float(sys.argv[1])
engine.kernel_cache.share_kernels()
import kernel

print(*[kernel.double({"int": 4, "float": 0.5}[kind]) for kind in sys.argv[2:]])
print("compiled:", sum(kernel.double.stats.cache_misses.values()))
"""
"""Between reading a function's index and writing it there is time for another process to do so, too."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "kernel.py").write_text(MODULE)
    return tmp_path


def start(folder: Path, *kinds: str, max_wait_s: float = 60.0) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(folder), *sys.path])
    environ = {**os.environ, "NUMBA_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": paths}
    command = [sys.executable, "-c", RUN, str(max_wait_s), *kinds]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)


def test_two_processes_compile_each_kernel_once_and_keep_both(folder: Path) -> None:
    both = [start(folder, "int", "float"), start(folder, "float", "int")]
    first, second = (process.communicate(timeout=60)[0].splitlines() for process in both)
    assert (first[0], second[0]) == ("8 1.0", "1.0 8")
    assert sum(int(line.rpartition(" ")[2]) for line in (first[1], second[1])) == 2
    assert start(folder, "int", "float").communicate(timeout=60)[0] == "8 1.0\ncompiled: 0\n"


def test_who_is_stopped_while_it_compiles_does_not_hold_up_others_for_ever(folder: Path) -> None:
    assert start(folder, "int").communicate(timeout=60)[0] == "8\ncompiled: 1\n"
    (lock,) = (folder / "cache").rglob("*.lock")
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert start(folder, "float", max_wait_s=0.1).communicate(timeout=60)[0] == "1.0\ncompiled: 1\n"


def test_a_kernel_that_can_not_be_written_down_is_used_all_the_same(tmp_path: Path) -> None:
    """A file in place of the folder that Numba wants to make is as good as a disk that is full."""
    module = tmp_path / "kernel.py"
    module.write_text("import numba\n@numba.njit(cache=True)\ndef double(x):\n    return 2 * x\n")
    program = (
        "import errno, sys\n"
        "from numba.core import caching\n"
        "from engine.kernel_cache import share_kernels\n"
        "def full(*_):\n    raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "caching.IndexDataCacheFile.save = full\n"
        "share_kernels()\n"
        "share_kernels()\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import kernel\n"
        "print(kernel.double(4), kernel.double(0.5))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "8 1.0\n"
    assert done.stderr.count("Compiled kernels can't be kept (No space left on device)") == 1
