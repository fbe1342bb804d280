"""The processor: its name, and the cores that this process may use."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path


def processor_name() -> str | None:
    """As Linux has it; None: it has none, as on ARM."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return None


def available_cores() -> int:
    """Cores this process may use: its affinity, cut by the cgroup's quota; never the machine's count."""
    return min([len(os.sched_getaffinity(0)), *_quotas(Path("/"))])


def _quotas(root: Path) -> Iterator[int]:
    """Cores that each control group allows, from this process's group to the root, of version 2 or version 1."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount = root / "sys/fs/cgroup"
        elif "cpu" in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controllers
            mount = mount if mount.is_dir() else root / "sys/fs/cgroup/cpu"
        else:
            continue
        group = mount / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount):
                with contextlib.suppress(OSError, ValueError):
                    quota, period = _quota(folder, is_v2=controllers == "")
                    if quota > 0:
                        yield max(1, math.ceil(quota / period))


def _quota(folder: Path, *, is_v2: bool) -> tuple[int, int]:
    """Microseconds of processor time, and of the period that they count for. Raises ValueError if there is no limit."""
    if is_v2:
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota), int(period)
    return int((folder / "cpu.cfs_quota_us").read_text()), int((folder / "cpu.cfs_period_us").read_text())
