"""`make soak` in seconds instead of hours, and clients that leave at every point: a tiny model on a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.soak.__main__ import WINDOW, Settings, served, soak_server, with_its_end
from benchmarks.soak.bodies import repeated_calls
from benchmarks.soak.clients import Repeats
from benchmarks.soak.judging import judge
from benchmarks.soak.load import Load
from benchmarks.soak.samples import Watch
from tests.e2e.disconnects import NUM_PERMITS, POINTS, REFUSED, disconnect, has_all_permits, held_permits
from tests.e2e.launched import LaunchedServer
from tests.tiny_model import write_tiny_qwen2

SECONDS = 3
DRAIN_TIMEOUT_S = 20.0
MAX_GROWTH_BYTES = 20e6
Served = tuple[LaunchedServer, Watch]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The window is one in which the description of a tool has place, a byte being a token."""
    folder = tmp_path_factory.mktemp("soak")
    write_tiny_qwen2(folder / "model", max_position_embeddings=2048)
    with served(folder / "model", folder / "log", "--max-concurrent-requests", str(NUM_PERMITS)) as served_model:
        yield served_model


async def check_disconnects(served_model: Served, num_requests: int) -> None:
    """Nothing is left of clients that left: blocks, descriptors, tasks, memory, permits."""
    server, watch = served_model
    load = Load(server.port, Repeats(repeated_calls()), NUM_PERMITS // 2, WINDOW)
    await load.ask_each()
    await load.fill_pools()
    await disconnect(server.port, 2 * 3 * len(POINTS), seed=0)
    base = await watch.drained(None, DRAIN_TIMEOUT_S)
    refused = asyncio.Event()
    # Whether a permit ever lacks is a matter of the machine: all are taken until one has lacked.
    async with held_permits(server.port), asyncio.timeout(DRAIN_TIMEOUT_S):
        clients = asyncio.create_task(disconnect(server.port, num_requests, seed=1, refused=refused))
        await refused.wait()
    counts = await clients
    final = await watch.drained(base, DRAIN_TIMEOUT_S)
    print(base, final, dict(counts), sep="\n")
    assert counts.pop(REFUSED) > 0
    assert counts.total() == num_requests and len(counts) == 3 * len(POINTS)
    assert final.is_idle, final.metrics
    for name, before in base.processes.items():
        after = final.processes[name]
        assert after.descriptors <= before.descriptors, name
        assert after.resident - before.resident < max(MAX_GROWTH_BYTES, 0.03 * before.resident), name
    assert final.num_tasks <= base.num_tasks
    assert await has_all_permits(server.port)
    await load.ask_each()  # with the same answers
    assert "Traceback" not in server.log


async def test_clients_that_leave_at_any_point_leave_nothing_behind(server: Served) -> None:
    await check_disconnects(server, 500)


def test_a_short_soak_passes(server: Served, tmp_path: Path) -> None:
    """The last test of this server, which it ends."""
    launched, watch = server
    settings = Settings(tmp_path, tmp_path, SECONDS, num_clients=16, num_restarts=1)
    lines: list[str] = []
    soak = with_its_end(asyncio.run(soak_server(launched, watch, settings, lines.append)), launched)
    print(*lines, sep="\n")
    failed = [f"{check.name}: {'; '.join(check.complaints)}" for check in judge(soak) if not check.is_ok]
    assert not failed
