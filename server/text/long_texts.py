"""`python -m server.text.long_texts TOKENIZER_JSON`: encodes long texts, for which the library needs much memory.

A text of a million tokens takes 400 MB while it is encoded, and holds the GIL for a tenth of a second. A process of its
own keeps both away from streams. It is started for the first long text. Requests and answers have a head of their kind
and length (`HEAD`).
"""

from __future__ import annotations

import array
import ctypes
import enum
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import IO

import tokenizers

from server.text.spans import spans_json

HEAD = struct.Struct("<BQ")
"""Kind, and number of bytes after the head."""
PR_SET_PDEATHSIG = 1


class Kind(enum.IntEnum):
    """What is asked for, or `FAILED` in an answer, which is a text then."""

    IDS = 0
    IDS_WITH_SPECIAL = 1
    SPANS = 2
    SPANS_WITH_SPECIAL = 3
    FAILED = 4


class LongTextError(Exception):
    """The process cannot encode a text."""


class LongTextProcess:
    """The process that encodes. To be used by one thread."""

    def __init__(self, tokenizer_path: Path) -> None:
        self._path = tokenizer_path
        self.child: subprocess.Popen[bytes] | None = None

    def ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of `text`. Raises LongTextError."""
        kind = Kind.IDS_WITH_SPECIAL if add_special_tokens else Kind.IDS
        ids = array.array("I")
        ids.frombytes(self._answer(kind, text))
        return ids.tolist()

    def spans(self, text: str, *, add_special_tokens: bool) -> bytes:
        """The tokens of `text` as JSON. Raises LongTextError."""
        return self._answer(Kind.SPANS_WITH_SPECIAL if add_special_tokens else Kind.SPANS, text)

    def _answer(self, kind: Kind, text: str) -> bytes:
        child = self._started()
        assert child.stdin is not None and child.stdout is not None
        try:
            _write(child.stdin, kind, text.encode())
            answer_kind, answer = _read(child.stdout)
        except (BrokenPipeError, EOFError):  # it has died, of the text or between two of them
            self.close()
            raise LongTextError("the text cannot be encoded") from None
        if answer_kind is Kind.FAILED:
            raise LongTextError(answer.decode())
        return answer

    def _started(self) -> subprocess.Popen[bytes]:
        if self.child is None or self.child.poll() is not None:
            self.close()
            command = [sys.executable, "-P", "-m", "server.text.long_texts", str(self._path)]
            self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self.child

    def kill(self) -> None:
        """End the process, even while another thread waits for its answer."""
        if self.child is not None:
            self.child.kill()

    def close(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.communicate()
            self.child = None


def _write(stream: IO[bytes], kind: Kind, content: bytes) -> None:
    stream.write(HEAD.pack(kind, len(content)))
    stream.write(content)
    stream.flush()


def _read(stream: IO[bytes]) -> tuple[Kind, bytes]:
    """The next message. Raises EOFError."""
    head = stream.read(HEAD.size)
    if len(head) < HEAD.size:
        raise EOFError
    kind, size = HEAD.unpack(head)
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return Kind(kind), content


def _encode(tokenizer: tokenizers.Tokenizer, kind: Kind, text: str) -> bytes:
    has_special = kind in (Kind.IDS_WITH_SPECIAL, Kind.SPANS_WITH_SPECIAL)
    if kind in (Kind.IDS, Kind.IDS_WITH_SPECIAL):
        (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=has_special)
        return array.array("I", encoding.ids).tobytes()
    (encoding,) = tokenizer.encode_batch([text], add_special_tokens=has_special)
    return spans_json(text, encoding)


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the server; this ends with its input
        signal.signal(number, signal.SIG_IGN)
    tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    while True:
        try:
            kind, content = _read(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = _encode(tokenizer, kind, content.decode())
        except Exception as error:  # the library raises plain Exception
            kind, answer = Kind.FAILED, str(error).encode()
        _write(sys.stdout.buffer, kind, answer)


if __name__ == "__main__":
    main()
