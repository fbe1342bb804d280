"""Free memory of the host, the KV cache, a step's activations, and the sentences when something does not fit."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.limits import (
    DEFAULT_KV_TOKENS,
    MemoryNeeds,
    check_weights_fit,
    plan_kv_blocks,
    plan_prefill_tokens,
)
from engine.link.config import EngineConfig
from engine.link.errors import StartError
from engine.memory import check_address_space, host_free_bytes, release_freed_memory

MEGABYTE = 10**6
NEEDS = MemoryNeeds(weights=1000 * MEGABYTE, per_block=MEGABYTE, per_step_token=MEGABYTE // 10, block_size=16)


def config(**changes: Any) -> EngineConfig:
    return EngineConfig(model_path="m", **changes)


def blocks(free_megabytes: int, *, window: int = 1024, has_default_cap: bool = True, **changes: Any) -> int:
    return plan_kv_blocks(
        config(**changes), NEEDS, free_bytes=free_megabytes * MEGABYTE, window=window, has_default_cap=has_default_cap
    )


@pytest.mark.parametrize(
    ("free", "options", "expected"),
    [
        (9000, {}, DEFAULT_KV_TOKENS // 16),
        (9000, {"window": 64000}, 4000),
        (2000, {"window": 64000}, 800),  # what fits of 1000 MB by the default share
        (2000, {"kv_memory_share": 0.5}, 500),
        (9000, {"has_default_cap": False}, 6400),
        (9000, {"max_total_tokens": 64}, DEFAULT_KV_TOKENS // 16),
        (2000, {"max_total_tokens": 64}, 800),
        (9000, {"max_total_tokens": 64000, "window": 64000}, 4000),
        (9000, {"max_batch_total_tokens": 100}, 7),
        (9000, {"max_batch_total_tokens": 100, "has_default_cap": False}, 7),
        (2000, {"max_batch_total_tokens": 12800}, 800),
    ],
)
def test_kv_blocks(free: int, options: dict[str, Any], expected: int) -> None:
    assert blocks(free, **options) == expected


@pytest.mark.parametrize("has_default_cap", [True, False])
@pytest.mark.parametrize("name", ["max_total_tokens", "max_batch_total_tokens"])
def test_what_does_not_fit_names_the_flag_and_a_value_that_does(name: str, has_default_cap: bool) -> None:
    with pytest.raises(StartError) as caught:
        blocks(2000, has_default_cap=has_default_cap, **{name: 12801})
    assert str(caught.value) == (
        f"Not enough memory to handle `{name}=12801`: the KV cache would take 0.8 GB of 0.8 GB that are free for it: "
        f"lower --{name.replace('_', '-')} to 12160"
    )
    assert blocks(1951, has_default_cap=has_default_cap, **{name: 12160}) >= 760, (
        "at the next start there may be a little less"
    )


SMALLEST = "Not enough memory for the smallest KV cache, 16 tokens: the KV cache would take"


@pytest.mark.parametrize(
    ("free", "options", "sentence"),
    [
        (
            2000,
            {"kv_memory_share": 1e-6},
            f"{SMALLEST} 1 MB of 0.001 MB that are free for it: raise TGI_WIGGLE_ROOM (1e-06)",
        ),
        (1000, {}, f"{SMALLEST} 1 MB of 0 MB that are free for it: give the process more memory"),
        (
            1000,
            {"memory_fraction": 0.5},
            f"{SMALLEST} 1 MB of 0 MB that are free for it: raise --cuda-memory-fraction 0.5",
        ),
        (
            2000,
            {"kv_memory_share": 0.001, "max_total_tokens": 32},
            "Not enough memory to handle `max_total_tokens=32`: the KV cache would take 2 MB of 1 MB that are free for "
            "it: raise TGI_WIGGLE_ROOM (0.001)",
        ),
    ],
)
def test_no_room_for_any_cache_names_what_limits(free: int, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(StartError) as caught:
        blocks(free, **options)
    assert str(caught.value) == sentence


def test_graphs_that_leave_no_room_are_named() -> None:
    needs = dataclasses.replace(NEEDS, graphs=1500 * MEGABYTE)
    free_bytes = 2000 * MEGABYTE
    with pytest.raises(StartError, match=r"name fewer or smaller sizes with --cuda-graphs, or 0 for none$"):
        plan_kv_blocks(config(), needs, free_bytes=free_bytes, window=1024, has_default_cap=False)
    assert plan_kv_blocks(config(), NEEDS, free_bytes=free_bytes, window=1024, has_default_cap=False)


def test_weights_that_do_not_fit() -> None:
    check_weights_fit(1, 1, 1.0)
    with pytest.raises(StartError, match=r"its weights take 15.2 GB, 8.0 GB are free: serve a smaller model, or give"):
        check_weights_fit(15_200_000_000, 8_000_000_000, 1.0)
    with pytest.raises(
        StartError, match=r"80 MB are free: serve a smaller model, or raise --cuda-memory-fraction 0.01$"
    ):
        check_weights_fit(15_200_000_000, 80_000_000, 0.01)


def prefill(wanted: int, free_megabytes: int, num_blocks: int, *, is_explicit: bool) -> int:
    return plan_prefill_tokens(
        wanted, NEEDS, free_bytes=free_megabytes * MEGABYTE, num_blocks=num_blocks, is_explicit=is_explicit
    )


def test_steps_are_cut_to_what_fits_beside_the_cache(caplog: pytest.LogCaptureFixture) -> None:
    assert prefill(4096, 2000, 500, is_explicit=False) == 4096
    assert prefill(4096, 2000, 900, is_explicit=False) == 1000
    assert "Reducing the max batch prefill from 4096 to 1000 because there is not enough memory" in caplog.text


def test_a_step_that_was_asked_for_is_refused_with_a_value_that_fits() -> None:
    with pytest.raises(StartError) as caught:
        prefill(4096, 2000, 900, is_explicit=True)
    assert str(caught.value) == (
        "Not enough memory to handle 4096 prefill tokens. You need to decrease `--max-batch-prefill-tokens` to 944"
    )
    assert prefill(1000, 2000, 900, is_explicit=True) == 1000


def test_no_suggested_step_is_empty() -> None:
    with pytest.raises(StartError, match="Not enough memory for a step beside"):
        plan_prefill_tokens(4096, NEEDS, free_bytes=1_001_600_000, num_blocks=0, is_explicit=True)


def test_programs_keep_their_activations_beside_those_of_a_larger_step() -> None:
    needs = dataclasses.replace(NEEDS, programs=50 * MEGABYTE)
    assert needs.fixed == NEEDS.fixed + 50 * MEGABYTE
    assert plan_prefill_tokens(4096, needs, free_bytes=2000 * MEGABYTE, num_blocks=900, is_explicit=False) == 500


def test_no_room_for_any_step() -> None:
    with pytest.raises(StartError, match="beside the weights and a KV cache of 16000 tokens: lower --max-batch-total"):
        prefill(4096, 2000, 1000, is_explicit=False)


@given(
    free=st.integers(1001, 20_000),
    window=st.integers(1, 100_000),
    total=st.none() | st.integers(1, 100_000),
    capacity=st.none() | st.integers(1, 100_000),
    share=st.floats(0.01, 1.0),
    has_default_cap=st.booleans(),
)
def test_never_more_than_there_is(
    free: int, window: int, total: int | None, capacity: int | None, share: float, has_default_cap: bool
) -> None:
    limits = {"max_total_tokens": total, "max_batch_total_tokens": capacity, "kv_memory_share": share}
    try:
        count = blocks(free, window=window, has_default_cap=has_default_cap, **limits)
    except StartError as error:
        assert str(error).startswith("Not enough memory")
        return
    assert 0 < count * MEGABYTE <= (free - 1000) * MEGABYTE * share
    assert count * 16 >= (capacity or total or 1)


def host(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """A root folder with 4 GB available and what the control groups' files say."""
    files = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:  4000000 kB\n", "proc/self/cgroup": cgroup, **files}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


