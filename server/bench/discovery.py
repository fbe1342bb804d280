"""What a server says about itself: whether it is TGI's kind, and the name of its model."""

from __future__ import annotations

import json
from typing import Any

from server.bench.answers import OK, BrokenAnswerError, read_answer
from server.bench.connection import Address, exchange
from server.bench.errors import BenchmarkError


async def _ask(address: Address, route: str, timeout_s: float) -> Any:
    """The JSON of a route; None if there is no such answer. Raises BenchmarkError without any answer."""
    result = await exchange(address, address.request(route), timeout_s)
    if result.failure is not None:
        raise BenchmarkError(f"{result.failure} (asked for {route})")
    try:
        answer = read_answer(result.reads)
        return json.loads(answer.body) if answer.status == OK else None
    except BrokenAnswerError as error:
        raise BenchmarkError(f"{address.url}: {error}") from error
    except ValueError:
        return None


async def find_wire(address: Address, timeout_s: float) -> str:
    """Key of WIRES. Raises BenchmarkError."""
    info = await _ask(address, "/info", timeout_s)
    return "tgi" if isinstance(info, dict) and "model_id" in info else "completions"


async def find_model(address: Address, timeout_s: float) -> str:
    """The first model that the server lists. Raises BenchmarkError."""
    models = await _ask(address, "/v1/models", timeout_s)
    try:
        return str(models["data"][0]["id"])
    except (LookupError, TypeError):
        raise BenchmarkError(f"{address.url} lists no model at /v1/models: name it with --model") from None
