"""Reads from a socket -> the events of an answer, each with the moment at which its last byte came.

Parsing waits until a measurement is over: while it runs, a read costs a timestamp and nothing else.
"""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Read = tuple[float, bytes]
"""Moment and bytes of one read."""

HEAD_END = b"\r\n\r\n"
EVENT_END = re.compile(rb"\r?\n\r?\n")
DONE = b"[DONE]"
OK = 200
MAX_REFUSAL_CHARACTERS = 300


class BrokenAnswerError(Exception):
    """The answer is not whole, or is no HTTP."""


@dataclass(frozen=True)
class Answer:
    """An answer whose body may have come in chunks; `spans` are places of the body in what was read."""

    status: int
    body: bytes
    spans: Sequence[tuple[int, int]]
    """For each chunk the places of its end in the body and in all bytes read."""
    reads: Sequence[Read]

    def events(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """Moment and data of each event. Raises BrokenAnswerError for what is no JSON object."""
        read_ends = list(itertools.accumulate(len(data) for _, data in self.reads))
        span_ends = [body_end for body_end, _ in self.spans]
        place = 0
        for match in EVENT_END.finditer(self.body):
            event, place = self.body[place : match.start()], match.end()
            data = b"\n".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))
            if not data or data == DONE:
                continue
            body_end, raw_end = self.spans[bisect.bisect_left(span_ends, place)]
            index = bisect.bisect_left(read_ends, raw_end - (body_end - place))
            yield self.reads[index][0], event_object(data)


def json_or_none(text: str | bytes) -> Any:
    """What a server's JSON says; None for what is none, or is nested too deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def event_object(data: bytes) -> dict[str, Any]:
    """An event's data. Raises BrokenAnswerError for what is no JSON object."""
    value = json_or_none(data)
    if not isinstance(value, dict):
        raise BrokenAnswerError(f"an event is no JSON object: {data[:200].decode(errors='replace')}")
    return value


def refusal_text(body: bytes) -> str:
    """The words of an answer that is an error: those of its error object, or else the body."""
    text = body.decode(errors="replace").strip()
    error = json_or_none(text)
    for name in ("error", "message", "detail"):
        if isinstance(error, dict) and name in error:
            error = error[name]
    return (error if isinstance(error, str) else text)[:MAX_REFUSAL_CHARACTERS]


def _number(text: bytes, base: int) -> int:
    """Raises BrokenAnswerError for what is no number from 0 on."""
    try:
        number = int(text, base)
    except ValueError:
        number = -1
    if number < 0:
        raise BrokenAnswerError(f"{text[:50].decode(errors='replace')!r} is no length: no HTTP answer")
    return number


def read_answer(reads: Sequence[Read]) -> Answer:
    """The answer in what was read of one connection. Raises BrokenAnswerError if it is not whole, or no HTTP."""
    raw = b"".join(data for _, data in reads)
    head, end, _ = raw.partition(HEAD_END)
    words = head.split(None, 2)
    if not end or len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise BrokenAnswerError("the server closed the connection without an answer" if not raw else "no HTTP answer")
    start = len(head) + len(end)
    lines = [line.lower().replace(b" ", b"") for line in head.split(b"\r\n")]
    if b"transfer-encoding:chunked" in lines:
        body, spans = _chunks(raw, start)
    else:
        body, spans = raw[start:], [(len(raw) - start, len(raw))]
        lengths = [_number(line[15:], 10) for line in lines if line.startswith(b"content-length:")]
        if lengths and len(body) < lengths[0]:
            raise BrokenAnswerError("the server closed the connection in the middle of its answer")
    return Answer(int(words[1]), body, spans, reads)


def _chunks(raw: bytes, place: int) -> tuple[bytes, list[tuple[int, int]]]:
    """The body whose first chunk begins at `place`, and `Answer.spans`. Raises BrokenAnswerError."""
    parts: list[bytes] = []
    spans: list[tuple[int, int]] = []
    length = 0
    while True:
        line_end = raw.find(b"\r\n", place)
        size_text = raw[place:line_end].partition(b";")[0]
        if line_end < 0 or not size_text:
            raise BrokenAnswerError("the server closed the connection in the middle of its answer")
        size, start = _number(size_text, 16), line_end + 2
        if size == 0:
            return b"".join(parts), spans
        place = start + size + 2
        parts.append(raw[start : start + size])
        length += size
        spans.append((length, start + size))
        if place > len(raw):
            raise BrokenAnswerError("the server closed the connection in the middle of its answer")
