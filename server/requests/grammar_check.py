"""`python -m server.requests.grammar_check`: compiles grammars to say what is wrong with them, a line of JSON for each.

A process of its own, because a schema can be made for which llguidance takes days, or all memory. It forks for every
grammar, so that one can be given up, with SIGUSR1, and the next begins within milliseconds. It says in a line when it
is ready. A question is a line: the niceness to work with, and a `Check`. Answers are two lines: the number of the
process that is at work, and a `Checked`, or null if that process was killed or has died.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn
from urllib.parse import quote

import msgspec

from engine.link.config import GRAMMAR_LIMITS
from server.piped_process import prepare_child
from server.requests.forced_text import forcing_nothing, unforced
from server.schemas.closing import closed
from server.schemas.opening import Opening, without_idle_keywords
from server.schemas.parts import MAX_KEY_CHARS
from server.schemas.repair import repaired

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_MEMORY = 1 << 30
"""Address space of a process, in bytes. The process ends when it needs more."""
MAX_GRAMMAR_MEMORY = 32 << 20
"""Bytes that a compiled grammar may keep, in this process and in the engine, which keeps a few dozen of them."""
PAGE_SIZE = 4096
PID_BYTES = 12
"""Length of the line with a process' number."""

TOO_COMPLEX = "it is too complex"
"""Begins an error that no smaller part of a schema is to blame for."""
TOO_DEEP = "it is nested too deeply"
REPAIR_S = 2.0
"""Seconds to find out what llguidance refuses in a schema; after that all of it is left open."""

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


Mode = Literal["open", "strict", "tgi"]
"""What happens to a schema that says more than a model can be held to: that part is left open, the schema is refused,
or, as in TGI, keywords that are not known are ignored and the rest is refused."""


class HeldSchema(msgspec.Struct, frozen=True, omit_defaults=True):
    """A schema as it was sent."""

    schema: dict[str, Any]
    mode: Mode = "open"
    name: str = ""
    """The function whose arguments it describes, if it does."""


class Check(msgspec.Struct, frozen=True, omit_defaults=True):
    """A thing to compile: a regular expression, a client's grammar, or schemas.

    Several schemas are parts of a grammar of llguidance's own, which calls them `schema_0`, `schema_1`, ...
    """

    regex: str | None = None
    client_grammar: str | None = None
    """In GBNF or in llguidance's form of Lark."""
    lark: str | None = None
    schemas: tuple[HeldSchema, ...] = ()


class Checked(msgspec.Struct, frozen=True, omit_defaults=True):
    """The grammar that the engine reads, or the error."""

    grammar: str = ""
    error: str | None = None
    left_open: tuple[str, ...] = ()
    """Places of the schemas that the model is not held to."""


Prepared = tuple[Any, list[str]]
"""A schema as llguidance gets it, and the places that are left open in it."""


class Checker:
    """Compiles as the engine will, but for a vocabulary of bytes, which takes as much time and memory."""

    def __init__(self) -> None:
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer
        from llguidance.gbnf_to_lark import any_to_lark

        self._to_lark = any_to_lark
        self._matcher = LLMatcher
        self._limits = LLParserLimits(**GRAMMAR_LIMITS)
        self._tokenizer: LLTokenizer = LLTokenizer("byte")

    def check(self, request: Check) -> Checked:
        if request.regex is not None:
            return self._compiled(self._matcher.grammar_from_regex(request.regex))
        if request.client_grammar is not None:
            return self._of_client(request.client_grammar)
        prepared = [_prepared(held) for held in request.schemas]
        checked = self._with_schemas(request, prepared)
        if all(held.mode != "open" for held in request.schemas):
            return checked
        if checked.error is not None and not checked.error.startswith(TOO_COMPLEX):
            prepared = [_repaired(*pair, self._fits) for pair in zip(request.schemas, prepared, strict=True)]
            checked = self._with_schemas(request, prepared)
        if checked.error is not None:
            prepared = [_all_open(*pair) for pair in zip(request.schemas, prepared, strict=True)]
            checked = self._with_schemas(request, prepared)
        return checked

    def _with_schemas(self, request: Check, prepared: Sequence[Prepared]) -> Checked:
        try:
            return self._built(request, prepared)
        except ValueError as error:  # a number that JSON has and llguidance does not
            return Checked(error=str(error))

    def _built(self, request: Check, prepared: Sequence[Prepared]) -> Checked:
        pairs = list(zip(request.schemas, prepared, strict=True))
        left_open = tuple(quote(held.name[:MAX_KEY_CHARS]) + place for held, (_, places) in pairs for place in places)
        if request.lark is None:
            (held, (schema, _)) = pairs[0]
            return self._compiled(self._grammar_of(schema, held.mode), left_open)
        rules = [request.lark]
        for index, (held, (schema, _)) in enumerate(pairs):
            options = {"x-guidance": _options(held.mode)}
            rules.append(f"schema_{index}: %json {json.dumps(closed(schema) | options, ensure_ascii=False)}")
        return self._compiled(self._matcher.grammar_from_lark("\n".join(rules)), left_open)

    def _of_client(self, text: str) -> Checked:
        try:
            lark = self._to_lark(text)
        except RecursionError:
            raise
        except Exception as error:  # what this parser raises has no class of its own
            return Checked(error=str(error))
        # The directive keeps a text from being read as a whole grammar in JSON.
        return self._compiled(f"%llguidance {{}}\n{lark}", without_forcing=forcing_nothing)

    def _compiled(
        self, grammar: str, left_open: tuple[str, ...] = (), without_forcing: Callable[[str], str] = unforced
    ) -> Checked:
        error = self._matcher.validate_grammar(grammar, limits=self._limits)
        if error:
            return Checked(error=error)
        grammar = without_forcing(grammar)
        before = resident_bytes()
        matcher = self._matcher(self._tokenizer, _TOKEN.sub("<[1]>", grammar), log_level=0, limits=self._limits)
        matcher.compute_bitmask()
        if forced := matcher.compute_ff_tokens():
            matcher.consume_token(forced[0])  # a schema that needs itself, so that no text is enough, fails here
        if matcher.is_error():
            return Checked(error=f"{TOO_COMPLEX}: {matcher.get_error().splitlines()[0]}")
        if resident_bytes() - before > MAX_GRAMMAR_MEMORY:
            return Checked(error=f"{TOO_COMPLEX}: it takes too much memory")
        return Checked(grammar, left_open=left_open)

    def _fits(self, schema: dict[str, Any], mode: Mode) -> bool:
        try:
            return not self._matcher.validate_grammar(self._grammar_of(schema, mode), limits=self._limits)
        except ValueError:
            return False

    def _grammar_of(self, schema: dict[str, Any], mode: Mode) -> str:
        return self._matcher.grammar_from_json_schema(closed(schema), overrides=_options(mode))


