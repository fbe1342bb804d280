"""The devices, in one table: which backend computes what on each, and what else differs between them.

The only module that says `cuda`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Callable, Sequence

import torch

from engine.graph_capture import Recorder, Tape, Work
from engine.link.errors import StartError
from engine.link.registry import import_entry
from engine.memory import host_free_bytes
from quant.kernels import compiled_row_counts
from quant.kernels.launch import IS_INTERPRETED

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BFLOAT16_CAPABILITY = (8, 0)
"""Compute capability from which cards multiply in bfloat16; older ones lack the instructions."""
TRITON_CAPABILITY = (7, 5)
"""The oldest cards that Triton compiles for."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMemory:
    """The memory of a device that has its own.

    What a step takes of it can be measured: torch keeps what tensors have freed, so the device's free memory only falls
    until `release_cached`.
    """

    total_bytes: Callable[[], int]
    release_cached: Callable[[], None]
    """Give back what torch keeps of freed tensors."""
    set_limit: Callable[[float], None]
    """Let this process have no more than such a share of all memory."""


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
    penalties: str
    """Key of `engine.sampling.penalties.PENALTIES`."""
    collectives: str
    """Backends of torch.distributed between ranks: also the host's tensors are gathered, while weights load."""
    computes_in_float32: bool
    """Kernels multiply in float32 whatever the weights are stored in: bfloat16 weights are exact under float32."""
    is_memory_shared: bool
    """Whether all ranks of a host take from the same memory."""
    free_memory_bytes: Callable[[], int]
    """Memory that can still be used."""
    architecture: str | None = None
    """What matrix kernels are tuned for, as `sm_90` or `gfx942`; None: nothing."""
    memory: DeviceMemory | None = None
    """None: the memory is the host's, and a step's share of it is estimated."""
    make_recorder: Callable[[], Recorder] | None = None
    """What captures the work of a step as a graph; None: there is nothing like it."""
    has_graph_collectives: bool = False
    """Whether what the ranks send each other is captured, too."""
    repeats_calls: bool = False
    """Whether the calls of compiled functions that make up a step can be recorded, and made again by one call."""
    row_variants: Sequence[int] = ()
    """Row counts of which each has kernels of its own, which are compiled when they are first used."""
    is_asynchronous: bool = False
    """Whether a launch returns before the device has done the work, so that the host gains time for the next step."""
    half_dtype: str = "bfloat16"
    """What --dtype auto takes where kernels compute in the dtype of the weights."""
    step_limit_s: float | None = None
    """Longest step while anything else runs or waits, unless a flag says it; None: steps are short anyway."""
    spares_streams: bool = False
    """Whether what prompts add to a step is held to a multiple of what decoding alone takes, unless a flag says how
    long steps may be."""
    alone_step_limit_s: float | None = None
    """Longest step of a request that is alone."""

    def usable_bytes(self, share: float) -> int:
        """Free memory of which this process may use `share`.

        On a device with its own memory that is a share of all of it, as in TGI; on a host, of what is free.
        """
        free_bytes = self.free_memory_bytes()
        if self.memory is None:
            return int(free_bytes * share)
        return min(free_bytes, int(self.memory.total_bytes() * share))

    def activation_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.computes_in_float32 else dtype

    def kv_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the KV cache: where kernels compute in float32, bfloat16 unless `dtype` is float32."""
        if not self.computes_in_float32:
            return dtype
        return torch.float32 if dtype == torch.float32 else torch.bfloat16


class CudaRecorder:
    """Implements `Recorder` with graphs that share a pool of memory: one graph at a time is replayed."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(self, work: Work) -> Work:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()  # libraries take their memory and kernels compile: neither may happen while it is captured
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # NCCL watches its work from another thread, which a global capture would not bear.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            result = work()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


def find_cuda(local_rank: int) -> Device | None:
    """The rank's GPU, if this torch sees any. Raises StartError where it sees fewer GPUs than there are ranks."""
    if not torch.cuda.is_available():
        return None
    _check_num_gpus(local_rank)
    torch.cuda.set_device(local_rank)
    torch_device = torch.device("cuda", local_rank)
    capability = torch.cuda.get_device_capability(torch_device)
    _add_in_float32()
    has_triton = importlib.util.find_spec("triton") is not None and capability >= TRITON_CAPABILITY
    kernels = "triton" if has_triton else "torch"
    return Device(
        torch_device=torch_device,
        attention=kernels,
        ops=kernels,
        matrices=kernels,
        sampler=kernels,
        masks=kernels,
        penalties=kernels,
        collectives="cpu:gloo,cuda:nccl",
        computes_in_float32=False,
        is_memory_shared=False,
        free_memory_bytes=lambda: torch.cuda.mem_get_info(torch_device)[0],
        architecture=_architecture(torch_device),
        memory=_cuda_memory(torch_device),
        make_recorder=lambda: CudaRecorder(torch_device),
        has_graph_collectives=True,
        row_variants=compiled_row_counts(kernels),
        is_asynchronous=True,
        half_dtype="bfloat16" if capability >= BFLOAT16_CAPABILITY else "float16",
    )


