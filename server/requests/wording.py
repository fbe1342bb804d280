"""Refusals in the words of a request: what has another name there is called as the client knows it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

from server.errors import TemplateError, ToolError, ValidationError
from server.requests.rows import Dialect
from server.requests.sampling import ROWS

_NAME = re.compile(r"(?<=`)[\w.\[\]]+(?=`)|^[\w.\[\]]+(?=: )")
"""The name of a field in a text: between backticks, or the path that a text begins with."""


class Wording:
    """The names that a shape of requests has for things."""

    def __init__(self, names: Mapping[str, str]) -> None:
        """`names`: a regular expression for a thing's name here -> its name there, which may refer to groups."""
        self._by_pattern = dict(names)
        self._names = {re.compile(pattern): there for pattern, there in names.items()}

    def name(self, here: str) -> str:
        """The name of a field, which may be a path."""
        matches = ((pattern.fullmatch(here), there) for pattern, there in self._names.items())
        return next((match.expand(there) for match, there in matches if match), here)

    def with_format(self, key: str) -> Wording:
        """These words, for a request that has `key` in place of `response_format`."""
        here = self.name("grammar")
        return self if here == key else Wording(self._by_pattern | dict.fromkeys(("grammar", here), key))

    def text(self, text: str) -> str:
        return _NAME.sub(lambda match: self.name(match[0]), text)

    @contextlib.contextmanager
    def speaking(self) -> Iterator[None]:
        """Refusals leave the block in these words."""
        try:
            yield
        except ValidationError as error:
            text = str(error)
            error.args = (self.text(text),)
            if error.logged_text == text:
                error.logged_text = str(error)
            error.param = error.param and self.name(error.param)
            raise
        except (TemplateError, ToolError) as error:
            error.param = self.name(error.param)
            raise


TGI_WORDING = Wording({})


def _wording_of(dialect: Dialect, length_key: str) -> Wording:
    names = {name: row.keys(name, dialect)[0] for name, row in ROWS.items() if dialect in row.spellings}
    return Wording(names | {"inputs": dialect.prompt_key, "max_new_tokens": length_key})


CHAT_WORDINGS = {
    key: _wording_of(Dialect.CHAT, key) for key in ROWS["max_new_tokens"].keys("max_new_tokens", Dialect.CHAT)
}
"""By the key that a chat has for its length."""
COMPLETIONS_WORDING = _wording_of(Dialect.COMPLETIONS, "max_tokens")

RESPONSES_WORDING = Wording(
    {
        "max_tokens": "max_output_tokens",
        "messages": "input",
        r"(tools\[\d+\])\.function(.*)": r"\1\2",
        r"response_format(?:\.json_schema)?(.*)": r"text.format\1",
    }
)
"""A chat's names in /v1/responses."""

ANTHROPIC_WORDING = Wording(
    {
        "stop": "stop_sequences",
        r"(tools\[\d+\])\.function\.parameters": r"\1.input_schema",
        r"(tools\[\d+\])\.function(.*)": r"\1\2",
    }
)
"""A chat's names in /v1/messages."""
