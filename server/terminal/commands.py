"""The table of what may be typed after a slash."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.link.suggestions import suggestion
from server.terminal.conversation import Conversation, name_of, read_params, read_tools
from server.terminal.errors import ChatError
from server.terminal.visible import visible

NONE = "none"
"""The argument that takes a setting away."""
KNOWN_PARAMS = """
    chat_template_kwargs frequency_penalty ignore_eos logit_bias max_completion_tokens max_tokens min_p min_tokens
    parallel_tool_calls presence_penalty reasoning_effort repetition_penalty response_format seed stop temperature
    tool_choice top_k top_p typical_p
""".split()
"""The usual parameters of chats, one of which a mistyped name may mean. Any name is sent: servers differ."""

Act = Callable[[Conversation, str], str]
"""Conversation and the text after the command -> what is said. Raises ChatError, and EOFError to leave."""


@dataclass(frozen=True)
class Command:
    usage: str
    summary: str
    act: Act


def run_command(line: str, conversation: Conversation) -> str:
    """What the command says. Raises ChatError, and EOFError to leave."""
    name, *rest = line.split(maxsplit=1)
    if name not in COMMANDS:
        near = suggestion([name], COMMANDS)
        raise ChatError(f"{name} is no command{near}: /help lists them, and a space before it makes it a message")
    return COMMANDS[name].act(conversation, "".join(rest).strip())


def _system(conversation: Conversation, argument: str) -> str:
    if argument:
        conversation.system = None if argument == NONE else argument
    return "There is no system prompt." if conversation.system is None else f"System prompt: {conversation.system}"


def _params(conversation: Conversation, argument: str) -> str:
    notes = []
    if argument == NONE:
        conversation.params.clear()
    elif argument:
        params = read_params(argument)
        notes = [
            f"{name} is sent as it is{near}"
            for name in params
            if name not in KNOWN_PARAMS and (near := suggestion([name], KNOWN_PARAMS))
        ]
        conversation.params |= params
        conversation.params = {name: value for name, value in conversation.params.items() if value is not None}
    lines = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in conversation.params.items()]
    return "\n".join([*notes, *(lines or ["No parameters are set: the server's defaults count."])])


def _tools(conversation: Conversation, argument: str) -> str:
    if argument == NONE:
        conversation.tools = []
    elif argument:
        conversation.tools = read_tools(argument if argument[0] in "[{" else _text_of(Path(argument)))
    names = ", ".join(name_of(tool) for tool in conversation.tools)
    return f"The model may call {names}." if names else "The model has no tools."


def _text_of(path: Path) -> str:
    try:
        return path.expanduser().read_text()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ChatError(f"{path} can't be read ({why}): give a file with a list of tools as JSON") from error


def _save(conversation: Conversation, argument: str) -> str:
    if not argument:
        raise ChatError("where to? /save FILE.md is for reading, /save FILE.json for sending again")
    path = Path(argument).expanduser()
    if path.suffix == ".json":
        text = json.dumps(conversation.request, ensure_ascii=False, indent=2) + "\n"
    else:
        text = visible(conversation.as_markdown())
    try:
        with path.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except FileExistsError:
        raise ChatError(f"{path} exists: give another name") from None
    except OSError as error:
        raise ChatError(f"{path} can't be written ({error.strerror}): give another place") from error
    return f"Saved to {path}."


def _clear(conversation: Conversation, argument: str) -> str:
    conversation.messages.clear()
    return "A new conversation begins; system prompt, parameters and tools stay."


def _help(conversation: Conversation, argument: str) -> str:
    width = max(len(command.usage) for command in COMMANDS.values())
    return "\n".join([*(f"{each.usage:{width}}  {each.summary}" for each in COMMANDS.values()), KEYS])


def _quit(conversation: Conversation, argument: str) -> str:
    raise EOFError


COMMANDS = {
    command.usage.split()[0]: command
    for command in [
        Command("/system [TEXT|none]", "show, set or take away the system prompt", _system),
        Command("/params [NAME=VALUE ...|none]", "show or set parameters of requests; null takes one away", _params),
        Command("/tools [FILE|JSON|none]", "show, load or take away the tools that the model may call", _tools),
        Command("/clear", "begin a new conversation", _clear),
        Command("/save FILE", "write the conversation: FILE.json as a request, any other as Markdown", _save),
        Command("/help", "say this", _help),
        Command("/quit", "leave", _quit),
    ]
}
"""Name -> command."""

KEYS = """\
Enter sends; Alt-Enter, Ctrl-J, or Enter after a backslash begins a new line; what is pasted keeps its lines.
Arrows bring earlier messages back, Ctrl-R searches them, Tab completes a command.
Ctrl-C stops an answer and keeps what has come of it, Ctrl-D leaves."""
