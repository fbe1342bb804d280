"""A closed loop over HTTP: so many streams, each asks for a completion when its last one has ended."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence

import httpx

TIMEOUT_S = 600.0


@dataclasses.dataclass
class Load:
    """What the clients saw."""

    seconds: float = 0.0
    num_tokens: int = 0
    first_s: list[float] = dataclasses.field(default_factory=list)
    """Seconds from each request to its first token."""
    gaps_s: list[float] = dataclasses.field(default_factory=list)
    """Seconds between each two chunks of a stream that followed each other."""


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent of the values are not above."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


async def _ask(client: httpx.AsyncClient, prompt: str, num_new: int, load: Load) -> None:
    """One completion, streamed. Raises ValueError unless it has as many tokens as it should."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": num_new, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    last = started = time.perf_counter()
    is_first, num_tokens = True, 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            num_tokens = (chunk.get("usage") or {}).get("completion_tokens", num_tokens)
            if chunk.get("choices"):
                now = time.perf_counter()
                (load.first_s if is_first else load.gaps_s).append(now - (started if is_first else last))
                is_first, last = False, now
    if num_tokens != num_new:
        raise ValueError(f"{num_tokens} tokens came, {num_new} were asked for")
    load.num_tokens += num_tokens


async def _stream(client: httpx.AsyncClient, prompts: Iterator[str], num_new: int, load: Load) -> None:
    for prompt in prompts:
        await _ask(client, prompt, num_new, load)


async def _run(url: str, prompts: Sequence[str], num_streams: int, num_new: int) -> Load:
    load, waiting = Load(), iter(prompts)
    limits = httpx.Limits(max_connections=num_streams)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:
        started = time.perf_counter()
        await asyncio.gather(*(_stream(client, waiting, num_new, load) for _ in range(num_streams)))
        load.seconds = time.perf_counter() - started
    return load


def closed_loop(url: str, prompts: Sequence[str], num_streams: int, num_new: int) -> Load:
    """Ask for `num_new` tokens after each of the prompts. Raises ValueError for an answer that is not one."""
    try:
        return asyncio.run(_run(url, prompts, num_streams, num_new))
    except httpx.HTTPError as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
