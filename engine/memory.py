"""How much memory there is, and what of it the KV cache and a step may take. Plain numbers: no torch.

Free memory of a host is the kernel's MemAvailable, cut by what the control groups of this process (v2, or v1's memory
controller; a container's `--memory`) leave. Page cache counts as free: the kernel gives it back.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.link.config import EngineConfig
from engine.link.errors import StartError

logger = logging.getLogger(__name__)

DEFAULT_KV_TOKENS = 32768
"""KV capacity on a CPU without --max-batch-total-tokens: one full window or this, whichever is more."""
SUGGESTED_SHARE = 0.95
"""Of what fits at this moment, what a sentence suggests: free memory moves from one start to the next."""
UNLIMITED = 1 << 60
"""Control groups of version 1 write a huge number where there is no limit."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemoryNeeds:
    """What a model takes, in bytes."""

    weights: int
    per_block: int
    per_step_token: int
    """Of activations, for every token that one step computes."""
    block_size: int

    def blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


def release_freed_memory() -> None:
    """Give the system back what this process has freed. glibc keeps it, in holes that nothing may fill again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries keep less
        trim(0)


def check_weights_fit(weight_bytes: int, free_bytes: int, memory_fraction: float) -> None:
    """`free_bytes` are what `memory_fraction` leaves. Raises StartError."""
    if weight_bytes > free_bytes:
        raise StartError(
            f"Not enough memory for the model: its weights take {_size(weight_bytes)}, {_size(free_bytes)} are free: "
            f"serve a smaller model, or {_more_memory(memory_fraction)}"
        )


def plan_kv_blocks(
    config: EngineConfig, needs: MemoryNeeds, *, free_bytes: int, window: int, has_default_cap: bool
) -> int:
    """KV blocks that the flags ask for, or that fit. Raises StartError when they don't fit, with a value that would.

    `free_bytes` is counted before the weights are there. `has_default_cap`: take no more than one window or
    `DEFAULT_KV_TOKENS` without being asked, as others use this memory too.
    """
    available = int((free_bytes - needs.weights) * config.kv_memory_share)
    most = available // needs.per_block
    asked = config.max_batch_total_tokens or config.max_total_tokens or needs.block_size
    if needs.blocks(asked) > most:
        is_share_too_small = needs.blocks(asked) <= (free_bytes - needs.weights) // needs.per_block
        raise StartError(_kv_refusal(config, needs, available, is_share_too_small=is_share_too_small))
    if config.max_batch_total_tokens is not None:
        return needs.blocks(asked)
    if not has_default_cap:
        return most
    return min(most, needs.blocks(max(config.max_total_tokens or window, DEFAULT_KV_TOKENS)))


def _kv_refusal(config: EngineConfig, needs: MemoryNeeds, available: int, *, is_share_too_small: bool) -> str:
    name = "max_total_tokens" if config.max_batch_total_tokens is None else "max_batch_total_tokens"
    asked = config.max_batch_total_tokens or config.max_total_tokens
    suggested = _suggested(available // needs.per_block * needs.block_size, needs)
    if asked and suggested:
        fix = f"lower --{name.replace('_', '-')} to {suggested}"
    elif is_share_too_small:
        fix = f"raise TGI_WIGGLE_ROOM ({config.kv_memory_share:g})"
    else:
        fix = _more_memory(config.memory_fraction)
    what = f"to handle `{name}={asked}`" if asked else f"for the smallest KV cache, {needs.block_size} tokens"
    taken = needs.blocks(asked or needs.block_size) * needs.per_block
    return (
        f"Not enough memory {what}: the KV cache would take {_size(taken)} of {_size(available)} that are free for it: "
        f"{fix}"
    )


def plan_prefill_tokens(wanted: int, needs: MemoryNeeds, *, free_bytes: int, num_blocks: int, is_asked: bool) -> int:
    """Tokens per step whose activations fit beside weights and KV cache, `wanted` at most.

    Raises StartError when the user asked for more; otherwise fewer are taken, with a warning.
    """
    most = (free_bytes - needs.weights - num_blocks * needs.per_block) // needs.per_step_token
    if wanted <= most:
        return wanted
    suggested = _suggested(most, needs)
    if not suggested:
        raise StartError(
            "Not enough memory for a step beside the weights and a KV cache of "
            f"{num_blocks * needs.block_size} tokens: lower --max-batch-total-tokens, or give the process more memory"
        )
    if is_asked:
        raise StartError(
            f"Not enough memory to handle {wanted} prefill tokens. You need to decrease `--max-batch-prefill-tokens` "
            f"to {suggested}"
        )
    logger.warning(
        "Reducing the max batch prefill from %d to %d because there is not enough memory to support it.", wanted, most
    )
    return most


def _suggested(num_tokens: int, needs: MemoryNeeds) -> int:
    """A little less than `num_tokens`, in whole blocks; 0: there is nothing to suggest."""
    return max(0, int(num_tokens * SUGGESTED_SHARE) // needs.block_size * needs.block_size)


def _more_memory(memory_fraction: float) -> str:
    if memory_fraction < 1:
        return f"raise --cuda-memory-fraction {memory_fraction:g}"
    return "give the process more memory"


def _size(num_bytes: int) -> str:
    if num_bytes < 100_000_000:
        return f"{max(0, num_bytes) / 1e6:.3g} MB"
    return f"{num_bytes / 1e9:.1f} GB"


def host_free_bytes(root: Path = Path("/")) -> int:
    """Memory of the host that this process can still use. Raises StartError where the kernel doesn't tell."""
    return min(_mem_available(root / "proc/meminfo"), *_cgroup_free(root))


def _mem_available(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise StartError(f"{meminfo} does not tell MemAvailable: this kernel is too old, 3.14 or newer is needed")


def _cgroup_free(root: Path) -> Iterator[int]:
    """What each control group from this process's own to the root leaves; at least one number."""
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
