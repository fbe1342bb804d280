"""Routing rules on a simulated fleet: which part of the prompts is found again, and how long tokens take to come.

    python benchmarks/fleet.py [--replicas 1000] [--users 100000] [--rules prefix random round_robin] [--think-s 90]

Discrete events; no model runs. The rule `prefix` is the object that routes in `server/replicas`. Users chat: they read,
think, and send the whole chat again with something new, to replicas that compute prompts one after the other while
they decode. Two costs of a step are measured (README, "Measured": demo model, int8, 2 cores of Zen 4): a prompt's token
and a step of one sequence. That another sequence costs a step as much as a prompt's token is an assumption; so are the
lengths and times of chats, which are constants here.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import statistics
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from server.replicas.prefix_rule import PrefixRule  # noqa: E402

PROMPT_TOKEN_S = 1 / 649
STEP_S = 1 / 44.9
CHUNK_TOKENS = 256
"""Prompt tokens in a step that also decodes."""
CACHE_TOKENS = 200_000
"""Tokens of KV that a replica keeps."""
BLOCK_TOKENS = 64
NUM_SYSTEM_PROMPTS = 200
SYSTEM_TOKENS = 384
QUESTION_TOKENS = 64
ANSWER_TOKENS = 96
NUM_TURNS = 8
CAPACITY = 128


@dataclass(slots=True)
class Turn:
    """One request of a chat."""

    user: int
    chat: int
    system: int
    number: int
    sent_s: float
    num_cached_tokens: int = 0
    first_token_s: float = 0.0

    @property
    def num_prompt_tokens(self) -> int:
        return SYSTEM_TOKENS + QUESTION_TOKENS + self.number * (QUESTION_TOKENS + ANSWER_TOKENS)

    def blocks(self) -> list[bytes]:
        num_system = SYSTEM_TOKENS // BLOCK_TOKENS
        num_own = self.num_prompt_tokens // BLOCK_TOKENS - num_system
        shared = [b"s%d %d" % (self.system, index) for index in range(num_system)]
        return shared + [b"c%d %d" % (self.chat, index) for index in range(num_own)]


@dataclass(slots=True)
class Replica:
    """Prompts one after the other, decoding beside them: rates are constant between two events."""

    cache: OrderedDict[tuple[str, int], int] = field(default_factory=OrderedDict)
    """Tokens of each chat beyond its system prompt, and of each system prompt; the oldest first."""
    cache_size: int = 0
    prompts: deque[Turn] = field(default_factory=deque)
    prompt_left: float = 0.0
    decoding: list[tuple[float, int, Turn]] = field(default_factory=list)
    """A heap of the step counts at which answers end."""
    steps: float = 0.0
    now: float = 0.0
    version: int = 0

    @property
    def load(self) -> int:
        return len(self.prompts) + len(self.decoding)

    def step_s(self) -> float:
        seconds = STEP_S + max(0, len(self.decoding) - 1) * PROMPT_TOKEN_S
        return seconds + CHUNK_TOKENS * PROMPT_TOKEN_S if self.prompts else seconds

    def advance(self, now: float) -> None:
        """Compute until `now`."""
        steps = (now - self.now) / self.step_s()
        self.now = now
        self.steps += steps
        if self.prompts:
            self.prompt_left -= steps * CHUNK_TOKENS

    def next_event(self) -> float:
        """When a prompt or an answer ends; infinity if there is none."""
        steps = [self.prompt_left / CHUNK_TOKENS] if self.prompts else []
        if self.decoding:
            steps.append(self.decoding[0][0] - self.steps)
        return self.now + max(0.0, min(steps)) * self.step_s() if steps else float("inf")

    def admit(self, turn: Turn) -> None:
        self.prompts.append(turn)
        if len(self.prompts) == 1:
            self._begin()

    def finish_prompt(self, serial: int) -> None:
        turn = self.prompts.popleft()
        turn.first_token_s = self.now
        heapq.heappush(self.decoding, (self.steps + ANSWER_TOKENS, serial, turn))
        self._keep(("s", turn.system), SYSTEM_TOKENS)
        self._keep(("c", turn.chat), turn.num_prompt_tokens + ANSWER_TOKENS - SYSTEM_TOKENS)
        if self.prompts:
            self._begin()

    def _begin(self) -> None:
        turn = self.prompts[0]
        system, chat = self.cache.get(("s", turn.system), 0), self.cache.get(("c", turn.chat), 0)
        turn.num_cached_tokens = min(system + (chat if system else 0), turn.num_prompt_tokens - 1)
        self.prompt_left = turn.num_prompt_tokens - turn.num_cached_tokens

    def _keep(self, key: tuple[str, int], tokens: int) -> None:
        self.cache_size += tokens - self.cache.pop(key, 0)
        self.cache[key] = tokens
        while self.cache_size > CACHE_TOKENS:
            self.cache_size -= self.cache.popitem(last=False)[1]


class Fleet:
    """The replicas, the users, and what a rule made of them."""

    def __init__(self, num_replicas: int, num_users: int, think_s: float, rule: str) -> None:
        self.replicas = [Replica() for _ in range(num_replicas)]
        self.random = random.Random(0)
        self.think_s = think_s
        self.serials = itertools.count()
        self.events: list[tuple[float, int, Turn | None, int, int]] = []
        self.done: list[tuple[Turn, float]] = []
        self.loads = dict.fromkeys(map(str, range(num_replicas)), 0)
        self.choose = RULES[rule](self)
        for user in range(num_users):
            self._send(Turn(user, next(self.serials), self.random.randrange(NUM_SYSTEM_PROMPTS), 0, 0.0), 0.0)

    def _send(self, turn: Turn, now: float) -> None:
        turn.sent_s = now + self.random.expovariate(1 / self.think_s)
        heapq.heappush(self.events, (turn.sent_s, next(self.serials), turn, 0, 0))

    def run(self, until_s: float) -> None:
        while self.events and self.events[0][0] < until_s:
            now, _, turn, index, version = heapq.heappop(self.events)
            if turn is not None:
                index = self.choose(turn)
                replica = self.replicas[index]
                replica.advance(now)
                replica.admit(turn)
            else:
                replica = self.replicas[index]
                if replica.version != version:
                    continue
                replica.advance(now)
                self._finish(replica)
            self._after(replica, index)

    def _finish(self, replica: Replica) -> None:
        """What ends now."""
        while replica.decoding and replica.decoding[0][0] - replica.steps < 1e-9:
            turn = heapq.heappop(replica.decoding)[2]
            self.done.append((turn, replica.now))
            is_last = turn.number == NUM_TURNS - 1
            chat = next(self.serials) if is_last else turn.chat
            system = self.random.randrange(NUM_SYSTEM_PROMPTS) if is_last else turn.system
            self._send(Turn(turn.user, chat, system, 0 if is_last else turn.number + 1, 0.0), replica.now)
        if replica.prompts and replica.prompt_left < 1e-6:
            replica.finish_prompt(next(self.serials))

    def _after(self, replica: Replica, index: int) -> None:
        replica.version += 1
        self.loads[str(index)] = replica.load
        if (at := replica.next_event()) < float("inf"):
            heapq.heappush(self.events, (at, next(self.serials), None, index, replica.version))

    def report(self, since_s: float) -> str:
        """A row of the table, of what ended from `since_s` on."""
        done = [(turn, end) for turn, end in self.done if end >= since_s]
        later = [turn for turn, _ in done if turn.number]
        hits = sum(
            turn.num_cached_tokens >= turn.num_prompt_tokens - QUESTION_TOKENS - BLOCK_TOKENS for turn in later
        ) / len(later)
        cached = sum(turn.num_cached_tokens for turn, _ in done) / sum(turn.num_prompt_tokens for turn, _ in done)
        waits = [turn.first_token_s - turn.sent_s for turn, _ in done]
        whole = [end - turn.sent_s for turn, end in done]
        return (
            f"{hits:.1%} | {cached:.1%} | {percentiles(waits)} | {percentiles(whole)} | "
            f"{len(done) / (max(end for _, end in done) - since_s):,.0f}"
        )


Choose = Callable[[Turn], int]
"""The index of the replica that gets a turn."""


def prefix(fleet: Fleet) -> Choose:
    rule = PrefixRule(capacity=CAPACITY, seed=0, max_blocks=CACHE_TOKENS // BLOCK_TOKENS)

    def choose(turn: Turn) -> int:
        blocks = turn.blocks()
        name = rule.choose(blocks, fleet.loads)
        rule.remember(name, blocks)
        return int(name)

    return choose


def uniform(fleet: Fleet) -> Choose:
    return lambda turn: fleet.random.randrange(len(fleet.replicas))


def round_robin(fleet: Fleet) -> Choose:
    order = itertools.cycle(range(len(fleet.replicas)))
    return lambda turn: next(order)


RULES: dict[str, Callable[[Fleet], Choose]] = {"prefix": prefix, "random": uniform, "round_robin": round_robin}


def percentiles(values: Sequence[float]) -> str:
    cuts = statistics.quantiles(values, n=100)
    return f"{cuts[49]:.2f}, {cuts[98]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--replicas", type=int, default=1_000)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--think-s", type=float, default=90.0)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=[*RULES])
    args = parser.parse_args()
    print(
        "| rule | turns after the first that hit | tokens found | first token, s: median, p99 | answer, s | answers/s |"
    )
    print("|---|---|---|---|---|---|")
    for rule in args.rules:
        started = time.monotonic()
        fleet = Fleet(args.replicas, args.users, args.think_s, rule)
        fleet.run(args.seconds)
        print(f"| {rule} | {fleet.report(args.seconds / 3)} |", flush=True)
        print(f"{rule}: {time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
