"""What a server says about itself: whether it is TGI's kind, and the name of its model."""

from __future__ import annotations

from server.bench.answers import OK, Answer, BrokenAnswerError, json_or_none, read_answer
from server.bench.connection import Address, exchange
from server.bench.errors import BenchmarkError
from server.bench.records import refusal_of

NEXT_STEPS = {
    401: "give its key with --api-key",
    403: "give its key with --api-key",
    503: "it is not ready, try again in a moment",
}
"""Status of an answer without models -> what to do; for any other the model can be named."""


async def _ask(address: Address, route: str, timeout_s: float) -> Answer:
    """What a route answers. Raises BenchmarkError without any answer."""
    result = await exchange(address, address.request(route), timeout_s)
    if result.failure is not None:
        raise BenchmarkError(f"{result.failure} (asked for {route}): is a server there?")
    try:
        return read_answer(result.reads)
    except BrokenAnswerError as error:
        raise BenchmarkError(f"{address.url}: {error}") from error


async def find_tgi_model(address: Address, timeout_s: float) -> str | None:
    """The model that a server with TGI's /info names there; None: it has none. Raises BenchmarkError."""
    answer = await _ask(address, "/info", timeout_s)
    info = json_or_none(answer.body) if answer.status == OK else None
    return str(info["model_id"]) if isinstance(info, dict) and "model_id" in info else None


async def find_model(address: Address, timeout_s: float) -> str:
    """The first model that the server lists. Raises BenchmarkError."""
    answer = await _ask(address, "/v1/models", timeout_s)
    try:
        return str(json_or_none(answer.body)["data"][0]["id"])
    except (LookupError, TypeError):
        why = "" if answer.status == OK else f" ({refusal_of(answer)})"
        step = NEXT_STEPS.get(answer.status, "name it with --model")
        raise BenchmarkError(f"{address.url} lists no model at /v1/models{why}: {step}") from None
