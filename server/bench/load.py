"""Sending a trace: so many requests at a time (closed loop), or each at its moment (open loop)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.bench.connection import Address, Exchange, exchange
from server.bench.trace import Plan
from server.bench.wires import Options, Wire


@dataclass(frozen=True)
class Target:
    """A server and how to speak with it."""

    address: Address
    wire: Wire
    options: Options
    timeout_s: float
    """Longest time without a byte."""

    async def send(self, plan: Plan) -> Exchange:
        request = self.address.request(self.wire.route, self.wire.body(plan, self.options))
        return await exchange(self.address, request, self.timeout_s)


OnExchange = Callable[[Exchange], None]
"""Takes an exchange once it has ended."""


async def run_closed(target: Target, plans: Sequence[Plan], num_streams: int, on_exchange: OnExchange) -> None:
    """Keep `num_streams` requests under way until all are sent."""
    waiting = iter(plans)

    async def work() -> None:
        for plan in waiting:
            on_exchange(await target.send(plan))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(num_streams, len(plans))):
            group.create_task(work())


async def run_open(target: Target, plans: Sequence[Plan], on_exchange: OnExchange) -> None:
    """Send each request at its moment, however many are under way."""
    loop = asyncio.get_running_loop()
    started = loop.time()

    async def work(plan: Plan) -> None:
        on_exchange(await target.send(plan))

    async with asyncio.TaskGroup() as group:
        for plan in plans:
            await asyncio.sleep(started + plan.at_s - loop.time())
            group.create_task(work(plan))
