"""A front without Ray: `python -m tests.replicas.fixed_front PORT ADDRESS`, every lease is of the server at ADDRESS."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from aiohttp import web

from server.replicas.front import Front


class FixedLease:
    """A call that stays open, as Serve's. None for an address: there is no replica."""

    def __init__(self, handle: FixedHandle, address: str | None) -> None:
        self._handle = handle
        self._address = address
        handle.num_open += 1

    async def __aiter__(self) -> AsyncGenerator[str]:
        if self._address is None:
            await asyncio.Event().wait()
        else:
            yield self._address

    def cancel(self) -> None:
        self._handle.num_open -= 1


class FixedHandle:
    """As much of a Serve handle as leases need: one address after the other, the last one for ever."""

    def __init__(self, *addresses: str | None) -> None:
        self._addresses: Iterator[str | None] = itertools.chain(addresses, itertools.repeat(addresses[-1]))
        self.num_open = 0

    def options(self, **options: Any) -> FixedHandle:
        return self

    def remote(self, blocks: Any) -> FixedLease:
        return FixedLease(self, next(self._addresses))


async def serve(handle: FixedHandle, port: int) -> web.AppRunner:
    runner = Front(handle, is_strict=False).runner(drain_s=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    return runner


async def serve_for_ever(port: int, address: str) -> None:
    await serve(FixedHandle(address), port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve_for_ever(int(sys.argv[1]), sys.argv[2]))
