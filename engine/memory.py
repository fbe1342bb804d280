"""The memory of the host that this process can still use, and giving back what it has freed. No torch.

Free memory of a host is the kernel's MemAvailable, cut by what the control groups of this process (v2, or v1's memory
controller; a container's `--memory`) and its address space (`ulimit -v`) leave. Page cache counts as free: the kernel
gives it back.
"""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.link.errors import StartError

UNLIMITED = 1 << 60
"""Control groups of version 1 write a huge number where there is no limit."""


MIN_ADDRESS_SPACE = 1_500_000_000
"""Bytes. The libraries, their threads and a tiny model map 1.4 GB, most of which is never touched."""


def release_freed_memory() -> None:
    """Give the system back what this process has freed. glibc keeps it, in holes that nothing may fill again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries keep less
        trim(0)


def host_free_bytes(root: Path = Path("/")) -> int:
    """Memory of the host that this process can still use. Raises StartError where the kernel doesn't tell."""
    return min(_mem_available(root / "proc/meminfo"), _address_space_free(), *_cgroup_free(root))


def check_address_space() -> None:
    """To be called before torch is loaded. Raises StartError for a limit with which it can't be."""
    limit = _address_space()
    if limit < MIN_ADDRESS_SPACE:
        raise StartError(
            f"The address space of a process is limited to {limit / 1e9:.1f} GB, less than what the libraries map: "
            "lift that limit (ulimit -v unlimited), and limit memory with a control group, as containers do"
        )


def _address_space() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def _address_space_free() -> int:
    """Bytes that this process can still map."""
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    return _address_space() - num_pages * resource.getpagesize()


def _mem_available(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise StartError(f"{meminfo} does not tell MemAvailable: this kernel is too old, 3.14 or newer is needed")


def _cgroup_free(root: Path) -> Iterator[int]:
    """Bytes that each control group leaves, from this process's own to the root; at least one number."""
    yield UNLIMITED
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
            caches = ("inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            caches = ("total_inactive_file", "total_active_file")
        else:
            continue
        group = mount / path.strip("/")
        # In a container the path may be the host's, of which only the mount point itself can be seen.
        yield from (
            _group_free(folder, *names, caches) for folder in (group, *group.parents) if folder.is_relative_to(mount)
        )


def _group_free(folder: Path, limit_name: str, usage_name: str, cache_names: Iterable[str]) -> int:
    try:
        limit = (folder / limit_name).read_text().strip()
        if limit == "max" or int(limit) >= UNLIMITED:
            return UNLIMITED
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cache = sum(int(stat.get(name, 0)) for name in cache_names)
        return int(limit) - int((folder / usage_name).read_text()) + cache
    except (OSError, ValueError):
        return UNLIMITED
