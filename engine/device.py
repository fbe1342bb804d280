"""What differs between devices, in one place. The only module that says `cuda`."""

from __future__ import annotations

import dataclasses

import torch

from engine.link.errors import StartError
from engine.memory import host_free_bytes

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
    """Key of `engine.sampling.sampler.SAMPLERS`."""
    computes_in_float32: bool
    """Kernels multiply in float32 whatever the weights are stored in, so a bfloat16 weight is exact under float32."""
    step_limit_s: float | None
    """Longest step while anything else runs or waits; None: steps are short anyway."""
    alone_step_limit_s: float | None
    """Longest step of a request that is alone."""

    def activation_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.computes_in_float32 else dtype

    def kv_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """On a CPU float32 under `--dtype float32`, else bfloat16 (design section 3)."""
        if not self.computes_in_float32:
            return dtype
        return torch.float32 if dtype == torch.float32 else torch.bfloat16

    @property
    def is_memory_shared(self) -> bool:
        """Whether all ranks of a host take from the same memory."""
        return self.torch_device.type == "cpu"

    def free_memory_bytes(self) -> int:
        """Memory that can still be used: on a CPU the smaller of MemAvailable and what the cgroup leaves."""
        if self.torch_device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.torch_device)
            return free
        return host_free_bytes()


def detect_device(local_rank: int = 0) -> Device:
    """The rank's accelerator if this torch has one, else the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return Device(
            torch_device=torch.device("cuda", local_rank),
            attention_backend="torch",
            ops="torch",
            sampler="torch",
            computes_in_float32=False,
            step_limit_s=None,
            alone_step_limit_s=None,
        )
    return Device(
        torch_device=torch.device("cpu"),
        attention_backend="cpu",
        ops="cpu",
        sampler="cpu",
        computes_in_float32=True,
        step_limit_s=1.0,
        alone_step_limit_s=5.0,
    )


def resolve_dtype(name: str, checkpoint_dtype: object, device: Device) -> torch.dtype:
    """The dtype to run in: `auto` is the checkpoint's own, on GPUs 16 bits. Raises StartError for an unknown one."""
    if name == "auto":
        name = str(checkpoint_dtype or "float32").removeprefix("torch.")
        if not device.computes_in_float32:
            name = "bfloat16"
    if name not in DTYPES:
        raise StartError(f"dtype {name!r} is not supported: give --dtype one of {', '.join(DTYPES)}")
    return DTYPES[name]
