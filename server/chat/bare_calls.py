"""Answers that are nothing but calls without their marks, as Qwen2.5-Coder writes them.

Small models that write so also repeat themselves. A call that the conversation has answered since the user spoke is no
call again, or the client's loop would not end; one that stands in the answer already is the end of the answer.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection
from typing import Any

import msgspec

from server.chat.json_text import JsonText

_KEY = re.compile(r'\{\s*(?:"(\w*)("?))?')
"""The beginning of an object. Groups: its first key as far as it goes, the quote at that key's end."""
_NAME = re.compile(r'\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)("?)')
"""An object that begins with a name. Groups: the name as JSON, as far as it goes, and the quote at its end."""
_VALUE = re.compile(r'\{\s*"(?:name"\s*:\s*[^\s"]|arguments"\s*:\s*[^\s{])')
"""An object whose first key cannot have this value if it is a call."""


class _BareCall(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: msgspec.Raw


_decode = msgspec.json.Decoder(_BareCall).decode


def call_key(name: str, arguments: Any) -> str:
    """The same text for calls that are the same. `arguments`: an object, or its JSON."""
    with contextlib.suppress(ValueError, RecursionError):  # what can be read may be too deep to be written
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
        return json.dumps([name, value], sort_keys=True)
    return json.dumps([name, arguments])


class BareCalls:
    """Follows a growing answer that may be objects `{"name": "f", "arguments": {...}}`, white space between them."""

    def __init__(self, names: Collection[str], answered: Collection[str] = ()) -> None:
        """`answered`: calls that are none again, as `call_key` has them."""
        self.calls: list[tuple[str, str]] = []
        """Names and arguments of the calls that are complete."""
        self.end = 0
        """The index in the answer at which the last of them ends."""
        self.is_repeating = False
        self._answered = answered
        self._names = {json.dumps(name, ensure_ascii=False)[1:-1]: name for name in names}
        self._object: JsonText | None = None

    def goes_on(self, answer: str) -> bool:
        """Whether `answer`, all of the text so far, may still become nothing but calls."""
        while (start := len(answer) - len(answer[self.end :].lstrip())) < len(answer):
            if not self._may_begin(answer[start:]):
                return False
            if self._object is None:
                self._object = JsonText(start)
            end = self._object.end(answer)
            if end is None:
                return True
            call = self._call(answer[start:end])
            if call is None:
                return False
            self.end, self._object = end, None
            self.is_repeating = call in self.calls
            if self.is_repeating:
                return True
            self.calls.append(call)
        return True

    def _may_begin(self, text: str) -> bool:
        """Whether the text can go on as an object with the keys of a call and the name of an offered function."""
        key, name = _KEY.match(text), _NAME.match(text)
        if name is not None:
            return name[1] in self._names if name[2] else any(known.startswith(name[1]) for known in self._names)
        if key is None or _VALUE.match(text):
            return False
        keys = ("name", "arguments")
        return key[1] in keys if key[2] else any(known.startswith(key[1] or "") for known in keys)

    def _call(self, text: str) -> tuple[str, str] | None:
        try:
            call = _decode(text)
        except (msgspec.DecodeError, RecursionError):
            return None
        arguments = bytes(call.arguments).decode()
        is_call = call.name in self._names.values() and arguments.startswith("{")
        return (call.name, arguments) if is_call and call_key(call.name, arguments) not in self._answered else None
