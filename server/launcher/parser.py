"""The table of flags as an argparse parser. A usage error (unknown flag, bad value) ends the process with 2."""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Callable
from typing import Any, NoReturn

from engine.link.suggestions import SuggestingParser, suggestion
from server.launcher.flag import BOOLEAN, Effect, Flag, Value
from server.launcher.flags import SECTIONS

USAGE_EXIT_CODE = 2

EPILOG = """\
Every flag but --env has an environment twin: --max-total-tokens is MAX_TOTAL_TOKENS. The flag wins.
(ours): TGI has no such flag. (no effect), (refused): TGI has it, and here it does nothing, or ends the start.
Further variables and what each flag does here: docs/configuration.md.

Examples:
  text-generation-launcher --model-id Qwen/Qwen2.5-0.5B-Instruct --port 8080
  text-generation-launcher --model-id ./my-model --max-total-tokens 4096 --max-input-tokens 2048
"""


USAGE = "text-generation-launcher --model-id MODEL [flags]"


class _Parser(SuggestingParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_EXIT_CODE, f"error: {message}\n\nUsage: {self.usage}\n\nFor more information, try '--help'.\n")


class _Once(argparse.Action):
    """Refuses a flag that is given twice, as TGI's parser does: that is a mistake which should be seen."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "given more than once")
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)


def build_parser(usage: str = USAGE) -> argparse.ArgumentParser:
    """The parser of the table. A value stays None when it is not given, so that the environment can be asked."""
    parser = _Parser(
        prog="text-generation-launcher",
        usage=usage,
        description="Serve a Qwen-family model over TGI's and OpenAI's routes.",
        epilog=EPILOG.replace(_command(USAGE), _command(usage)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    version = f"pytgi {importlib.metadata.version('pytgi')}"
    parser.add_argument("--version", "-V", action="version", version=version)
    for title, flags in SECTIONS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            _add_flag(group, flag)
    return parser


def _command(usage: str) -> str:
    return usage.partition(" MODEL")[0]


def _add_flag(group: argparse._ArgumentGroup, flag: Flag) -> None:
    names = [f"--{flag.name}", *([f"-{flag.short}"] if flag.short else [])]
    help_text = _help(flag).replace("%", "%%")
    if flag.is_switch:
        group.add_argument(*names, dest=flag.attribute, action=_Once, nargs=0, const=True, help=help_text)
    else:
        group.add_argument(
            *names,
            dest=flag.attribute,
            action="append" if flag.is_repeatable else _Once,
            type=flag_type(flag),
            metavar="{" + ",".join(flag.served_choices) + "}" if flag.choices else flag.value.metavar,
            help=help_text,
        )


def _help(flag: Flag) -> str:
    default = "" if flag.default is None else f" (default: {flag.default})"
    effect = {
        Effect.SERVED: f" ({', '.join(flag.refused_choices)}: refused)" if flag.refused_choices else "",
        Effect.NONE: f" (no effect: {flag.reason})",
        Effect.REFUSED: f" (refused: {flag.reason})",
    }[flag.effect]
    variable = f" [env: {flag.variable}]" if flag.has_variable else ""
    return f"{flag.help}{default}{effect}{variable}"


def flag_type(flag: Flag) -> Callable[[str], Any]:
    """The function from a text to the flag's value. It raises ArgumentTypeError, whose text argparse prints."""

    def parse(text: str) -> Any:
        if flag.choices is not None and text not in flag.choices:
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r} {_served_choices_sentence(flag, text)}")
        return parse_value(BOOLEAN if flag.is_switch else flag.value, text, is_secret=flag.is_secret)

    return parse


def _served_choices_sentence(flag: Flag, text: str) -> str:
    """The sentence's end on a value that the flag does not know: never a choice that would be refused, too."""
    if flag.effect is Effect.REFUSED:
        return f"({flag.reason})"
    return f"(choose from {', '.join(flag.served_choices)}){suggestion([text], flag.served_choices)}"


def parse_value(value: Value, text: str, *, is_secret: bool = False) -> Any:
    """Raises ArgumentTypeError, whose text does not repeat a secret."""
    try:
        return value.parse(text)
    except ValueError:
        shown = "***" if is_secret else repr(text)
        raise argparse.ArgumentTypeError(f"invalid {value.name} value: {shown}") from None
