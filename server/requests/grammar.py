"""Grammars on the wire become llguidance's, or are refused (`docs/wire.md`, 3.7, and texts 21 to 24 of its 2.2).

The grammar is compiled here once to refuse it before anything is queued; the engine compiles it again for its own
vocabulary. No limit of llguidance's bounds the time that a hostile schema takes (30 intersected patterns take days), so
it is compiled in processes that can be killed (`server.requests.grammar_pool`). That also keeps llguidance out of this
one.
"""

from __future__ import annotations

import json
import logging
import re

import msgspec

from server.errors import ValidationError
from server.requests.grammar_check import TOO_DEEP, Check, Checked
from server.requests.grammar_pool import CheckingPool, PoolLimits
from server.requests.schemas import MAX_GRAMMAR_CHARS, TOO_LONG, read_schema
from server.requests.values import GrammarSpec
from server.schemas.parts import named

logger = logging.getLogger(__name__)

MAX_REASON_CHARS = 500

_MALFORMED = re.compile(rf"Invalid type|Expected |.* must be an? |{TOO_DEEP}")
"""How llguidance's error begins if the text is no JSON Schema: that is text 22; all its other errors are text 24."""


class GrammarCompiler:
    """Compiles grammars in processes of its own, to find out whether the engine can hold to them."""

    def __init__(self) -> None:
        self.pool = CheckingPool(PoolLimits())

    async def compile(self, grammar: GrammarSpec, *, is_strict: bool) -> Checked:
        """The text that llguidance reads, and what it leaves open. Raises ValidationError, OverloadedError.

        `is_strict`: as in TGI, keywords that cannot be held to are ignored, and a schema needs `properties` at its top.
        """
        if grammar.type in ("regex", "grammar"):
            if not isinstance(grammar.value, str):
                raise ValidationError("grammar is not valid: a regex is a string")
            is_regex = grammar.type == "regex"
            checked = await self._check(Check(regex=grammar.value) if is_regex else Check(client_grammar=grammar.value))
            if checked.error is not None:
                raise ValidationError(f"grammar is not valid: {checked.error}", logged="grammar is not valid")
            return checked
        schema = read_schema(grammar, is_strict=is_strict)
        checked = await self._check(Check(schemas=(schema,)))
        if checked.error is not None and _MALFORMED.match(checked.error):
            raise ValidationError(f"grammar is not valid: {checked.error}", logged="grammar is not valid")  # text 22
        if is_strict and "properties" not in schema.schema:
            raise ValidationError("grammar is not valid: Grammar must have a 'properties' field")  # text 23
        return _usable(checked)

    async def compile_tools(self, check: Check) -> Checked:
        """The same for what `server.chat.tools` has made of the schemas of functions."""
        return _usable(await self._check(check))

    async def _check(self, check: Check) -> Checked:
        try:
            request = json.dumps(msgspec.to_builtins(check)).encode() + b"\n"
        except RecursionError:
            return Checked(error=TOO_DEEP)
        if len(request) > MAX_GRAMMAR_CHARS:
            return Checked(error=TOO_LONG)
        checked = await self.pool.check(request)
        if checked.left_open:
            logger.debug("The model is not held to %s", named(checked.left_open))
        return msgspec.structs.replace(checked, error=checked.error and checked.error[:MAX_REASON_CHARS])

    def close(self) -> None:
        self.pool.close()


def _usable(checked: Checked) -> Checked:
    """Raises ValidationError."""
    if checked.error is not None:
        raise ValidationError(
            f"cannot compile regex from schema: {checked.error}", logged="cannot compile regex from schema"
        )  # text 24
    return checked


def after(preface: str, grammar: str) -> str:
    """A grammar that begins with what `preface` allows: rules of llguidance's, one of them called `preface`."""
    whole = json.loads(grammar) if grammar.startswith("{") else {"grammars": [{"lark_grammar": grammar}]}
    first, *others = whole["grammars"]
    beginning = {"lark_grammar": f"start: preface @answer\n{preface}"}
    return json.dumps(whole | {"grammars": [beginning, first | {"name": "answer"}, *others]}, ensure_ascii=False)
