"""Tools of a chat: which are offered, how the prompt shows them, and what the model may write (`docs/wire.md`, 3.6)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from server.chat.bare_calls import call_key
from server.chat.marks import CLOSE, CLOSE_THOUGHT, OPEN, OPEN_THOUGHT
from server.chat.rendering import Ending
from server.chat.template import NO_TOOLS, OfferedTools
from server.chat.thoughts import ChatReader, Thinking
from server.chat.tool_calls import ForcedCallReader, FreeCallReader
from server.errors import ToolError, ValidationError
from server.requests.grammar_check import Check, HeldSchema
from server.requests.messages import Message
from server.requests.openai import ChatRequest, Tool
from server.requests.schemas import read_schema
from server.requests.tool_choice import AllowedToolsChoice, NamedToolChoice, ToolChoice
from server.requests.values import GrammarSpec
from server.text.tokenizer import TextTokenizer

NO_TOOL = "no_tool"
"""TGI's function for an answer in words."""

HERMES_PROMPT = (
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
    'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
"""Qwen2.5's own words, for models whose template does not say them."""

TGI_PROMPT = (
    "\nGiven the functions available, please respond with a JSON for a function call with its proper arguments that "
    "best answers the given prompt. Respond in the format {name: function name, parameters: dictionary of argument "
    "name and its value}.Do not use variables.\n"
)

HERMES_HEADER = re.compile(r'<tool_call>\n\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ')
TGI_START = '{"function": '
TGI_HEADER = re.compile(r'\{"function": \{"_name": ("(?:[^"\\]|\\.)*")(?:, |(?=\}))')


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolUse:
    """How one chat uses its tools."""

    read: Callable[..., ChatReader] = ChatReader
    """Makes a reader of an answer, given its `thinking`."""
    call_marks: tuple[str, ...] = ()
    """The marks by which that tells calls."""
    offered: OfferedTools = NO_TOOLS
    grammar: Check | None = None
    """What the model is held to, if it is not free."""
    is_named: bool = False
    """The request names the function, so that a call is no decision of the model."""
    has_no_tool: bool = False
    """As TGI has it, the model may choose to answer in words, which it writes in a second run."""
    thinking: Thinking = Thinking.NONE

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks by which an answer is read; none: all of it is words."""
        return (*self.call_marks, OPEN_THOUGHT, CLOSE_THOUGHT) if self.thinking.is_apart else self.call_marks

    def reader(self) -> ChatReader:
        """A reader of one answer, in the model's own format."""
        return self.read(thinking=self.thinking)


NO_TOOL_USE = ToolUse()


def use_tools(request: ChatRequest, tokenizer: TextTokenizer, *, is_strict: bool) -> ToolUse:
    """How `request` uses its tools. Raises ToolError, before the prompt is rendered and a stream begins."""
    if is_strict and request.tools is not None and request.response_format is not None:
        raise ToolError("Grammar and tools are mutually exclusive")
    mode = _mode(request.tool_choice)
    tools = _allowed(request) if request.tools and mode != "none" else []
    if not tools and not is_strict and mode not in ("auto", "none"):
        raise ToolError("`tool_choice` asks for a call, and there are no `tools`")
    if not tools:
        return NO_TOOL_USE
    return _tgi_use(tools, request) if is_strict else _template_use(tools, request, tokenizer)


def ending(request: ChatRequest) -> Ending:
    """How the prompt ends. Raises ValidationError."""
    if request.continue_final_message is None and request.add_generation_prompt is None:
        return Ending.AUTOMATIC
    if request.continue_final_message:
        if request.add_generation_prompt:
            text = "`continue_final_message` and `add_generation_prompt` must not both be true"
            raise ValidationError(text, param="add_generation_prompt")
        return Ending.CONTINUED
    return Ending.CLOSED if request.add_generation_prompt is False else Ending.NEW


def _mode(choice: ToolChoice) -> str:
    """`auto`, `none`, `required`, or `named` if the request names the function."""
    if isinstance(choice, AllowedToolsChoice):
        return choice.allowed_tools.mode
    if choice is None:
        return "auto"
    return choice if isinstance(choice, str) and choice in ("auto", "none", "required") else "named"


def _allowed(request: ChatRequest) -> list[Tool]:
    """The tools that may be called."""
    tools = request.tools or []
    match request.tool_choice:
        case AllowedToolsChoice(allowed_tools=allowed):
            names = [tool.function.name for tool in allowed.tools]
        case NamedToolChoice(function=function):
            names = [function.name]
        case str() as name if _mode(name) == "named":
            names = [name]
        case _:
            return tools
    offered = {tool.function.name for tool in tools}
    unknown = next((name for name in names if name not in offered), None)
    if unknown is not None:
        raise ToolError(f"Tool with name {unknown} not found")
    chosen = set(names)
    return [tool for tool in tools if tool.function.name in chosen]


def _template_use(tools: Sequence[Tool], request: ChatRequest, tokenizer: TextTokenizer) -> ToolUse:
    """Tools in the format of the model's template."""
    sent = [tool.sent for tool in tools]
    prompt = f"\n---\n{request.tool_prompt}" if request.tool_prompt else ""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in sent)
    mode = _mode(request.tool_choice)
    is_free, is_named = mode == "auto", mode == "named"
    max_calls = 1 if is_named or not request.parallel_tool_calls else None
    is_held = not is_free or request.response_format is not None
    names = [tool.function.name for tool in tools]
    answered = None if is_held else _answered_calls(request.messages)
    read_freely = partial(FreeCallReader, names, max_calls, answered=answered)
    return ToolUse(
        read=read_freely if is_free else partial(ForcedCallReader, HERMES_HEADER),
        call_marks=(OPEN, CLOSE),
        offered=OfferedTools(
            tools=sent,
            prompt=prompt,
            listed_prompt=f"\n---\n{listed}\n{request.tool_prompt or HERMES_PROMPT}",
        ),
        grammar=_hermes_grammar(request, tools, tokenizer, is_single=max_calls == 1) if is_held else None,
        is_named=is_named,
    )