def test_the_vocabulary_of_grammars_takes_its_part() -> None:
    needs = dataclasses.replace(NEEDS, grammars=100 * MEGABYTE)
    left, less = (
        plan_kv_blocks(config(), each, free_bytes=3000 * MEGABYTE, window=1024, has_default_cap=False)
        for each in (NEEDS, needs)
    )
    assert 0 < less < left


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {}, 4_096_000_000),
        ("0::/\n", {f"{V2}/memory.max": "max\n"}, 4_096_000_000),
        (
            "0::/\n",
            {
                f"{V2}/memory.max": "3000000000\n",
                f"{V2}/memory.current": "1000000000\n",
                f"{V2}/memory.stat": "anon 1\ninactive_file 500000000\nactive_file 200000000\n",
            },
            2_700_000_000,
        ),
        (  # a service's group has no limit of its own, its slice has
            "0::/my.slice/my.service\n",
            {
                f"{V2}/my.slice/my.service/memory.max": "max\n",
                f"{V2}/my.slice/memory.max": "2000000000\n",
                f"{V2}/my.slice/memory.current": "500000000\n",
                f"{V2}/my.slice/memory.stat": "inactive_file 0\n",
            },
            1_500_000_000,
        ),
        (  # version 1, seen from a container: the path is the host's, the files are at the mount point
            "9:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n",
            {
                f"{V1}/memory.limit_in_bytes": "1000000000\n",
                f"{V1}/memory.usage_in_bytes": "400000000\n",
                f"{V1}/memory.stat": "active_file 7\ntotal_inactive_file 100000000\ntotal_active_file 50000000\n",
            },
            750_000_000,
        ),
        ("4:memory:/\n", {f"{V1}/memory.limit_in_bytes": "9223372036854771712\n"}, 4_096_000_000),
    ],
)
def test_the_hosts_free_memory(tmp_path: Path, cgroup: str, files: dict[str, str], expected: int) -> None:
    assert host_free_bytes(host(tmp_path, cgroup, files)) == expected


