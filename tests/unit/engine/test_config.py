"""Limits that follow from flags, model and memory; what an engine process is started with."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import engine.link.environment
from engine.limits import EngineLimits, MemoryNeeds, ModelWindow, plan_memory
from engine.link.config import EngineConfig
from engine.link.environment import KERNEL_SOURCES, SHARED_MEMORY, engine_environment, shipped_kernels, user_cache_dir
from engine.link.errors import StartError

WINDOW, CAPACITY = 32_768, 65_536
NEEDS = MemoryNeeds(weights=0, per_block=1, per_step_token=1, block_size=1)
"""A memory in which a token is a block and a byte, so that the capacity can be any number."""


def resolve(*, window: int = WINDOW, capacity: int = CAPACITY, **flags: Any) -> EngineLimits:
    max_window = flags.pop("max_window", window)
    config = EngineConfig(model_path="", max_batch_total_tokens=capacity, **flags)
    model_window = ModelWindow(max_position_embeddings=window, max_window=max_window)
    plan = plan_memory(config, model_window, NEEDS, free_bytes=10**9, has_default_cap=True)
    assert plan.num_blocks == capacity
    return plan.limits


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (32_767, 32_768, 4096, 65_536)),
        ({"capacity": 20_000}, (19_999, 20_000, 4096, 20_000)),
        ({"capacity": 1000}, (999, 1000, 1000, 1000)),
        ({"window": 2048}, (2047, 2048, 2048, 65_536)),
        ({"max_total_tokens": 2000}, (1999, 2000, 4096, 65_536)),
        ({"max_total_tokens": 2000, "max_input_tokens": 10}, (10, 2000, 4096, 65_536)),
        ({"max_input_tokens": 100}, (100, 32_768, 4096, 65_536)),
        ({"max_total_tokens": 2, "max_input_tokens": 1}, (1, 2, 4096, 65_536)),
        ({"max_total_tokens": 32_768}, (32_767, 32_768, 4096, 65_536)),
        ({"max_window": 65_536}, (32_767, 32_768, 4096, 65_536)),
        ({"max_window": 65_536, "max_total_tokens": 65_536}, (65_535, 65_536, 4096, 65_536)),
        ({"max_total_tokens": 1000, "capacity": 1000}, (999, 1000, 1000, 1000)),
        ({"max_batch_prefill_tokens": 1}, (32_767, 32_768, 1, 65_536)),
        ({"max_batch_prefill_tokens": 65_536}, (32_767, 32_768, 65_536, 65_536)),
    ],
)
def test_limits(given: dict[str, int], expected: tuple[int, int, int, int]) -> None:
    assert dataclasses.astuple(resolve(**given)) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"max_total_tokens": 2000, "capacity": 1600},
            "`max_total_tokens` must be <= `max_batch_total_tokens`. Given: 2000 and 1600: "
            "lower --max-total-tokens to 1600 or raise --max-batch-total-tokens",
        ),
        (
            {"max_total_tokens": 4096, "window": 2048},
            "`max_total_tokens` (4096) is more than the model's max_position_embeddings (2048): "
            "lower --max-total-tokens to 2048",
        ),
        (
            {"max_total_tokens": 8193, "window": 2048, "max_window": 8192},
            "`max_total_tokens` (8193) is more than what rope scaling stretches the model's window to (8192): "
            "lower --max-total-tokens to 8192",
        ),
        (
            {"max_input_tokens": 100, "max_total_tokens": 100},
            "`max_input_tokens`(100) must be < `max_total_tokens`(100): "
            "lower --max-input-tokens or raise --max-total-tokens",
        ),
        (
            {"max_input_tokens": 5000, "capacity": 1024},
            "`max_input_tokens`(5000) must be < `max_total_tokens`(1024): "
            "lower --max-input-tokens or raise --max-total-tokens",
        ),
        (
            {"max_total_tokens": 1},
            "`max_input_tokens`(0) must be < `max_total_tokens`(1): "
            "lower --max-input-tokens or raise --max-total-tokens",
        ),
        (
            {"max_batch_prefill_tokens": 1025, "capacity": 1024},
            "`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. Given: 1025 and 1024: "
            "lower --max-batch-prefill-tokens to 1024",
        ),
    ],
)
def test_limits_that_contradict(given: dict[str, int], message: str) -> None:
    with pytest.raises(StartError) as caught:
        resolve(**given)
    assert str(caught.value) == message


def test_the_configuration_survives_its_trip_to_the_engine() -> None:
    changes: dict[str, Any] = {
        "dtype": "float32",
        "max_total_tokens": 5,
        "is_prefix_caching": False,
        "num_threads": 3,
        "socket_fd": 9,
        "log_level": "debug",
    }
    config = EngineConfig(model_path="/a b/ü", **changes)
    assert EngineConfig.from_json(config.to_json()) == config
    assert "\n" not in config.to_json()


def test_the_engines_environment_fills_in_what_the_user_left_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.35"))
    environ = {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "7", "NUMBA_NUM_THREADS": ""}
    made = engine_environment(2, environ)
    assert Path(made.pop("NUMBA_CACHE_DIR")).parent == tmp_path / "pytgi" / "numba"
    assert Path(made.pop("TRITON_CACHE_DIR")) == tmp_path / "pytgi" / "triton"
    assert made == {
        "NUMBA_THREADING_LAYER": "omp",
        "NUMBA_NUM_THREADS": "2",
        "GOMP_SPINCOUNT": "4000",
        "THP_MEM_ALLOC_ENABLE": "1",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 26),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 28),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    assert engine_environment(2, {"NUMBA_CACHE_DIR": "/elsewhere"}).get("NUMBA_CACHE_DIR") is None


@pytest.mark.parametrize("library", [("glibc", "2.34"), ("glibc", "2.31"), ("musl", "2.40"), ("", "")])
def test_thresholds_that_the_c_library_would_ignore_are_not_set(
    library: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: library)
    assert not [name for name in engine_environment(2, {"XDG_CACHE_HOME": str(tmp_path)}) if "MALLOC" in name]


@pytest.mark.skipif("MALLOC_MMAP_THRESHOLD_" not in engine_environment(1, {}), reason="the C library has no such limit")
def test_memory_of_a_step_is_there_for_the_next_one(tmp_path: Path) -> None:
    """48 MB that are freed and taken again are not had from the system page by page a second time."""
    source = """
