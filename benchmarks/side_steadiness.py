"""Gaps between the tokens of streams as one side of a comparison: speaks JSON lines as `sides.Side` expects.

    PYTHONPATH=CHECKOUT python side_steadiness.py FORM FOLDER

The engine comes from PYTHONPATH. FORM as in perplexity.py. Started with the variables of `engine_environment`.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.offline import Pytgi
from benchmarks.perplexity import engine_config
from engine.link.messages import AbortRequest, GenerationRequest


class Load:
    """Requests of one round, when they came and when their tokens did."""

    def __init__(self, core: Any, seed: int) -> None:
        self._core = core
        self._token_ids = itertools.count(1000 + seed * 100_000)
        self.started: dict[str, float] = {}
        self.tokens: dict[str, list[float]] = {}

    def add(self, name: str, num_prompt_tokens: int, num_new_tokens: int) -> None:
        token_ids = [token_id % 50_000 for token_id in itertools.islice(self._token_ids, num_prompt_tokens)]
        self.started[name], self.tokens[name] = time.perf_counter(), []
        self._core.take(
            GenerationRequest(
                request_id=name,
                prompt_token_ids=token_ids,
                max_new_tokens=num_new_tokens,
                is_ignoring_eos=True,
            )
        )

    def step(self) -> list[str]:
        """The requests that ended."""
        events = self._core.step()
        now = time.perf_counter()
        for event in events:
            self.tokens[event.request_id] += [now] * len(event.token_ids)
        return [event.request_id for event in events if event.finish_reason is not None]

    def first_token_times(self) -> list[float]:
        return [times[0] - self.started[name] for name, times in self.tokens.items() if times]

    def gaps(self, since: float = 0.0) -> Iterator[float]:
        for times in self.tokens.values():
            yield from (after - before for before, after in itertools.pairwise(times) if after > since)


def intrude(core: Any, seed: int, num_prompt_tokens: int) -> dict[str, Any]:
    """Four streams decode while a long prompt is computed: their gaps meanwhile, and before."""
    load = Load(core, seed)
    streams = [f"stream {index}" for index in range(4)]
    for name in streams:
        load.add(name, 64, 4096)
    while min(len(load.tokens[name]) for name in streams) < 20:
        load.step()
    quiet = list(load.gaps(load.tokens[streams[-1]][1]))
    load.add("prompt", num_prompt_tokens, 1)
    came = load.started["prompt"]
    while not load.tokens["prompt"]:
        load.step()
    for name in streams:
        core.take(AbortRequest(name))
    return {"gaps": list(load.gaps(came)), "quiet_gaps": quiet, "first_token_s": load.first_token_times()[-1:]}


def serve(core: Any, seed: int, num_requests: int) -> dict[str, Any]:
    """Sixteen requests at a time, 256 tokens in and 128 out."""
    load = Load(core, seed)
    names = iter([f"request {index}" for index in range(num_requests)])
    started = time.perf_counter()
    for name in itertools.islice(names, 16):
        load.add(name, 256, 128)
    while core.has_work:
        for _ in load.step():
            if name := next(names, ""):
                load.add(name, 256, 128)
    rate = num_requests * 128 / (time.perf_counter() - started)
    return {"gaps": list(load.gaps()), "tokens_per_s": rate, "first_token_s": load.first_token_times()}


def main() -> None:
    form, folder = sys.argv[1:]
    core = Pytgi(engine_config(form, folder))._core
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        message = json.loads(line)
        run = {"intrude": intrude, "serve": serve}[message["load"]]
        print(json.dumps(run(core, message["seed"], message["size"])), flush=True)


if __name__ == "__main__":
    main()