def test_an_old_kernel_is_named(tmp_path: Path) -> None:
    host(tmp_path, "0::/\n", {"proc/meminfo": "MemTotal: 9 kB\n"})
    with pytest.raises(StartError, match="does not tell MemAvailable: this kernel is too old"):
        host_free_bytes(tmp_path)


def test_this_host_can_be_read() -> None:
    assert host_free_bytes() > 0


@pytest.mark.parametrize(
    ("limit", "is_refused"), [(resource.RLIM_INFINITY, False), (2 << 30, False), (1 << 30, True), (512 << 20, True)]
)
def test_an_address_space_without_place_for_the_libraries_is_refused(
    monkeypatch: pytest.MonkeyPatch, limit: int, is_refused: bool
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda kind: (limit, limit))
    text = "The address space of a process is limited to .* GB, less than .*: lift that limit \\(ulimit -v unlimited\\)"
    with pytest.raises(StartError, match=text) if is_refused else contextlib.nullcontext():
        check_address_space()


def test_a_limited_address_space_is_what_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    monkeypatch.setattr("resource.getrlimit", lambda kind: (mapped + 100 * MEGABYTE,) * 2)
    free = host_free_bytes(host(tmp_path, "0::/\n", {}))
    assert abs(free - 100 * MEGABYTE) < 10 * MEGABYTE


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_what_was_freed_goes_back_to_the_system() -> None:
    """Small pieces below one that stays: the C library keeps them."""
    before = resident_bytes()
    pieces = [bytearray(b"x" * 65536) for _ in range(1600)]
    kept = pieces[-1]
    del pieces
    release_freed_memory()
    assert resident_bytes() - before < 50 * MEGABYTE
    assert len(kept) == 65536


def test_a_c_library_that_cannot_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    release_freed_memory()
