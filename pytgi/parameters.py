"""The parameters of requests as keyword arguments: names and types. What they do and which values they may have is the
server's to say: /generate's for texts, those of /v1/chat/completions for chats.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict


class GenerateParameters(TypedDict, total=False):
    """`parameters` of /generate."""

    best_of: int | None
    temperature: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    do_sample: bool
    max_new_tokens: int | None
    return_full_text: bool | None
    stop: Sequence[str]
    truncate: int | None
    watermark: bool
    details: bool
    decoder_input_details: bool
    seed: int | None
    top_n_tokens: int | None
    grammar: Mapping[str, Any] | None
    adapter_id: str | None
    logit_bias: Mapping[str, float] | Mapping[int, float] | None
    ignore_eos: bool


class ChatParameters(TypedDict, total=False):
    """The fields of a body of /v1/chat/completions, but for the messages and whether it is a stream."""

    model: str | None
    max_tokens: int | None
    max_completion_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    typical_p: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    repetition_penalty: float | None
    stop: str | Sequence[str] | None
    seed: int | None
    stream_options: Mapping[str, Any] | None
    logprobs: bool | None
    top_logprobs: int | None
    prompt_logprobs: int | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    tool_prompt: str | None
    parallel_tool_calls: bool
    response_format: Mapping[str, Any] | None
    structured_outputs: Mapping[str, Any] | None
    guided_json: Any
    guided_regex: str | None
    guided_choice: Sequence[str] | None
    guided_grammar: str | None
    include_reasoning: bool
    n: int | None
    logit_bias: Mapping[str, float] | Mapping[int, float] | None
    ignore_eos: bool
    min_tokens: int | None
    stop_token_ids: Sequence[int]
    bad_words: Sequence[str]
    allowed_token_ids: Sequence[int] | None
    truncate_prompt_tokens: int | None
    skip_special_tokens: bool
    include_stop_str_in_output: bool
    continue_final_message: bool | None
    add_generation_prompt: bool | None
    chat_template_kwargs: Mapping[str, Any]
    reasoning_effort: str | None


def check_names(parameters: Mapping[str, Any], known: type[Any]) -> None:
    """Raise TypeError for a name that is no key of the TypedDict `known`: the server would ignore it."""
    names = known.__annotations__
    for name in parameters:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            guess = f", did you mean {near[0]}?" if near else ""
            raise TypeError(f"{name} is no parameter of such a request{guess}")
