"""The host of the launcher: cores, addresses, and the versions that a bug report needs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import ipaddress
import math
import os
import platform
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

GPU_BUILDS = "cuda hip".split()
"""Names in torch's version.py of which a build for GPUs says the version, and others None."""
REPORTED_PACKAGES = ("pytgi", "torch", "numba", "safetensors", "tokenizers", "fastapi", "uvicorn", "huggingface_hub")
NVIDIA_SMI_TIMEOUT_S = 10


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


def can_use_gpus() -> bool:
    """Whether the installed torch is a build for GPUs. Only its small file of versions is read: torch loads slowly."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return False
    try:
        versions = runpy.run_path(str(Path(torch.origin).with_name("version.py")))
    except OSError:
        return False
    return any(versions.get(name) for name in GPU_BUILDS)


def is_ip_address(hostname: str) -> bool:
    try:
        ipaddress.ip_address(hostname)
    except ValueError:
        return False
    return True


def describe_runtime() -> str:
    """Versions and hardware, one per line, for `--env`."""
    lines = [f"Target: {platform.machine()}-{platform.system().lower()}", f"Python: {platform.python_version()}"]
    lines += [f"{name}: {_version(name)}" for name in REPORTED_PACKAGES]
    lines += [f"Cores: {available_cores()} of {os.cpu_count()}, {_cpu_model()}", f"nvidia-smi:\n{_nvidia_smi()}"]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown processor"


def _nvidia_smi() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "N/A"
    try:
        done = subprocess.run([program], capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"N/A ({error})"
    return done.stdout.rstrip()
