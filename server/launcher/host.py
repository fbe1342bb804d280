"""The host of the launcher: its torch, addresses, and the versions that a bug report needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import ipaddress
import os
import platform
import runpy
import shutil
import subprocess
from pathlib import Path

from engine.link.processor import available_cores, processor_name

GPU_BUILDS = "cuda hip".split()
"""Names in torch's version.py of which a build for GPUs says the version, and others None."""
REPORTED_PACKAGES = ("pytgi", "torch", "numba", "safetensors", "tokenizers", "fastapi", "uvicorn", "huggingface_hub")
NVIDIA_SMI_TIMEOUT_S = 10


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
    cores = f"Cores: {available_cores()} of {os.cpu_count()}, {processor_name() or 'unknown processor'}"
    lines += [cores, f"nvidia-smi:\n{_nvidia_smi()}"]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _nvidia_smi() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "N/A"
    try:
        done = subprocess.run([program], capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"N/A ({error})"
    return done.stdout.rstrip()