def _check_num_gpus(local_rank: int) -> None:
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise StartError(
            f"shard {local_rank} of this host has no GPU, torch sees {num_gpus}: start at most {num_gpus} shards here "
            "by --num-shard, or let more GPUs be seen (CUDA_VISIBLE_DEVICES, docker's --gpus)"
        )


def _add_in_float32() -> None:
    """Qwen2's sums leave the range of float16: they are float32 until they are complete."""
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def _architecture(device: torch.device) -> str:
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _cuda_memory(torch_device: torch.device) -> DeviceMemory:
    return DeviceMemory(
        total_bytes=lambda: torch.cuda.mem_get_info(torch_device)[1],
        release_cached=torch.cuda.empty_cache,
        set_limit=lambda share: torch.cuda.set_per_process_memory_fraction(share, torch_device),
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
        penalties="torch",
        collectives="gloo",
        computes_in_float32=True,
        is_memory_shared=True,
        free_memory_bytes=host_free_bytes,
        repeats_calls=True,
        step_limit_s=0.25,
        spares_streams=True,
        alone_step_limit_s=1.0,
    )


def find_interpreted(local_rank: int) -> Device | None:
    """A stand-in for a GPU: its kernels, run by Triton's interpreter on the processor where TRITON_INTERPRET=1."""
    if not IS_INTERPRETED:
        return None
    return Device(
        torch_device=torch.device("cpu"),
        attention="triton",
        ops="triton",
        matrices="triton",
        sampler="triton",
        masks="triton",
        penalties="triton",
        collectives="gloo",
        computes_in_float32=False,
        is_memory_shared=True,
        free_memory_bytes=host_free_bytes,
        make_recorder=Tape,
        row_variants=compiled_row_counts("triton"),
        is_asynchronous=True,
    )


DEVICES: dict[str, str] = {
    "cuda": "engine.device:find_cuda",
    "cpu": "engine.device:find_cpu",
    "interpreted": "engine.device:find_interpreted",
}
"""Name -> lazy "module:function" that makes the `Device` of a local rank, or returns None where there is none.

The first device that is there is taken, so `interpreted` is only what a test asks for.
"""

ABSENCES: dict[str, str] = {
    "cuda": "torch {version} sees no GPU: install a build of torch for GPUs, let the process see one (docker's "
    "--gpus), or leave --device out",
    "interpreted": "it is for tests, under TRITON_INTERPRET=1: leave --device out",
}
"""The reason why a device that was asked for can't be had, with the version of torch filled in."""


def detect_device(local_rank: int = 0, name: str = "auto") -> Device:
    """The rank's device: the one of that name, or the first of the table that is there.

    Raises StartError in words where there is none.
    """
    if name != "auto":
        named: Device | None = import_entry(DEVICES, name, "device")(local_rank)
        if named is None:
            reason = ABSENCES.get(name, "this machine has none: leave --device out")
            raise StartError(f"--device {name}: {reason.format(version=torch.__version__)}")
        return named
    for candidate in DEVICES:
        device: Device | None = import_entry(DEVICES, candidate, "device")(local_rank)
        if device is not None:
            _log_unused_accelerator(device)
            return device
    raise StartError(f"this machine has none of the devices that are supported: {', '.join(DEVICES)}")


def _log_unused_accelerator(device: Device) -> None:
    """Say that torch sees an accelerator which no row of the table is for."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type != device.torch_device.type:
        logger.warning(
            "torch sees an accelerator of type %s, which is not supported: %s computes instead",
            accelerator.type,
            device.torch_device.type,
        )


def resolve_dtype(name: str, checkpoint_dtype: object, device: Device) -> torch.dtype:
    """The dtype to run in: `auto` is the checkpoint's, but 16 bits where kernels compute in the dtype of the weights.

    Raises StartError for an unknown dtype.
    """
    if name == "auto":
        name = str(checkpoint_dtype or "float32").removeprefix("torch.")
        if not device.computes_in_float32:
            name = device.half_dtype
    if name not in DTYPES:
        raise StartError(f"dtype {name!r} is not supported: give --dtype one of {', '.join(DTYPES)}")
    if name == "bfloat16" and device.half_dtype != name:
        raise StartError("this GPU does not compute in bfloat16: give --dtype float16, or leave it out")
    return DTYPES[name]