def _answered_calls(messages: Sequence[Message]) -> frozenset[str]:
    """The calls that the conversation has answered since the user spoke."""
    calls: list[str] = []
    for message in messages:
        if message.role == "user":
            calls.clear()
        calls += [call_key(call.function.name, call.function.arguments) for call in message.tool_calls]
    return frozenset(calls)


def _hermes_grammar(request: ChatRequest, tools: Sequence[Tool], tokenizer: TextTokenizer, *, is_single: bool) -> Check:
    """One call or more, of these functions and by their schemas; or, if the model is free, the answer."""
    bodies = []
    for index, tool in enumerate(tools):
        header = f'{{"name": {_literal(tool.function.name)}, "arguments": '
        bodies.append(f"{_literal(header)} schema_{index} {_literal('}')}")
    newline = _literal("\n")
    rules = [f"call: {_mark(OPEN, tokenizer)} {newline} body {newline} {_mark(CLOSE, tokenizer)}"]
    schemas = [_arguments_schema(tool) for tool in tools]
    # Small models end after a line; without its end they can only call again.
    start = "call" if is_single else f"call ({newline} call)* {newline}?"
    if _mode(request.tool_choice) == "auto" and request.response_format is not None:
        start = f"{start} | answer"
        rule, answer_schemas = _answer_rule(request.response_format.spec(), len(schemas))
        rules.append(rule)
        schemas += answer_schemas
    return Check(lark=_lark(start, bodies, *rules), schemas=tuple(schemas))


def _answer_rule(answer: GrammarSpec, index: int) -> tuple[str, list[HeldSchema]]:
    """The rule of an answer in a format, and its schema, the one of number `index`. Raises ValidationError."""
    try:
        if answer.type == "regex":
            return f"answer: {_regex(answer.value)}", []
        if answer.type == "grammar":
            raise ValidationError("a grammar can't be held to beside `tools`: take a regular expression or a schema")
        return f"answer: schema_{index}", [read_schema(answer, is_strict=False)]
    except ValidationError as error:
        error.param = "response_format"
        raise


