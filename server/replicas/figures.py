"""The figures of all replicas as one stream: each replica's server is watched while somebody watches the front."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import aiohttp
import msgspec

from server.answers.sse import event

logger = logging.getLogger("front")

EVENTS_PATH = "/dashboard/events"
PERIOD_S = 1.0
"""Seconds from one line to the next, as at each replica."""
FIND_S = 5.0
"""Seconds from one search for new replicas to the next."""
FIND_TIMEOUT_S = 5.0
"""A replica has so long to say where it is, and then to take a connection."""
SILENCE_S = 5.0
"""A replica that says nothing for so long has no figures until it speaks again."""
KEY_HEADERS = ("authorization", "x-api-key")
_DATA = b"data: "


class _Line(msgspec.Struct):
    """The line of one server, or of all; figures pass as they are."""

    replicas: dict[str, msgspec.Raw]


class ReplicaFigures:
    """Watches the servers of the replicas behind `handle`, a handle of the Serve deployment."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.key: Mapping[str, str] = {}
        """The headers that carry the API key, of a client to whom a replica gave its figures."""

    async def lines(self) -> AsyncGenerator[bytes]:
        """An event a second, with the figures that each replica gave last."""
        latest: dict[str, msgspec.Raw] = {}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=FIND_TIMEOUT_S, sock_read=SILENCE_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            finding = asyncio.create_task(self._find(session, latest))
            try:
                while not finding.done():
                    await asyncio.sleep(PERIOD_S)
                    yield event(_Line(dict(sorted(latest.items()))))
                finding.result()
            finally:
                finding.cancel()
                await asyncio.wait([finding])

    async def _find(self, session: aiohttp.ClientSession, latest: dict[str, msgspec.Raw]) -> None:
        """Watch every replica that there is, each in a task of its own."""
        watching: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                places = await self._handle.broadcast("place").results_async(
                    timeout_s=FIND_TIMEOUT_S, return_exceptions=True
                )
                for name, address in (place for place in places if not isinstance(place, BaseException)):
                    if name not in watching or watching[name].done():
                        watching[name] = asyncio.create_task(self._watch(session, name, address, latest))
                await asyncio.sleep(FIND_S)
        finally:
            for task in watching.values():
                task.cancel()

    async def _watch(
        self, session: aiohttp.ClientSession, name: str, address: str, latest: dict[str, msgspec.Raw]
    ) -> None:
        """Keep the replica's last figures in `latest` until it ends or falls silent."""
        try:
            async with session.get(f"http://{address}{EVENTS_PATH}", headers=self.key, raise_for_status=True) as answer:
                async for line in answer.content:
                    if line.startswith(_DATA):
                        (latest[name],) = msgspec.json.decode(line[len(_DATA) :], type=_Line).replicas.values()
        except (aiohttp.ClientError, TimeoutError) as error:
            logger.info("The figures of replica %s end: %r", name, error)
        finally:
            latest.pop(name, None)
