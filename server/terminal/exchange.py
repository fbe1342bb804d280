"""A request for a streamed answer, and its events one by one as they come."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from server.bench.answers import DONE, OK, BrokenAnswerError, event_object, refusal_text
from server.bench.connection import CONNECT_TIMEOUT_S, Address, tls_context
from server.bench.wires import WIRES
from server.terminal.errors import ChatError, RefusedError

ROUTE = WIRES["chat"].route
KEY = "start again with its key in --api-key or OPENAI_API_KEY"
NEXT_STEPS = {
    401: KEY,
    403: KEY,
    404: f"give the address of a server that has {ROUTE}, and with --model a model of it",
}
"""Status of an answer -> what to do."""
REFUSALS = (400, 413, 422)


def stream_events(address: Address, request: dict[str, Any], timeout_s: float) -> Generator[dict[str, Any]]:
    """The events of the answer. Raises RefusedError, and ChatError also after some events.

    `timeout_s` is the longest time without a byte. Whoever closes the generator closes the connection, so that the
    server ends its work.
    """
    body = json.dumps({**request, "stream": True, "stream_options": {"include_usage": True}})
    key = {"Authorization": f"Bearer {address.api_key}"} if address.api_key else {}
    connection = _open(address, min(timeout_s, CONNECT_TIMEOUT_S))
    try:
        connection.sock.settimeout(timeout_s)
        headers = {"Content-Type": "application/json", "Connection": "close", **key}
        connection.request("POST", address.path + ROUTE, body, headers)
        with contextlib.closing(connection.getresponse()) as response:
            if response.status != OK:
                text = f"{address.url} answers with status {response.status}: {refusal_text(response.read())}"
                if response.status in REFUSALS:
                    raise RefusedError(text)
                raise ChatError(f"{text}: {NEXT_STEPS.get(response.status, 'try again')}")
            yield from read_events(response)
    except TimeoutError:
        raise ChatError(f"no byte came for {timeout_s:g} s: --timeout allows more") from None
    except (OSError, http.client.HTTPException, BrokenAnswerError) as error:
        raise ChatError(f"{address.url} broke off the answer ({error or type(error).__name__}): try again") from error
    finally:
        connection.close()


def _open(address: Address, timeout_s: float) -> http.client.HTTPConnection:
    """An open connection. Raises ChatError."""
    connection = (
        http.client.HTTPSConnection(address.host, address.port, timeout=timeout_s, context=tls_context())
        if address.is_tls
        else http.client.HTTPConnection(address.host, address.port, timeout=timeout_s)
    )
    try:
        connection.connect()
    except OSError as error:
        why = error.strerror or error
        raise ChatError(f"{address.url} can't be reached ({why}): start the server again") from error
    return connection


def read_events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The data of each event up to the last.

    Raises BrokenAnswerError for what is no JSON object, and for an answer that ends before it says so: `http.client`
    takes the end of a connection within chunks for the end of the lines.
    """
    data: list[bytes] = []
    has_ended = False
    for line in lines:
        if line.startswith(b"data:"):
            data.append(line[5:].strip())
        elif not line.strip() and data:
            text, data = b"\n".join(data), []
            if text == DONE:
                return
            event = event_object(text)
            has_ended |= _is_last(event)
            yield event
    if not has_ended:
        raise BrokenAnswerError("it ended in the middle")


def _is_last(event: dict[str, Any]) -> bool:
    """Whether it says why the answer ended; not all servers send `[DONE]`."""
    choices = event.get("choices")
    return isinstance(choices, list) and any(
        isinstance(choice, dict) and choice.get("finish_reason") is not None for choice in choices
    )
