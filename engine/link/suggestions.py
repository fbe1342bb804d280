"""Command lines that name the nearest word where somebody mistyped a flag, a choice or a command."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

MIN_LIKENESS = 0.7
"""Share of two words that has to be alike. With less a word of another program gets a suggestion that means nothing."""


def suggestion(words: Iterable[str], known: Iterable[str], prefix: str = "") -> str:
    """` (did you mean X?)` with the known word nearest to each of `words`, after `prefix`; empty if none is near."""
    by_lower = {word.lower(): word for word in known}
    near = [difflib.get_close_matches(word.lower(), by_lower, 1, MIN_LIKENESS) for word in words]
    names = dict.fromkeys(prefix + by_lower[match] for matches in near for match in matches)
    return f" (did you mean {', '.join(names)}?)" if names else ""


class SuggestingParser(argparse.ArgumentParser):
    """An ArgumentParser whose messages on words that it does not know say which known ones are near.

    A parser of a subcommand refuses unknown flags itself: only it knows those that were meant.
    """

    def parse_known_args(  # type: ignore[override]  # the base has overloads for other namespaces
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        values, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [word.partition("=")[0] for word in unknown if word.startswith("--")]
            names = [name for name in self._option_string_actions if name.startswith("--")]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{suggestion(flags, names)}")
        return values, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            raise argparse.ArgumentError(
                action, error.message + suggestion([str(value)], action.choices or ())
            ) from None
