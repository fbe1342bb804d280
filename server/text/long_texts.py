"""`python -m server.text.long_texts TOKENIZER_JSON AFFIXES`: encodes long texts, which takes the library much memory.

A text of a million tokens takes 400 MB while it is encoded, and holds the GIL for a tenth of a second. A process of its
own keeps both away from streams. It is started for the first long text. Requests and answers are frames of a kind.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import enum
import json
import sys
from pathlib import Path

import tokenizers

from server.piped_process import PipedProcess, prepare_child, read_frame, write_frame
from server.text.affixes import Affixes, use_affixes
from server.text.spans import spans_json


class Kind(enum.IntEnum):
    """What is asked for, or `FAILED` in an answer, which is a text then."""

    IDS = 0
    IDS_WITH_SPECIAL = 1
    SPANS = 2
    SPANS_WITH_SPECIAL = 3
    FAILED = 4


class LongTextError(Exception):
    """The process cannot encode a text."""


class LongTextProcess(PipedProcess):
    """The process that encodes."""

    def __init__(self, tokenizer_path: Path, affixes: Affixes | None) -> None:
        # ASCII: an argument has the encoding of the locale, which may lack the tokens' letters.
        fields = json.dumps(None if affixes is None else dataclasses.asdict(affixes))
        super().__init__("server.text.long_texts", str(tokenizer_path), fields)

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
        questions, answers = self.pipes()
        answer = None
        with contextlib.suppress(BrokenPipeError):  # it has died between two texts
            write_frame(questions, text.encode(), kind)
            answer = read_frame(answers)
        if answer is None:
            self.close()
            raise LongTextError("the text cannot be encoded")
        answer_kind, content = answer
        if answer_kind == Kind.FAILED:
            raise LongTextError(content.decode())
        return content


def _encode(tokenizer: tokenizers.Tokenizer, kind: Kind, text: str) -> bytes:
    has_special = kind in (Kind.IDS_WITH_SPECIAL, Kind.SPANS_WITH_SPECIAL)
    if kind in (Kind.IDS, Kind.IDS_WITH_SPECIAL):
        (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=has_special)
        return array.array("I", encoding.ids).tobytes()
    (encoding,) = tokenizer.encode_batch([text], add_special_tokens=has_special)
    return spans_json(text, encoding)


def main() -> None:
    prepare_child()
    tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if (fields := json.loads(sys.argv[2])) is not None:
        use_affixes(tokenizer, Affixes(**fields))
    while (frame := read_frame(sys.stdin.buffer)) is not None:
        kind, content = Kind(frame[0]), frame[1]
        try:
            answer = _encode(tokenizer, kind, content.decode())
        except Exception as error:  # the library raises plain Exception
            kind, answer = Kind.FAILED, str(error).encode()
        write_frame(sys.stdout.buffer, answer, kind)


if __name__ == "__main__":
    main()