import resource
import numpy as np

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(12 << 20, np.float32).fill(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

new_pages()
print(new_pages())
"""
    environ = {**os.environ, **engine_environment(1, {"XDG_CACHE_HOME": str(tmp_path)})}
    answer = subprocess.run([sys.executable, "-c", source], env=environ, capture_output=True, text=True, check=True)
    assert int(answer.stdout) < 10


def shipped_kernel(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiled kernel in the folder that an image ships, which nobody may write."""
    monkeypatch.setattr(sys, "prefix", str(prefix))
    kernel = shipped_kernels(prefix) / "quant" / "kernel.nbc"
    kernel.parent.mkdir(parents=True)
    kernel.write_bytes(b"code")
    kernel.parent.chmod(0o555)
    return kernel


@pytest.mark.parametrize(
    ("cpuinfo", "features"),
    [
        ("processor\t: 0\nFeatures\t: fp asimd aes asimddp\nCPU part\t: 0xd0c\n", "+fp-armv8,+neon,+dotprod"),
        ("processor\t: 0\nFeatures\t: fp asimd aes\n", None),
        ("model name\t: asimddp\n", None),
        ("", None),
    ],
)
def test_dot_products_of_arm_are_what_the_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpuinfo: str, features: str | None
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr("engine.link.environment.CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    assert engine_environment(2, environ).get("NUMBA_CPU_FEATURES") == features
    assert "NUMBA_CPU_FEATURES" not in engine_environment(2, {**environ, "NUMBA_CPU_FEATURES": "+neon"})
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert "NUMBA_CPU_FEATURES" not in engine_environment(2, environ)


def test_a_new_cache_begins_with_the_kernels_that_were_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = shipped_kernel(tmp_path / "prefix", monkeypatch)
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    folder = Path(engine_environment(2, environ)["NUMBA_CACHE_DIR"])
    assert folder == tmp_path / "pytgi" / "numba" / kernel.parents[1].name
    assert (folder / "quant" / "kernel.nbc").read_bytes() == b"code"
    (folder / "quant" / "kernel.nbc").write_bytes(b"newer")
    assert engine_environment(2, environ)["NUMBA_CACHE_DIR"] == str(folder)
    assert (folder / "quant" / "kernel.nbc").read_bytes() == b"newer"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_shipped_kernels_that_can_not_be_copied_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped_kernel(tmp_path / "prefix", monkeypatch)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", fail)
    folder = Path(engine_environment(2, {"XDG_CACHE_HOME": str(tmp_path)})["NUMBA_CACHE_DIR"])
    assert list(folder.parent.iterdir()) == []


def test_every_file_with_kernels_is_part_of_the_kernel_caches_name() -> None:
    """Numba looks only at the file of a kernel: what it inlines from another file would stay as it was."""
    root = Path(engine.link.environment.__file__).parents[2]
    with_kernels = {
        path
        for package in ("engine", "parallel", "quant")
        for path in (root / package).rglob("*.py")
        if re.search(r"^from numba(?!\.core import event$)", path.read_text(), re.MULTILINE)
    }
    covered = {path for pattern in KERNEL_SOURCES for path in root.glob(pattern)}
    assert len(with_kernels) >= 4
    assert with_kernels <= covered


def test_a_cache_that_cannot_be_written_gives_way_to_a_temporary_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert user_cache_dir({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "pytgi"
    fallback = user_cache_dir({"XDG_CACHE_HOME": str(file)})
    assert fallback.name.startswith("pytgi-")
    assert (fallback.stat().st_mode & 0o777, fallback.stat().st_uid) == (0o700, os.getuid())
    assert fallback != user_cache_dir({"XDG_CACHE_HOME": str(file)})
    assert tmp_path not in fallback.parents


def full_disk(*full: Path) -> Callable[[Path], shutil._ntuple_diskusage]:
    """`shutil.disk_usage` of a host on which those folders are on a disk that is full."""

    def usage(path: Path) -> shutil._ntuple_diskusage:
        is_full = any(path.is_relative_to(folder) for folder in full)
        return shutil._ntuple_diskusage(1 << 40, 1 << 30, 1 << 20 if is_full else 1 << 39)

    return usage


def test_a_full_disk_gives_way_to_the_temporary_folder_and_that_to_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    environ = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    monkeypatch.setattr(shutil, "disk_usage", full_disk(tmp_path / "cache"))
    assert user_cache_dir(environ).parent == temporary
    assert "only 1 MiB are free" in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", full_disk(tmp_path))
    assert user_cache_dir(environ).parent == Path(SHARED_MEMORY)
    monkeypatch.setattr(shutil, "disk_usage", full_disk(Path("/")))
    with pytest.raises(StartError, match="No folder can be written .*: set XDG_CACHE_HOME or TMPDIR to one that can"):
        user_cache_dir(environ)


def test_without_a_home_and_a_passwd_entry_there_is_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_000_000)
    assert user_cache_dir({}).name.startswith("pytgi-")
