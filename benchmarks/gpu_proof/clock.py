"""The clock of measurements: replays of a graph between events on a card, one call by the host's clock elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from engine.device import Device

Call = Callable[[], object]

WARM_UPS = 2
REPLAYS = 5
MIN_SECONDS, MAX_REPLAYS = 0.01, 100
"""A measurement goes on for so long, and for so many replays at the longest."""


def synchronize(device: Device) -> None:
    """Wait for everything that the device was given."""
    if device.torch_device.type != "cpu":
        torch.accelerator.synchronize()


def call_seconds(device: Device, calls: Sequence[Call]) -> float:
    """Seconds that one of `calls` takes on the device, launch gaps left out: they are replayed as one graph.

    Calls differ in their inputs, so that together they read more than caches hold.
    """
    if device.torch_device.type == "cpu":
        return host_seconds(device, calls[0], repeats=1)
    torch.cuda.synchronize()  # what made the inputs is on another stream
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for call in list(calls)[:WARM_UPS]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    seconds: list[float] = []
    while len(seconds) < REPLAYS or (sum(seconds) < MIN_SECONDS and len(seconds) < MAX_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    return statistics.median(seconds) / len(calls)


def host_seconds(device: Device, call: Call, *, repeats: int, warm_ups: int = 0) -> float:
    """The median of seconds from a call's beginning until the device has done it, by the host's clock."""
    seconds = []
    for index in range(warm_ups + repeats):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        if index >= warm_ups:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
