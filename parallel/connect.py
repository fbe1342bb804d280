"""The choice of collectives once all ranks have met, and of the memory or network that they use."""

from __future__ import annotations

import logging
import os

import torch

from parallel.shared_memory import SharedMemoryCollectives, memory_bytes
from parallel.state import Collectives
from parallel.symmetric_memory import allocate_one_shot_sum, with_small_sums
from parallel.torch_collectives import TorchCollectives
from parallel.world import Rendezvous, host_key, interface_of

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 1800.0
"""Longest wait of one rank for another while weights load."""


def make_collectives(
    rendezvous: Rendezvous,
    device: torch.device,
    backend: str,
    num_threads: int,
    *,
    is_memory_shared: bool,
    may_share_memory: bool = True,
) -> Collectives:
    """Make the fastest collectives that all ranks can have. Raises RankLostError.

    `backend` is the one of torch.distributed for the device. `is_memory_shared`: the device's memory is the host's, so
    that ranks of one host can share it; they do unless `may_share_memory` is false.
    """
    is_one_host = len(set(rendezvous.exchange(host_key()))) == 1
    is_sharing = may_share_memory and is_one_host and is_memory_shared
    if is_sharing and (shared := _share_memory(rendezvous, num_threads)) is not None:
        return shared
    _choose_interface(rendezvous)
    rank, size = rendezvous.world.rank, rendezvous.world.size
    collectives = TorchCollectives(backend, rendezvous.open_store(), rank, size, START_TIMEOUT_S)
    if is_memory_shared or not is_one_host:
        return collectives
    return with_small_sums(collectives, rank, device, lambda: allocate_one_shot_sum(collectives.group_name, device))


def _share_memory(rendezvous: Rendezvous, num_threads: int) -> SharedMemoryCollectives | None:
    """Collectives through rank 0's memory; None: a rank can't open it, because it may not see rank 0's files."""
    rank, size = rendezvous.world.rank, rendezvous.world.size
    path, fd = "", -1
    if rank == 0:
        fd = os.memfd_create("pytgi-collectives")
        os.ftruncate(fd, memory_bytes(size))
        path = f"/proc/{os.getpid()}/fd/{fd}"
    path = rendezvous.exchange(path)[0]
    try:
        if rank:
            fd = os.open(path, os.O_RDWR)
        problem = ""
    except OSError as error:
        problem = str(error)
    problems = [text for text in rendezvous.exchange(problem) if text]
    if problems:
        logger.info("The ranks can't share memory (%s): gloo is used, which is slower", problems[0])
        if fd >= 0:
            os.close(fd)
        return None
    # Ranks that are bound to nodes of the host's memory have processors of their own.
    processors = set[int]().union(*rendezvous.exchange(sorted(os.sched_getaffinity(0))))
    is_crowded = size * num_threads > len(processors)
    collectives = SharedMemoryCollectives(fd, rank, size, START_TIMEOUT_S, is_crowded=is_crowded)
    rendezvous.exchange("")  # no rank starts before all have mapped it
    os.close(fd)
    return collectives


def _choose_interface(rendezvous: Rendezvous) -> None:
    """Tell gloo and NCCL to use the network on which the ranks have met; variables that the user has set win."""
    address = rendezvous.peers[0].control.getsockname()[0]
    interface = interface_of(address)
    if interface is None:
        logger.warning("No network interface has the address %s: gloo and NCCL choose one by themselves", address)
        return
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, interface)
