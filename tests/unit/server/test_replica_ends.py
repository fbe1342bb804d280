"""What a client reads when its replica is gone, in the shape of its route."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.errors import UnhealthyError
from server.replicas.ends import GONE, end_of_stream, failed_answer

TEXT = "Request failed during generation: Server error: the replica that ran this request is gone"
NATIVE = {"error": TEXT, "error_type": "generation"}
OPENAI = {"error": {"message": TEXT, "type": "server_error", "code": "generation", "param": None}}
STRICT_OPENAI = {"error": {"message": TEXT, "http_status_code": 422}}
ANTHROPIC = {"type": "error", "error": {"type": "api_error", "message": TEXT}}
RESPONSES = {"type": "error", "code": "server_error", "message": TEXT, "param": None}


def read_events(data: bytes) -> list[tuple[str, Any]]:
    """Names and data; the end mark stays text."""
    events = []
    for block in filter(None, data.decode().split("\n\n")):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        content = fields["data"] if fields["data"] == "[DONE]" else json.loads(fields["data"])
        events.append((fields.get("event", ""), content))
    return events


@pytest.mark.parametrize(
    ("path", "is_strict", "events"),
    [
        ("/generate_stream", False, [("", NATIVE)]),
        ("/", True, [("", NATIVE)]),
        ("/invocations", False, [("", NATIVE)]),
        ("/v1/chat/completions", False, [("", OPENAI), ("", "[DONE]")]),
        ("/v1/completions", False, [("", OPENAI), ("", "[DONE]")]),
        ("/v1/completions", True, [("", STRICT_OPENAI), ("", "[DONE]")]),
        ("/v1/messages", False, [("error", ANTHROPIC)]),
        ("/v1/responses", False, [("error", RESPONSES)]),
    ],
)
def test_a_stream_ends_with_the_error_event_of_its_route(
    path: str, is_strict: bool, events: list[tuple[str, Any]]
) -> None:
    assert read_events(end_of_stream(path, b'data: {"a":1}\n\n', is_strict=is_strict)) == events


def test_a_chat_by_way_of_invocations_ends_as_a_chat() -> None:
    tail = b'data: {"object":"chat.completion.chunk"}\n\n'
    assert read_events(end_of_stream("/invocations", tail, is_strict=False)) == [("", OPENAI), ("", "[DONE]")]


def test_an_event_that_was_cut_is_ended_first() -> None:
    end = end_of_stream("/generate_stream", b'data: {"token":', is_strict=False)
    assert end.startswith(b"\n\n") and read_events(end) == [("", NATIVE)]


@pytest.mark.parametrize(
    ("path", "body"), [("/generate", NATIVE), ("/v1/completions", OPENAI), ("/v1/messages", ANTHROPIC)]
)
def test_a_request_without_any_answer_gets_one(path: str, body: Any) -> None:
    status, answer = failed_answer(path, GONE, is_strict=False)
    assert (status, json.loads(answer)) == (424, body)


def test_without_a_replica_a_probe_is_unhealthy() -> None:
    status, answer = failed_answer("/health", UnhealthyError(), is_strict=False)
    assert (status, json.loads(answer)) == (503, {"error": "unhealthy", "error_type": "healthcheck"})
