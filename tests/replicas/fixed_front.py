"""A front without Ray: `python -m tests.replicas.fixed_front PORT ADDRESS`, every lease is of the server at ADDRESS."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from typing import Any

from aiohttp import web

from server.replicas.front import Front


class FixedLease:
    """A call that stays open, as Serve's."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def __aiter__(self) -> AsyncGenerator[str]:
        yield self._address

    def cancel(self) -> None:
        pass


class FixedHandle:
    """As much of a Serve handle as leases need."""

    def __init__(self, address: str) -> None:
        self._address = address

    def options(self, **options: Any) -> FixedHandle:
        return self

    @property
    def remote(self) -> Any:
        return lambda blocks: FixedLease(self._address)


if __name__ == "__main__":
    front = Front(FixedHandle(sys.argv[2]), is_strict=False)
    web.run_app(front.app(), host="127.0.0.1", port=int(sys.argv[1]), handler_cancellation=True, print=None)
