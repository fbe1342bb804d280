"""`python -m server.requests.grammar_check`: compiles grammars to say what is wrong with them, a line of JSON for each.

A process of its own, because a schema can be made for which llguidance takes days, or all memory. It says so in a line
when it is ready.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from engine.link.config import GRAMMAR_LIMITS
from server.piped_process import prepare_child
from server.requests.forced_text import unforced

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_MEMORY = 1 << 30
"""Address space of this process, in bytes. The process ends when it needs more."""
MAX_GRAMMAR_MEMORY = 32 << 20
"""Bytes that a compiled grammar may keep, in this process and in the engine, which keeps a few dozen of them."""
PAGE_SIZE = 4096

JSON_OPTIONS: dict[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
}
"""White space is as `json.dumps` writes it, which Qwen2.5's tool calls have, too. TGI lets the model choose between one
space and none at each place: this is among its choices, and speculation knows what comes. `oneOf` is `anyOf`, as in
TGI."""

_TOKEN = re.compile(r"<\[\d+\]>")
"""A token of the model's vocabulary in a grammar of ours; a vocabulary of bytes has no such."""


class Check(msgspec.Struct, frozen=True, omit_defaults=True):
    """A thing to compile: a regular expression, a grammar of llguidance's own, or else a schema."""

    regex: str | None = None
    lark: str | None = None
    schema: dict[str, Any] | None = None
    is_lenient: bool = False
    """Ignore keywords that llguidance does not know."""


class Checked(msgspec.Struct, frozen=True, omit_defaults=True):
    """The grammar that the engine reads, or the error."""

    grammar: str = ""
    error: str | None = None


class Checker:
    """Compiles as the engine will, but for a vocabulary of bytes, which takes as much time and memory."""

    def __init__(self) -> None:
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer

        self._matcher = LLMatcher
        self._limits = LLParserLimits(**GRAMMAR_LIMITS)
        self._tokenizer: LLTokenizer = LLTokenizer("byte")

    def check(self, request: Check) -> Checked:
        grammar = self._grammar(request)
        error = self._matcher.validate_grammar(grammar, limits=self._limits)
        if error:
            return Checked(error=error)
        grammar = unforced(grammar)
        before = resident_bytes()
        matcher = self._matcher(self._tokenizer, _TOKEN.sub("<[1]>", grammar), log_level=0, limits=self._limits)
        matcher.compute_bitmask()
        if matcher.is_error():
            return Checked(error=f"it is too complex: {matcher.get_error().splitlines()[0]}")
        if resident_bytes() - before > MAX_GRAMMAR_MEMORY:
            return Checked(error="it is too complex: it takes too much memory")
        return Checked(grammar)

    def _grammar(self, request: Check) -> str:
        if request.regex is not None:
            return self._matcher.grammar_from_regex(request.regex)
        if request.lark is not None:
            return self._matcher.grammar_from_lark(request.lark)
        # x-guidance are options of llguidance's own, and not part of a schema.
        schema = {key: value for key, value in (request.schema or {}).items() if key != "x-guidance"}
        overrides: Any = {**JSON_OPTIONS, "lenient": request.is_lenient}
        return self._matcher.grammar_from_json_schema(schema, overrides=overrides)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE


def main() -> None:
    prepare_child(MAX_MEMORY)
    checker = Checker()
    _write(b"{}")
    start = resident_bytes()
    for line in sys.stdin.buffer:
        try:
            checked = checker.check(msgspec.json.decode(line, type=Check))
        except (ValueError, RecursionError) as error:
            checked = Checked(error=str(error))
        _write(msgspec.json.encode(checked))
        if resident_bytes() - start > MAX_GRAMMAR_MEMORY:
            break  # what is freed and used again would not be measured; a new process begins with nothing


def _write(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