_IN_REGEX = {"/": r"\/", "\n": r"\n"}
"""What would end a regular expression within a grammar."""


def _regex(pattern: Any) -> str:
    """A regular expression within a grammar. Raises ValidationError."""
    if not isinstance(pattern, str):
        raise ValidationError("grammar is not valid: a regex is a string")
    escaped = re.sub(r"\\.|[/\n]", lambda match: _IN_REGEX.get(match[0], match[0]), pattern, flags=re.DOTALL)
    return f"/{escaped}/"


def _mark(mark: str, tokenizer: TextTokenizer) -> str:
    """A mark in a grammar, by its id if it is one token: llguidance does not take the token for its text."""
    token_id = tokenizer.token_id(mark)
    return _literal(mark) if token_id is None else f"<[{token_id}]>"


def _arguments_schema(tool: Tool) -> HeldSchema:
    schema = tool.function.arguments
    if schema is None:
        schema = {"properties": {}, "additionalProperties": False}
    elif schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ToolError(f"The parameters of {tool.function.name} are not a JSON schema")
    return HeldSchema({"type": "object"} | schema, "strict" if tool.function.strict else "open", tool.function.name)


def _tgi_use(tools: Sequence[Tool], request: ChatRequest) -> ToolUse:
    """Tools as TGI has them: JSON of its own, in which `no_tool` stands for an answer in words."""
    is_free = _mode(request.tool_choice) == "auto"
    if is_free:
        description = "Open ended response with no specific tool selected"
        function = {"name": NO_TOOL, "description": description, "arguments": {"type": "object"}}
        tools = [*tools, Tool.model_validate({"type": "function", "function": function})]
    shown = [_as_tgi_shows(tool) for tool in tools]
    listed = json.dumps(shown, ensure_ascii=False, separators=(",", ":"))
    prompt = request.tool_prompt or TGI_PROMPT
    bodies = [f"schema_{index}" for index in range(len(tools))]
    lark = _lark(f"{_literal(TGI_START)} body {_literal('}')}", bodies)
    return ToolUse(
        read=partial(ForcedCallReader, TGI_HEADER, "{"),
        offered=OfferedTools(tools=shown, prompt=f"\n---\n{prompt}", listed_prompt=f"\n---\n{listed}\n{prompt}"),
        grammar=Check(lark=lark, schemas=tuple(HeldSchema(_tgi_schema(tool), "tgi") for tool in tools)),
        has_no_tool=is_free,
    )


def _as_tgi_shows(tool: Tool) -> dict[str, Any]:
    arguments = json.dumps(tool.function.arguments, ensure_ascii=False, separators=(",", ":"))
    function = {"description": tool.function.description, "name": tool.function.name, "arguments": arguments}
    return {"type": tool.type, "function": function}


def _tgi_schema(tool: Tool) -> dict[str, Any]:
    """A schema with the name and the arguments in one object."""
    schema = tool.function.arguments if isinstance(tool.function.arguments, dict) else {}
    properties, required = schema.get("properties"), schema.get("required")
    return schema | {
        "type": "object",
        "properties": {"_name": {"const": tool.function.name}} | (properties if isinstance(properties, dict) else {}),
        "required": ["_name", *(required if isinstance(required, list) else [])],
        "additionalProperties": False,
    }


def _lark(start: str, bodies: Sequence[str], *rules: str) -> str:
    """A grammar in which `body` is one of `bodies`."""
    names = [f"body_{index}" for index in range(len(bodies))]
    alternatives = [f"{name}: {body}" for name, body in zip(names, bodies, strict=True)]
    return "\n".join([f"start: {start}", *rules, f"body: {' | '.join(names)}", *alternatives])


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
