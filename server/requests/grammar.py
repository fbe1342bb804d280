"""Grammars on the wire become llguidance's, or are refused (`docs/wire.md`, 3.7, and texts 21 to 24 of its 2.2).

The grammar is compiled here once to refuse it before anything is queued; the engine compiles it again for its own
vocabulary. No limit of llguidance's bounds the time that a hostile schema takes (30 intersected patterns take days), so
it is compiled in a process that can be killed, `server.requests.grammar_check`. That also keeps llguidance out of this
process.
"""

from __future__ import annotations

import asyncio
import collections
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from server.errors import ValidationError
from server.piped_process import PipedProcess, has_answer
from server.requests.grammar_check import Check, Checked
from server.requests.values import GrammarSpec

MAX_GRAMMAR_CHARS = 1 << 18
TOO_LONG = f"it is longer than {MAX_GRAMMAR_CHARS} characters"
MAX_CACHED = 32
CHECK_TIMEOUT_S = 5.0
"""Usual schemas take a millisecond, and the process itself a tenth of a second to start."""
MAX_REASON_CHARS = 500

_MALFORMED = re.compile(r"Invalid type|Expected |.* must be an? ")
"""How llguidance's error begins if the text is no JSON Schema: that is text 22; all its other errors are text 24."""
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "additionalItems")
_INTERSECTING = ("allOf", "anyOf", "oneOf", "$ref")


class GrammarCompiler:
    """Compiles grammars in a process of its own, to find out whether the engine can hold to them.

    Owns that process and the thread that speaks with it. The last answers are remembered.
    """

    def __init__(self, timeout_s: float = CHECK_TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        self.process = CheckingProcess()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._answers: collections.OrderedDict[bytes, Checked] = collections.OrderedDict()

    async def compile(self, grammar: GrammarSpec, *, is_strict: bool) -> str:
        """The text that llguidance reads. Raises ValidationError.

        `is_strict`: as in TGI, keywords that cannot be held to are ignored, and a schema needs `properties` at its top.
        """
        if grammar.type == "regex":
            if not isinstance(grammar.value, str):
                raise ValidationError("grammar is not valid: a regex is a string")
            checked = await self._check(Check(regex=grammar.value))
            if checked.error is not None:
                raise ValidationError(f"grammar is not valid: {checked.error}", logged="grammar is not valid")
            return checked.grammar
        schema = _read_schema(grammar, is_strict=is_strict)
        checked = await self._check(Check(schema=closed(schema), is_lenient=is_strict))
        if checked.error is not None and _MALFORMED.match(checked.error):
            raise ValidationError(f"grammar is not valid: {checked.error}", logged="grammar is not valid")  # text 22
        if is_strict and "properties" not in schema:
            raise ValidationError("grammar is not valid: Grammar must have a 'properties' field")  # text 23
        if checked.error is not None:
            raise ValidationError(
                f"cannot compile regex from schema: {checked.error}", logged="cannot compile regex from schema"
            )  # text 24
        return checked.grammar

    async def compile_tools(self, lark: str) -> str:
        """The same for a grammar that `server.chat.tools` has made of the schemas of functions."""
        checked = await self._check(Check(lark=lark))
        if checked.error is not None:
            raise ValidationError(
                f"cannot compile regex from schema: {checked.error}", logged="cannot compile regex from schema"
            )
        return checked.grammar

    async def _check(self, check: Check) -> Checked:
        try:
            request = json.dumps(msgspec.to_builtins(check)).encode() + b"\n"
        except RecursionError:
            return Checked(error="it is nested too deeply")
        if len(request) > MAX_GRAMMAR_CHARS:
            return Checked(error=TOO_LONG)
        checked = await asyncio.get_running_loop().run_in_executor(self._thread, self._answer, request)
        return Checked(checked.grammar, checked.error and checked.error[:MAX_REASON_CHARS])

    def _answer(self, request: bytes) -> Checked:
        """Runs on the thread: the event loop goes on while the process compiles."""
        if request not in self._answers:
            self._answers[request] = self.process.check(request, self.timeout_s)
        self._answers.move_to_end(request)
        if len(self._answers) > MAX_CACHED:
            self._answers.popitem(last=False)
        return self._answers[request]

    def close(self) -> None:
        """End the process, after the grammar that it is compiling."""
        self._thread.submit(self.process.close)
        self._thread.shutdown()


def _read_schema(grammar: GrammarSpec, *, is_strict: bool) -> dict[str, Any]:
    value = grammar.value
    if grammar.type == "json_schema":
        if not isinstance(value, dict) or "schema" not in value:
            raise ValidationError("grammar is not valid: missing field `schema`")
        value = value["schema"]
    if grammar.type == "json_object" and value is None and not is_strict:  # OpenAI's JSON mode
        return {"type": "object"}
    if isinstance(value, dict):
        return value
    if not isinstance(value, str):
        raise ValidationError("grammar is not supported")  # text 21
    if len(value) > MAX_GRAMMAR_CHARS:
        raise ValidationError(f"cannot compile regex from schema: {TOO_LONG}")
    try:
        schema = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValidationError(f"grammar is not valid: {error}", logged="grammar is not valid") from error  # text 22
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise ValidationError("grammar is not valid: a schema that can be followed is an object or `true`")  # text 22
    return schema


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with no other keys than the declared ones, wherever it says nothing of others, as in TGI.

    A model would otherwise be free to add any. Where objects are intersected, all would refuse each other's keys, so
    such a schema stays as it is.
    """
    try:
        if not any(_is_intersecting(part) for part in _walk(schema)):
            schema = json.loads(json.dumps(schema))
            for part in _walk(schema):
                if "properties" in part:
                    part.setdefault("additionalProperties", False)
    except RecursionError:
        raise ValidationError("grammar is not valid: it is nested too deeply") from None
    return schema


def _is_intersecting(part: dict[str, Any]) -> bool:
    members = part.get("allOf")
    is_refined = "properties" in part and any(key in part for key in _INTERSECTING)
    return is_refined or (isinstance(members, list) and len(members) > 1)


def _walk(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and every schema within it; constants and examples are not schemas."""
    stack = [schema]
    while stack:
        part = stack.pop()
        if not isinstance(part, dict):
            continue
        yield part
        for key, value in part.items():
            if key in _SCHEMAS_BY_NAME and isinstance(value, dict):
                stack += value.values()
            elif key in _SCHEMA_LISTS and isinstance(value, list):
                stack += value
            elif key in _SCHEMAS:
                stack.append(value)


class CheckingProcess(PipedProcess):
    """The process that compiles."""

    def __init__(self) -> None:
        super().__init__("server.requests.grammar_check")

    def check(self, request: bytes, timeout_s: float) -> Checked:
        """The answer to a line. A process that says nothing in time, or dies of the line, gives way to a new one."""
        questions, answers = self.pipes()
        try:
            questions.write(request)
            questions.flush()
            if has_answer(answers, timeout_s) and (line := answers.readline()):
                return msgspec.json.decode(line, type=Checked)
        except BrokenPipeError:  # the child has died between two requests, or of this one
            pass
        self.close()
        return Checked(error="it is too complex")
