"""The clients at work: how many at a time, for how long, and what came of each thing they did."""

from __future__ import annotations

import asyncio
import collections
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.soak import bodies
from benchmarks.soak.clients import KINDS, Client, Kind, Repeats
from benchmarks.soak.wire import ask

ANSWER_TIMEOUT_S = 120.0
PAUSE_S = 0.1
"""Before a client whose connection was lost tries again."""


@dataclass
class Tally:
    """What came of all that the clients did."""

    outcomes: dict[str, collections.Counter[str]] = field(
        default_factory=lambda: collections.defaultdict(collections.Counter)
    )
    """Name of the kind -> outcome -> how often."""
    durations: list[tuple[float, float]] = field(default_factory=list)
    """When a repeated request was answered, and how long that took, in seconds."""
    num_restarts: int = 0

    @property
    def num_requests(self) -> int:
        return sum(counts.total() for counts in self.outcomes.values())

    @property
    def num_wrong(self) -> int:
        return sum(
            count for kind in KINDS for outcome, count in self.outcomes[kind.name].items() if outcome != kind.good
        )


class Load:
    """Clients against one server."""

    def __init__(self, port: int, repeats: Repeats, num_clients: int, window: int, seed: int = 0) -> None:
        self._port = port
        self._repeats = repeats
        self._num_clients = num_clients
        self._window = window
        self._chance = random.Random(seed)

    async def ask_each(self) -> None:
        """Ask every repeated request once, alone; the first time gives the answers that all later ones have to have."""
        for index, call in enumerate(self._repeats.calls):
            outcome = self._repeats.outcome(index, await ask(self._port, *call))
            if outcome != "200":
                raise SystemExit(f"{call[0]} answers {outcome} to {call[1]}")

    async def fill_pools(self) -> None:
        """Have enough to do at a time for every pool of processes and threads to be full."""
        chance = random.Random(self._num_clients)
        calls = [make(chance) for _ in range(self._num_clients) for make in (bodies.own_grammar, bodies.own_chat)]
        await asyncio.gather(*(ask(self._port, *call) for call in calls))

    async def put_on(self, seconds: float, tally: Tally, num_restarts: int = 0) -> None:
        """Let the clients do what they do for so long, and come to the end of it.

        A restart ends all in the middle of it, and new ones begin.
        """
        started = time.monotonic()
        for number in range(num_restarts + 1):
            is_over = asyncio.Event()
            clients = [self._act(index, tally, started, is_over) for index in range(self._num_clients)]
            tasks = [asyncio.create_task(client) for client in clients]
            end = started + seconds * (number + 1) / (num_restarts + 1)
            await asyncio.sleep(end - time.monotonic())
            if number < num_restarts:
                for task in tasks:
                    task.cancel()
                tally.num_restarts += 1
            is_over.set()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result  # a fault of this program

    async def _act(self, index: int, tally: Tally, started: float, is_over: asyncio.Event) -> None:
        """Do one thing after another; all kinds come first, each from another client."""
        kind = KINDS[index % len(KINDS)]
        client = Client(self._port, self._window, self._repeats, random.Random(self._chance.random()))
        try:
            while not is_over.is_set():
                began = time.monotonic()
                outcome = await outcome_of(kind, client)
                tally.outcomes[kind.name][outcome] += 1
                if kind is KINDS[0]:
                    now = time.monotonic()
                    tally.durations.append((now - started, now - began))
                kind = choose_kind(KINDS, client.chance)
        finally:
            client.leave_at_once()


def choose_kind(kinds: Sequence[Kind], chance: random.Random) -> Kind:
    return chance.choices(kinds, [kind.weight for kind in kinds])[0]


async def outcome_of(kind: Kind, client: Client) -> str:
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):  # `wait_for` may swallow the cancellation of a restart
            return await kind.act(client)
    except TimeoutError:
        client.leave_at_once()
        return f"nothing for {ANSWER_TIMEOUT_S:.0f} s"
    except ConnectionError:
        client.leave_at_once()
        await asyncio.sleep(PAUSE_S)
        return "the connection was lost"
