"""Flags, visible devices and torchrun's variables -> `Sharding`: the number of shards and where they run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.link.processor import available_cores
from server.launcher.errors import ArgumentError
from server.launcher.host import can_use_gpus

LOCAL_ADDRESS = "127.0.0.1"
DEFAULT_MASTER_PORT = 29500
"""TGI's and torchrun's."""
MAX_HOST_SHARDS = 8
"""Shards that a processor serves whatever its cores; more need as many cores."""
HOST_DEVICES = frozenset({"cpu", "interpreted"})
"""Values of --device with which visible GPUs don't count."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """The number of shards, the ranks that this launcher starts, and the place where all ranks meet."""

    size: int = 1
    """Shards on all hosts."""
    num_hosts: int = 1
    ranks: tuple[int, ...] = (0,)
    """Ranks that this launcher starts. The launcher of rank 0 also serves HTTP."""
    first_local_rank: int = 0
    local_size: int = 1
    """Ranks on this host, whoever starts them."""
    address: str = LOCAL_ADDRESS
    port: int = 0
    """0 means any free port."""
    is_torchrun: bool = False


def resolve_sharding(values: Mapping[str, Any], environ: Mapping[str, str]) -> Sharding:
    """Apply TGI's rules for --sharded and --num-shard (`docs/command-line.md`, 4.1), and ours for several hosts.

    `values` holds what the user or torchrun gave, by the rows' attributes. Raises ArgumentError.
    """
    if "rank" in values and "world_size" in values:
        return _torchrun_sharding(values)
    size = _num_shards(values, environ)
    num_hosts, host = values.get("nnodes", 1), values.get("node_rank", 0)
    if host >= num_hosts:
        raise ArgumentError(f"--node-rank {host} must be < --nnodes {num_hosts}: hosts are counted from 0")
    if size % num_hosts:
        raise ArgumentError(f"--num-shard {size} can't be spread evenly over --nnodes {num_hosts}")
    if num_hosts > 1 and "master_addr" not in values:
        raise ArgumentError("--nnodes needs --master-addr: an address of the first host that the others can reach")
    local_size = size // num_hosts
    _check_devices(local_size, values, environ)
    return Sharding(
        size=size,
        num_hosts=num_hosts,
        ranks=tuple(range(host * local_size, (host + 1) * local_size)),
        local_size=local_size,
        address=values.get("master_addr", LOCAL_ADDRESS),
        port=values.get("master_port") or (DEFAULT_MASTER_PORT if num_hosts > 1 else 0),
    )


def _torchrun_sharding(values: Mapping[str, Any]) -> Sharding:
    """The one rank that torchrun starts this launcher for."""
    rank, size, port = values["rank"], values["world_size"], values.get("master_port")
    if values.get("num_shard", size) != size:
        raise ArgumentError(f"--num-shard {values['num_shard']}, but torchrun starts {size}: leave --num-shard out")
    for name in ("nnodes", "node_rank"):
        if name in values:
            raise ArgumentError(f"torchrun says which hosts there are: leave --{name.replace('_', '-')} out")
    if rank >= size or port is None:
        raise ArgumentError("RANK must be < WORLD_SIZE and MASTER_PORT set, as torchrun does: unset RANK, or fix that")
    local_size = values.get("local_world_size", size)
    return Sharding(
        size=size,
        num_hosts=-(-size // local_size),
        ranks=(rank,),
        first_local_rank=values.get("local_rank", 0),
        local_size=local_size,
        address=values.get("master_addr", LOCAL_ADDRESS),
        port=port,
        is_torchrun=True,
    )


def _num_shards(values: Mapping[str, Any], environ: Mapping[str, str]) -> int:
    num_shard, is_sharded = values.get("num_shard"), values.get("sharded")
    if num_shard is not None:
        if num_shard < 1:
            raise ArgumentError("`num_shard` cannot be < 1")
        if is_sharded and num_shard == 1:
            raise ArgumentError("`sharded` is true but `num_shard` <= 1")
        return int(num_shard)
    if is_sharded is False:
        return 1
    num_devices = _num_visible_devices(environ) if _is_gpu_possible(values) else 0
    if is_sharded and num_devices <= 1:
        raise ArgumentError(f"`sharded` is true but only found {num_devices} CUDA devices")
    return max(1, num_devices)


def _is_gpu_possible(values: Mapping[str, Any]) -> bool:
    return values.get("device", "auto") not in HOST_DEVICES and can_use_gpus()


def _check_devices(local_size: int, values: Mapping[str, Any], environ: Mapping[str, str]) -> None:
    """Raise ArgumentError for more shards on this host than GPUs or, without any, than its processor could serve."""
    if local_size == 1:
        return
    num_gpus = (_num_visible_devices(environ) or _num_nvidia_devices()) if _is_gpu_possible(values) else 0
    num_devices = num_gpus or max(MAX_HOST_SHARDS, available_cores())
    if local_size > num_devices:
        devices = f"{num_gpus} GPUs that can be seen" if num_gpus else f"{num_devices} that a processor serves here"
        raise ArgumentError(f"--num-shard means {local_size} shards on this host, more than the {devices}")


def _num_visible_devices(environ: Mapping[str, str]) -> int:
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"):
        if (devices := environ.get(name)) is not None:
            return len(devices.split(",")) if devices not in ("all", "void") else _num_nvidia_devices()
    return 0


def _num_nvidia_devices() -> int:
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
