"""The table of wires: for each the route, what a request's body is, and what an event of the stream says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from server.bench.trace import Plan

Body = dict[str, Any]


@dataclass(frozen=True)
class Event:
    """What one event of a stream says."""

    has_token: bool
    usage: tuple[int, int] | None = None
    """Tokens of the prompt (0: not said) and of the output."""
    error: str | None = None


@dataclass(frozen=True)
class Options:
    """What all requests of a benchmark share."""

    model: str
    """On TGI's wire an adapter; empty: the model as it is."""
    ignores_eos: bool
    sampling: Mapping[str, Any]
    """TGI's names of the sampling parameters that were given -> values."""
    served: str
    """The model, and the adapter if there is one, for the reader of the report."""


@dataclass(frozen=True)
class Wire:
    route: str
    body: Callable[[Plan, Options], Body]
    event: Callable[[Body], Event]
    sampling: frozenset[str]
    """The sampling parameters that it knows."""
    names_adapters_only: bool = False
    """Whether a request names an adapter, and the model as it is has no name."""


def error_of(event: Body) -> str | None:
    """The words of an event that ends a stream with an error, TGI's or OpenAI's; None for any other."""
    error = event.get("error")
    if isinstance(error, dict):
        return str(error.get("message", error))
    return None if error is None else str(error)


def _native_body(plan: Plan, options: Options) -> Body:
    parameters = {"max_new_tokens": plan.max_new_tokens, "details": True, **options.sampling}
    if options.ignores_eos:
        parameters["ignore_eos"] = True
    if options.model:
        parameters["adapter_id"] = options.model
    return {"inputs": plan.prompt, "parameters": parameters}


def _native_event(event: Body) -> Event:
    details = event.get("details") or {}
    usage = (details.get("input_length") or 0, details["generated_tokens"]) if "generated_tokens" in details else None
    return Event("token" in event, usage, error_of(event))


def _openai_body(plan: Plan, options: Options) -> Body:
    sampling = {name: value for name, value in options.sampling.items() if name != "do_sample"}
    if not options.sampling:
        sampling["temperature"] = 0.0
    body = {"model": options.model, "max_tokens": plan.max_new_tokens, "stream": True, **sampling}
    body["stream_options"] = {"include_usage": True}
    if options.ignores_eos:
        body |= {"ignore_eos": True, "min_tokens": plan.max_new_tokens}
    return body


def _completion_body(plan: Plan, options: Options) -> Body:
    return {"prompt": plan.prompt, **_openai_body(plan, options)}


def _chat_body(plan: Plan, options: Options) -> Body:
    return {"messages": [{"role": "user", "content": plan.prompt}], **_openai_body(plan, options)}


def _completion_event(event: Body) -> Event:
    return _openai_event(event, any(choice.get("text") for choice in event.get("choices") or []))


def _chat_event(event: Body) -> Event:
    deltas = [choice.get("delta") or {} for choice in event.get("choices") or []]
    return _openai_event(event, any(value for delta in deltas for name, value in delta.items() if name != "role"))


def _openai_event(event: Body, has_token: bool) -> Event:
    usage = event.get("usage") or {}
    counts = (usage.get("prompt_tokens") or 0, usage["completion_tokens"]) if "completion_tokens" in usage else None
    return Event(has_token, counts, error_of(event))


OPENAI_SAMPLING = frozenset("temperature top_k top_p repetition_penalty frequency_penalty do_sample".split())
NATIVE_SAMPLING = OPENAI_SAMPLING | {"typical_p", "top_n_tokens", "watermark"}

WIRES = {
    "tgi": Wire("/generate_stream", _native_body, _native_event, NATIVE_SAMPLING, names_adapters_only=True),
    "completions": Wire("/v1/completions", _completion_body, _completion_event, OPENAI_SAMPLING),
    "chat": Wire("/v1/chat/completions", _chat_body, _chat_event, OPENAI_SAMPLING),
}
