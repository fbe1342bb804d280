"""What differs between devices, in one place. The only module that says `cuda`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from engine.errors import StartError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """One device and the choices that follow from it."""

    torch_device: torch.device
    attention_backend: str
    """Key of `engine.attention.ATTENTION_BACKENDS`."""
    ops: str
    """Key of `engine.layers.OPS`."""
    sampler: str
    """Key of `engine.sampler.SAMPLERS`."""
    is_widening: bool
    """Kernels multiply in float32 whatever the weights are stored in, so a bfloat16 weight is exact under float32."""
    step_limit_s: float | None
    """Longest step while anything else runs or waits; None: steps are short anyway."""
    alone_step_limit_s: float | None
    """Longest step of a request that is alone."""

    def activation_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.is_widening else dtype

    def kv_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """On a CPU float32 under `--dtype float32`, else bfloat16 (design section 3)."""
        if not self.is_widening:
            return dtype
        return torch.float32 if dtype == torch.float32 else torch.bfloat16

    def free_memory_bytes(self) -> int:
        """Memory that can still be used: on a CPU the smaller of MemAvailable and what the cgroup leaves."""
        if self.torch_device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.torch_device)
            return free
        return min(_mem_available_bytes(), _cgroup_free_bytes())


def detect_device(local_rank: int = 0) -> Device:
    """The rank's accelerator if this torch has one, else the CPU."""
    if torch.cuda.is_available():
        return Device(
            torch_device=torch.device("cuda", local_rank),
            attention_backend="torch",
            ops="torch",
            sampler="torch",
            is_widening=False,
            step_limit_s=None,
            alone_step_limit_s=None,
        )
    return Device(
        torch_device=torch.device("cpu"),
        attention_backend="cpu",
        ops="cpu",
        sampler="cpu",
        is_widening=True,
        step_limit_s=1.0,
        alone_step_limit_s=5.0,
    )


def resolve_dtype(name: str, checkpoint_dtype: str | None, device: Device) -> torch.dtype:
    """The dtype to run in: `auto` is the checkpoint's own, on GPUs 16 bits. Raises StartError for an unknown one."""
    if name == "auto":
        name = (checkpoint_dtype or "float32").removeprefix("torch.")
        if not device.is_widening:
            name = "bfloat16"
    if name not in DTYPES:
        raise StartError(f"dtype {name!r} is not supported: give --dtype one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _mem_available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise StartError("/proc/meminfo does not tell MemAvailable: give --max-batch-total-tokens")


def _cgroup_free_bytes() -> int:
    """What the cgroup (v2) still allows; its page cache counts as free, since the kernel gives it back."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit == "max":
            return 1 << 62
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        return int(limit) - used + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return 1 << 62
