"""Ranks prove to each other that they belong together: both ends answer a challenge with a secret that all ranks have.

Three lines of JSON open a connection: the other rank says who it is, with a random number; rank 0 answers with a number
of its own and its proof; the other rank sends its proof. The secret itself never leaves a process. Nobody is believed
before, and a stranger that says nothing holds up nobody.
"""

from __future__ import annotations

import hmac
import json
import secrets
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

MAX_LINE_BYTES = 1024
GREETING_S = 10.0
"""Time of a stranger to prove itself."""
MAX_STRANGERS = 256
"""Connections that are not proved yet; the oldest one gives way to a new one."""
FIRST, OTHER = "rank 0", "other rank"


class StrangerError(Exception):
    """The other end of a connection is no rank of ours."""


class WrongSecretError(Exception):
    """The other end greets as rank 0 does, with another secret."""


def greet(sock: socket.socket, secret: str, rank: int, channel: str) -> None:
    """Prove to rank 0 who this is, and let it prove itself. `sock` has a timeout.

    Raises WrongSecretError, StrangerError for an end that speaks otherwise, OSError if the connection is lost.
    """
    nonce = secrets.token_hex(16)
    send_line(sock, {"rank": rank, "channel": channel, "nonce": nonce})
    line = b""
    while not line.endswith(b"\n"):
        byte = sock.recv(1)
        if not byte:
            raise ConnectionResetError("the connection was closed")
        line += byte
        if len(line) > MAX_LINE_BYTES:
            raise StrangerError
    challenge = _read(line)
    hello = f"{rank} {channel} {nonce} {challenge.get('nonce')}"
    if not _is_proof(challenge.get("proof"), secret, FIRST, hello):
        raise WrongSecretError if "proof" in challenge else StrangerError
    send_line(sock, {"proof": _proof(secret, OTHER, hello)})


class Greeter:
    """Rank 0's side: lets strangers prove themselves side by side, on connections that never block."""

    def __init__(
        self, listener: socket.socket, secret: str, on_proved: Callable[[socket.socket, str, int, str], None]
    ) -> None:
        """`on_proved` gets a connection, its host, and the rank and channel that it has proved to be."""
        self._listener = listener
        self._secret = secret
        self._on_proved = on_proved
        self._selector = selectors.DefaultSelector()
        self._strangers: dict[socket.socket, _Greeting] = {}
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def wait(self, timeout_s: float) -> list[str]:
        """Go on for a while; the hosts of those who turned out to be no ranks of ours."""
        turned_away = []
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                turned_away += self._accept()
                continue
            greeting = self._strangers.get(key.fileobj)  # type: ignore[call-overload]  # turned away just now
            if greeting is not None:
                turned_away += self._read(greeting)
        late = [greeting for greeting in self._strangers.values() if time.monotonic() > greeting.deadline]
        return turned_away + [self._turn_away(greeting) for greeting in late]

    def close(self) -> None:
        for sock in self._strangers:
            sock.close()
        self._strangers.clear()
        self._selector.close()

    def _accept(self) -> list[str]:
        try:
            sock, (host, *_) = self._listener.accept()
        except OSError:  # gone again, or out of descriptors
            return []
        sock.setblocking(False)
        self._strangers[sock] = _Greeting(sock, host, self._secret)
        self._selector.register(sock, selectors.EVENT_READ)
        if len(self._strangers) <= MAX_STRANGERS:
            return []
        return [self._turn_away(next(iter(self._strangers.values())))]

    def _read(self, greeting: _Greeting) -> list[str]:
        try:
            is_proved = greeting.go_on()
        except (StrangerError, OSError):
            return [self._turn_away(greeting)]
        if is_proved:
            self._forget(greeting)
            self._on_proved(greeting.sock, greeting.host, greeting.rank, greeting.channel)
        return []

    def _turn_away(self, greeting: _Greeting) -> str:
        self._forget(greeting)
        greeting.sock.close()
        return greeting.host

    def _forget(self, greeting: _Greeting) -> None:
        self._selector.unregister(greeting.sock)
        del self._strangers[greeting.sock]


class _Greeting:
    """One stranger's connection and what it has said so far."""

    def __init__(self, sock: socket.socket, host: str, secret: str) -> None:
        self.sock = sock
        self.host = host
        self.deadline = time.monotonic() + GREETING_S
        self.rank = -1
        self.channel = ""
        self._secret = secret
        self._line = b""
        self._hello = ""
        """What both proofs are about; empty until the stranger has said who it is."""

    def go_on(self) -> bool:
        """Read what has come; whether the stranger has proved itself now. Raises StrangerError, OSError."""
        while True:
            try:
                byte = self.sock.recv(1)  # what follows the last line is for another reader
            except BlockingIOError:
                return False
            self._line += byte
            if not byte or len(self._line) > MAX_LINE_BYTES:
                raise StrangerError
            if byte == b"\n":
                message, self._line = _read(self._line), b""
                if self._hello:
                    if not _is_proof(message.get("proof"), self._secret, OTHER, self._hello):
                        raise StrangerError
                    return True
                self._challenge(message)

    def _challenge(self, message: dict[str, Any]) -> None:
        rank, channel, nonce = (message.get(key) for key in ("rank", "channel", "nonce"))
        if type(rank) is not int or not isinstance(channel, str) or not isinstance(nonce, str):
            raise StrangerError
        self.rank, self.channel = rank, channel
        challenge = secrets.token_hex(16)
        self._hello = f"{rank} {channel} {nonce} {challenge}"
        send_line(self.sock, {"nonce": challenge, "proof": _proof(self._secret, FIRST, self._hello)})


def _proof(secret: str, role: str, hello: str) -> str:
    """Roles differ, so that nobody can send a proof back to its maker."""
    return hmac.digest(secret.encode(), json.dumps([role, hello]).encode(), "sha256").hex()


def _is_proof(value: Any, secret: str, role: str, hello: str) -> bool:
    return isinstance(value, str) and hmac.compare_digest(value.encode(), _proof(secret, role, hello).encode())


def send_line(sock: socket.socket, value: Any) -> None:
    sock.sendall(json.dumps(value).encode() + b"\n")


def _read(line: bytes) -> dict[str, Any]:
    """A message. Raises StrangerError."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise StrangerError from None
    if not isinstance(message, dict):
        raise StrangerError
    return message
