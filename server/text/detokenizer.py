"""Incremental text of one sequence, and stop strings on that text. Plain strings and ids; knows no HTTP."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import NamedTuple

from server.text.token_names import REPLACEMENT
from server.text.tokenizer import TextTokenizer

CONTEXT_TOKENS = 5
"""Number of prompt tokens that are decoded along with the first new ones, as their text can depend on them."""


class TokenText(NamedTuple):
    text: str
    """The token as the wire shows it: `<|im_end|>` for a special one, "" while a character is incomplete."""
    visible: str
    """The token's part in `generated_text` and in a chat's content."""


class Detokenizer:
    """TGI's rule (`docs/wire.md`, 4.1): text comes out once it ends in whole characters, and never before.

    `_window` holds the ids that still matter: the last ones whose text is out, then those whose text is held back.
    """

    def __init__(
        self, tokenizer: TextTokenizer, prompt_token_ids: Sequence[int], shown_ids: Collection[int] = ()
    ) -> None:
        """`shown_ids`: special tokens whose text is visible all the same."""
        self._tokenizer = tokenizer
        self._shown_ids = shown_ids
        self._window = list(prompt_token_ids[-CONTEXT_TOKENS:])
        self._num_read = len(self._window)
        self._read_text = tokenizer.decode(self._window)
        self._held = ""

    def push(self, token_id: int, *, is_last: bool, is_hidden: bool = False) -> TokenText:
        """Take the next token; with the last one, whole characters that were held back come out as well.

        `is_hidden`: the token is not visible, though it may be no special one.
        """
        held_before = self._held
        text = visible = self._advance(token_id)
        is_special = self._tokenizer.is_special(token_id) and token_id not in self._shown_ids
        if text and (is_special or is_hidden):
            visible = held_before.rstrip(REPLACEMENT)
        if is_last and self._held:
            rest = self._held.rstrip(REPLACEMENT)
            return TokenText(text + rest, visible + rest)
        return TokenText(text, visible)

    def _advance(self, token_id: int) -> str:
        self._window.append(token_id)
        self._held = self._tokenizer.decode(self._window)[len(self._read_text) :]
        if not self._held or self._held.endswith(REPLACEMENT):
            return ""
        text, self._held = self._held, ""
        self._window = self._window[self._num_read :]
        self._num_read = len(self._window)
        self._read_text = self._tokenizer.decode(self._window)
        return text


class StopChecker:
    """Finds the first stop string to be completed, also in the middle of a token.

    It keeps no more of the text seen before than a stop string could still begin in.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._tail_length = max((len(stop) for stop in stops), default=1) - 1
        self._tail = ""

    def check(self, text: str) -> int | None:
        """Number of characters of the newest token's `text` to keep if a stop string ends in it, else None."""
        seen = self._tail + text
        ends = [end for stop in self._stops if (end := self._end_of(stop, seen)) is not None]
        if ends:
            end = min(ends)
            if seen[end:] in ("", "\n"):  # TGI lets a stop string end a token with or without a newline
                end = len(seen)
            return end - len(self._tail)
        self._tail = seen[-self._tail_length :] if self._tail_length else ""
        return None

    def _end_of(self, stop: str, seen: str) -> int | None:
        """The index at which `stop` ends in the part of `seen` that is new; None if it does not."""
        if not stop:  # as in TGI an empty stop string stops at the first token, and keeps it
            return len(seen)
        start = seen.find(stop, max(0, len(self._tail) - len(stop) + 1))
        return None if start < 0 else start + len(stop)


class StopCutter:
    """Ends a text before the first stop string in it, as OpenAI has it. Text that may begin one is held back."""

    def __init__(self, stops: Sequence[str], *, is_shown: bool = False) -> None:
        """`is_shown`: the text ends after the stop string."""
        self._searches = [_Search(stop) for stop in stops]
        self._is_shown = is_shown
        self._held = ""
        self.found: str | None = None
        """The stop string that has ended the text."""

    def push(self, text: str, *, is_last: bool) -> tuple[str, bool]:
        """The text that comes out now, and whether a stop string ended it."""
        seen = self._held + text
        ends = [(search.push(text), search.stop) for search in self._searches]
        starts = [(len(self._held) + end - len(stop), stop) for end, stop in ends if end is not None]
        if starts:
            start, self.found = min(starts)
            return seen[: start + len(self.found)] if self._is_shown else seen[:start], True
        num_held = 0 if is_last else max((search.num_matched for search in self._searches), default=0)
        num_out = len(seen) - num_held
        self._held = seen[num_out:]
        return seen[:num_out], False


class _Search:
    """Finds a string in a text that comes in parts, each character once (Knuth, Morris and Pratt)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        """Characters of `stop` that the text so far ends with."""
        self._shorter = _shorter_matches(stop)

    def push(self, text: str) -> int | None:
        """The index in `text` behind the first whole match; None: there is none yet."""
        if not self.stop:
            return 0
        for index, character in enumerate(text):
            self.num_matched = _longest_match(self.stop, self._shorter, self.num_matched, character)
            if self.num_matched == len(self.stop):
                return index + 1
        return None


@functools.lru_cache(maxsize=64)
def _shorter_matches(stop: str) -> Sequence[int]:
    """For each number of matched characters, less one, the next smaller number that the text ends with as well.

    All choices of a request look for the same strings, and the table of a long one takes a millisecond.
    """
    shorter = [0] * len(stop)
    for index in range(1, len(stop)):
        shorter[index] = _longest_match(stop, shorter, shorter[index - 1], stop[index])
    return shorter


def _longest_match(stop: str, shorter: Sequence[int], num_matched: int, character: str) -> int:
    """The characters of `stop` that a text ends with, which ended with `num_matched` before `character` came."""
    while num_matched and stop[num_matched] != character:
        num_matched = shorter[num_matched - 1]
    return num_matched + (stop[num_matched] == character)
