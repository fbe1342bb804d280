"""The devices, in one table: which backend computes what on each, and what else differs between them.

The only module that says `cuda`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from engine.link.errors import StartError
from engine.link.registry import import_entry
from engine.memory import host_free_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One rank's device and the choices that follow from it."""

    torch_device: torch.device
    attention: str
    """Key of `engine.attention.ATTENTION_BACKENDS`."""
    ops: str
    """Key of `engine.layers.OPS`."""
    matrices: str
    """Key of `quant.kernels.MATRICES`."""
    sampler: str
    """Key of `engine.sampling.sampler.SAMPLERS`."""
    masks: str
    """Key of `engine.sampling.grammar.MASKS`."""
    collectives: str
    """Backend of torch.distributed between ranks with this device."""
    computes_in_float32: bool
    """Kernels multiply in float32 whatever the weights are stored in: bfloat16 weights are exact under float32."""
    is_memory_shared: bool
    """Whether all ranks of a host take from the same memory."""
    free_memory_bytes: Callable[[], int]
    """Memory that can still be used."""
    step_limit_s: float | None = None
    """Longest step while anything else runs or waits; None: steps are short anyway."""
    alone_step_limit_s: float | None = None
    """Longest step of a request that is alone."""

    def activation_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.computes_in_float32 else dtype

    def kv_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the KV cache: where kernels compute in float32, bfloat16 unless `dtype` is float32."""
        if not self.computes_in_float32:
            return dtype
        return torch.float32 if dtype == torch.float32 else torch.bfloat16


def find_cuda(local_rank: int) -> Device | None:
    """The rank's GPU, if this torch sees any."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.set_device(local_rank)
    torch_device = torch.device("cuda", local_rank)
    return Device(
        torch_device=torch_device,
        attention="torch",
        ops="torch",
        matrices="torch",
        sampler="torch",
        masks="torch",
        collectives="nccl",
        computes_in_float32=False,
        is_memory_shared=False,
        free_memory_bytes=lambda: torch.cuda.mem_get_info(torch_device)[0],
    )


def find_cpu(local_rank: int) -> Device:
    """The host's processor, which all of its ranks share."""
    return Device(
        torch_device=torch.device("cpu"),
        attention="cpu",
        ops="cpu",
        matrices="cpu",
        sampler="cpu",
        masks="cpu",
        collectives="gloo",
        computes_in_float32=True,
        is_memory_shared=True,
        free_memory_bytes=host_free_bytes,
        step_limit_s=1.0,
        alone_step_limit_s=5.0,
    )


DEVICES: dict[str, str] = {
    "cuda": "engine.device:find_cuda",
    "cpu": "engine.device:find_cpu",
}
"""Name -> lazy "module:function" that makes the `Device` of a local rank, or returns None where there is none.

The first device that is there is taken.
"""


def detect_device(local_rank: int = 0) -> Device:
    """The rank's device. Raises StartError if there is none of the table."""
    for name in DEVICES:
        device: Device | None = import_entry(DEVICES, name, "device")(local_rank)
        if device is not None:
            return device
    raise StartError(f"this machine has none of the devices that are supported: {', '.join(DEVICES)}")


def resolve_dtype(name: str, checkpoint_dtype: object, device: Device) -> torch.dtype:
    """The dtype to run in: `auto` is the checkpoint's, but 16 bits where kernels compute in the dtype of the weights.

    Raises StartError for an unknown dtype.
    """
    if name == "auto":
        name = str(checkpoint_dtype or "float32").removeprefix("torch.")
        if not device.computes_in_float32:
            name = "bfloat16"
    if name not in DTYPES:
        raise StartError(f"dtype {name!r} is not supported: give --dtype one of {', '.join(DTYPES)}")
    return DTYPES[name]
