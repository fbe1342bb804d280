"""Length-prefixed MessagePack frames over the inherited socket pair between the HTTP process and the engine.

A frame is a 4-byte big-endian length and one encoded message of `engine.link.messages`. The engine's end never blocks:
frames that the reader has not taken yet wait in one pending buffer, and later tokens of the same request are merged
into it, so that the buffer is bounded by the tokens of the open requests.
"""

from __future__ import annotations

import ctypes
import logging
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import msgspec

from engine.link.messages import (
    AdapterReply,
    Down,
    EngineReady,
    EngineStarting,
    EngineStats,
    StepOutput,
    StepReport,
    TokenEvent,
    Up,
)

HEADER = struct.Struct(">I")
RECEIVE_BYTES = 1 << 16
MAX_RECEIVED_BYTES = 1 << 23
"""Bytes that are received between two steps: decoding them takes 70 ms, and the steps of others go on."""
MAX_FRAME_WAIT_S = 0.02
"""Time between two steps for the rest of a frame: a socket holds 200 KB, and others wait behind a large frame."""
PR_SET_PDEATHSIG = 1

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
decode_down: Callable[[bytes], Down] = msgspec.msgpack.Decoder(Down).decode
decode_up: Callable[[bytes], Up] = msgspec.msgpack.Decoder(Up).decode


def encode_frame(message: msgspec.Struct) -> bytes:
    body = _encoder.encode(message)
    return HEADER.pack(len(body)) + body


def is_cut(buffer: bytearray) -> bool:
    """Whether `buffer` ends within a frame."""
    start = 0
    while len(buffer) - start >= HEADER.size:
        start += HEADER.size + HEADER.unpack_from(buffer, start)[0]
    return start != len(buffer)


def take_frames(buffer: bytearray, decode: Callable[[bytes], T]) -> list[T]:
    """Decode every whole frame at the front of `buffer` and remove it; a part of a frame stays."""
    messages = []
    start = 0
    while len(buffer) - start >= HEADER.size:
        (size,) = HEADER.unpack_from(buffer, start)
        end = start + HEADER.size + size
        if len(buffer) < end:
            break
        messages.append(decode(bytes(buffer[start + HEADER.size : end])))
        start = end
    del buffer[:start]
    return messages


class EngineEndpoint:
    """The engine's end of the pair."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._inbox = bytearray()
        self._outbox = memoryview(b"")
        self._lagging: dict[str, TokenEvent] = {}
        self._lagging_stats: EngineStats | None = None
        self._lagging_reports: list[StepReport] = []
        self._lagging_replies: list[AdapterReply] = []
        self._is_closed = False
        self._wake_fd = os.eventfd(0)

    def __del__(self) -> None:
        os.close(self._wake_fd)

    def wake(self) -> None:
        """Let `receive` return now, or at once when it is next called; any thread may call this."""
        os.eventfd_write(self._wake_fd, 1)

    def receive(self, timeout_s: float) -> list[Down]:
        """The messages that have arrived, after waiting at most `timeout_s` for the first one or for `wake`.

        No more than `MAX_RECEIVED_BYTES` are received in one call. Raises EOFError without a peer, once everything has
        been received that the peer had sent before.
        """
        fd = self._sock.fileno()
        readable, writable, _ = select.select([fd, self._wake_fd], [fd] if self._outbox else [], [], timeout_s)
        if writable:
            self._flush()
        if self._wake_fd in readable:
            os.eventfd_read(self._wake_fd)
        if fd in readable:
            self._read_available()
        messages = take_frames(self._inbox, decode_down)
        if self._is_closed and not messages:
            raise EOFError("the HTTP process closed its socket")
        return messages

    def _read_available(self) -> None:
        deadline = time.monotonic() + MAX_FRAME_WAIT_S
        for _ in range(MAX_RECEIVED_BYTES // RECEIVE_BYTES):
            try:
                data = self._sock.recv(RECEIVE_BYTES)
            except BlockingIOError:
                left_s = deadline - time.monotonic()
                if left_s > 0 and is_cut(self._inbox) and select.select([self._sock], [], [], left_s)[0]:
                    continue
                return
            except ConnectionError:
                data = b""
            if not data:
                self._is_closed = True
                return
            self._inbox += data

    def send(self, message: Up) -> None:
        """Queue one message and write what the socket takes now."""
        if isinstance(message, EngineReady):
            self._outbox = memoryview(bytes(self._outbox) + encode_frame(message))
        elif isinstance(message, EngineStarting):
            if not self._outbox:  # else nobody reads, and the next one says more
                self._outbox = memoryview(encode_frame(message))
        elif self._outbox:
            self._hold(message)
        else:
            self._outbox = memoryview(encode_frame(message))
        self._flush()

    def _hold(self, output: StepOutput) -> None:
        for event in output.events:
            held = self._lagging.get(event.request_id)
            if held is None:
                self._lagging[event.request_id] = event
            else:
                held.extend(event)
        self._lagging_stats = output.stats
        self._lagging_replies += output.replies
        self._lagging_reports += output.reports  # each computed a token of an open request, so they are bounded too

    def _flush(self) -> None:
        try:
            while True:
                while self._outbox:
                    self._outbox = self._outbox[self._sock.send(self._outbox) :]
                if self._lagging_stats is None:
                    return
                held = StepOutput(
                    events=list(self._lagging.values()),
                    stats=self._lagging_stats,
                    reports=self._lagging_reports,
                    replies=self._lagging_replies,
                )
                self._lagging, self._lagging_stats = {}, None
                self._lagging_reports, self._lagging_replies = [], []
                self._outbox = memoryview(encode_frame(held))
        except BlockingIOError:
            return
        except ConnectionError:  # `receive` raises EOFError, once it has read the rest
            self._outbox = memoryview(b"")


def read_line(fd: int) -> str:
    """The first line of the lifeline, byte by byte: what follows is left for `exit_when_closed`."""
    line = bytearray()
    while (byte := os.read(fd, 1)) not in (b"", b"\n"):
        line += byte
    return line.decode()


def exit_when_closed(
    fd: int, log: Callable[[str], None], take_line: Callable[[bytes], None] = lambda line: None
) -> None:
    """Watch the lifeline `fd` on a thread: at its end (the launcher is gone) end this process at once.

    It takes a thread and `os._exit`, because the main thread may be deep in a kernel or in a download. Linux is asked
    for a signal as well, which also ends a process that is stopped. `take_line` gets each line that comes, on that
    thread.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        rest = b""
        while data := os.read(fd, 1024):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                take_line(line)
        log("the launcher is gone: exiting")
        logging.shutdown()
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