def _prepared(held: HeldSchema) -> Prepared:
    # x-guidance are options of llguidance's own, and not part of a schema.
    schema = {key: value for key, value in held.schema.items() if key != "x-guidance"}
    if held.mode == "tgi":
        return schema, []
    if held.mode == "strict":
        return without_idle_keywords(schema), []
    opening = Opening(schema, is_object=bool(held.name))
    opened = opening.opened()
    return (opened, opening.left_open) if isinstance(opened, dict) else ({}, ["#"])  # nothing would be allowed


def _repaired(held: HeldSchema, prepared: Prepared, fits: Callable[[dict[str, Any], Mode], bool]) -> Prepared:
    schema, places = prepared
    if held.mode != "open":
        return prepared
    deadline = time.monotonic() + REPAIR_S

    def fits_in_time(attempt: Any) -> bool:
        if time.monotonic() > deadline:
            raise TimeoutError
        return fits(attempt, held.mode)

    try:
        schema, more = repaired(schema, fits_in_time)
    except TimeoutError:
        return _all_open(held, prepared)
    return schema, places + more


def _all_open(held: HeldSchema, prepared: Prepared) -> Prepared:
    """The last resort: any arguments, or any value."""
    if held.mode != "open":
        return prepared
    return {"type": "object"} if held.name else {}, ["#"]


def _options(mode: Mode) -> Any:
    return JSON_OPTIONS | {"lenient": mode != "strict"}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE


class Worker:
    """The process that compiles one grammar, as its parent sees it."""

    def __init__(self) -> None:
        self._pid = 0
        """0: there is none."""
        signal.signal(signal.SIGUSR1, self._kill)

    def answer(self, checker: Checker, line: bytes) -> bytes:
        """The answer to a line, as a line."""
        reading, writing = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        self._pid = os.fork()
        if not self._pid:
            _work(checker, line, writing)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        _write(b"%*d\n" % (PID_BYTES - 1, self._pid))
        os.close(writing)
        with open(reading, "rb") as stream:
            answer = stream.read()
        pid, self._pid = self._pid, 0
        os.waitpid(pid, 0)
        return answer if answer.endswith(b"\n") else b"null\n"

    def _kill(self, *_: object) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)


def _work(checker: Checker, line: bytes, writing: int) -> NoReturn:
    """Be the process that compiles."""
    try:
        prepare_child(MAX_MEMORY)
        niceness, request = line.split(b" ", 1)
        os.nice(int(niceness))
        try:
            checked = checker.check(msgspec.json.decode(request, type=Check))
        except RecursionError:
            checked = Checked(error=TOO_DEEP)
        except ValueError as error:
            checked = Checked(error=str(error))
        with open(writing, "wb") as stream:
            stream.write(msgspec.json.encode(checked) + b"\n")
    finally:
        os._exit(0)


def main() -> None:
    prepare_child(MAX_MEMORY)
    checker, worker = Checker(), Worker()
    _write(b"{}\n")
    for line in sys.stdin.buffer:
        _write(worker.answer(checker, line))


def _write(lines: bytes) -> None:
    sys.stdout.buffer.write(lines)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
