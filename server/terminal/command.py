"""`text-generation-server chat`: flags in, a conversation or one answer out."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

from engine.link.encoding import use_utf8
from engine.link.suggestions import SuggestingParser
from server.bench.connection import Address
from server.bench.discovery import find_model
from server.bench.errors import BenchmarkError
from server.bench.options import positive_number
from server.terminal.commands import COMMANDS
from server.terminal.conversation import Conversation, read_params
from server.terminal.errors import ChatError
from server.terminal.exchange import stream_events
from server.terminal.reply import Kind, Reply
from server.terminal.screen import Screen
from server.terminal.session import Ask, Session
from server.terminal.visible import visible

PROGRAM = "text-generation-server chat"
INTERRUPTED_EXIT_CODE = 130
TERMINATED_EXIT_CODE = 143

DESCRIPTION = """\
Talk with a running server that has OpenAI's routes: this one, TGI, vLLM, llama.cpp, or a service. In a terminal it is a
conversation; /help lists its commands. With standard input from a pipe or a file all of that is one message, and the
answer is all that comes on standard output.
"""
EXAMPLES = """\
Examples:
  text-generation-server chat http://localhost:8080
  text-generation-server chat localhost:8080 --system "Answer in one sentence." --params "temperature=0 max_tokens=200"
  git diff | text-generation-server chat localhost:8080 --system "Write a commit message." > message.txt
"""


def build_parser(shown_as: str = PROGRAM) -> argparse.ArgumentParser:
    """`shown_as` is the command that the user typed."""
    parser = SuggestingParser(
        prog=shown_as,
        description=DESCRIPTION,
        epilog=EXAMPLES.replace(PROGRAM, shown_as),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("url", metavar="URL", help="address of the server")
    parser.add_argument("--model", help="model to name in requests (default: the first of /v1/models)")
    parser.add_argument("--api-key", help="sent as a bearer token (default: OPENAI_API_KEY)")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    params = "parameters of requests, each value JSON or a word: temperature=0 stop='[\"\\n\"]'"
    parser.add_argument("--params", metavar="'NAME=VALUE ...'", default="", help=params)
    timeout = "seconds without a byte after which an answer has failed (default 120)"
    parser.add_argument("--timeout", type=positive_number, default=120.0, metavar="S", help=timeout)
    return parser


def main(arguments: Sequence[str], shown_as: str = PROGRAM, environ: Mapping[str, str] = os.environ) -> int:
    """The exit code: 0, 1 if there is no server or no answer, 130 after Ctrl-C before a conversation or in a pipe."""
    use_utf8()
    parser = build_parser(shown_as)
    args = parser.parse_args(arguments)
    # The terminal is put right again on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED_EXIT_CODE))
    api_key = args.api_key or environ.get("OPENAI_API_KEY") or ""
    if not (args.url + api_key).isascii() or not (args.url + api_key).isprintable():
        parser.error("the address and the API key may have printable ASCII characters only")
    try:
        address = Address.parse(args.url, api_key)
        conversation = Conversation("", args.system, read_params(args.params))
    except (ValueError, ChatError) as error:
        parser.error(str(error))
    try:
        conversation.model = args.model or asyncio.run(find_model(address, args.timeout))
        ask = functools.partial(stream_events, address, timeout_s=args.timeout)
        if sys.stdin.isatty() and sys.stdout.isatty():
            talk(ask, conversation, address, environ)
        else:
            answer_once(ask, conversation, sys.stdin.buffer.read().decode(errors="replace"), sys.stdout)
    except (BenchmarkError, ChatError) as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it ends
        return 1
    return 0


def talk(ask: Ask, conversation: Conversation, address: Address, environ: Mapping[str, str]) -> None:
    """A conversation at the terminal."""
    from server.terminal.keyboard import TerminalKeyboard  # a pipe has no use for its library, which loads in 0.2 s

    is_styled = environ.get("TERM", "dumb") != "dumb" and not environ.get("NO_COLOR")
    screen = Screen(sys.stdout, is_styled=is_styled)
    screen.remark(f"{conversation.model} at {address.url}: /help lists commands and keys, Ctrl-D leaves.")
    Session(ask, conversation, TerminalKeyboard(list(COMMANDS), environ), screen).talk()


def answer_once(ask: Ask, conversation: Conversation, message: str, out: TextIO) -> None:
    """One message, and its answer as plain text that ends with a line break. Raises ChatError."""
    if not message.strip():
        raise ChatError("standard input is empty: pipe a message in, or start it in a terminal")
    conversation.messages.append({"role": "user", "content": message})
    reply = Reply()
    with contextlib.closing(ask(conversation.request)) as events:
        for event in events:
            for kind, text in reply.take(event):
                if kind is Kind.TEXT:
                    print(visible(text), end="", file=out, flush=True)
    if not reply.text.endswith("\n"):
        print(file=out, flush=True)
    if reply.finish_reason == "length":
        print("The answer was cut at its limit of tokens: --params max_tokens=N sets another.", file=sys.stderr)
