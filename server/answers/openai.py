"""Parts of answers that the OpenAI-shaped routes share (`docs/wire.md`, 1.10, 1.11 and 3.5)."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from engine.link.messages import FinishReason
from server.answers.json import (
    SYSTEM_FINGERPRINT,
    CompletionTokensDetails,
    JsonF32,
    PromptTokensDetails,
    Scored,
    Usage,
    f32,
)
from server.answers.sse import DONE, event, with_error_event
from server.config import TGI_MODEL_NAME, ServerConfig
from server.errors import error_body, openai_error_body
from server.generation import GeneratedToken, Generation, Stream
from server.text.token_names import TokenName

NameOf = Callable[[int], TokenName]
"""A token's id -> the token by itself."""

FINISH_REASONS = {
    FinishReason.LENGTH: "length",
    FinishReason.EOS_TOKEN: "stop",
    FinishReason.STOP_SEQUENCE: "stop",
}
TGI_FINISH_REASONS = FINISH_REASONS | {FinishReason.STOP_SEQUENCE: "stop_sequence"}
"""The reasons of --strict-tgi (`docs/compatibility.md`, row 6)."""
FINISH_REASONS_TGI_STREAM = {reason: reason.value for reason in FinishReason}
"""The reasons of --strict-tgi in streams of /v1/completions (`docs/compatibility.md`, row 7)."""

MAX_MODEL_CHARS = 256
"""Length of a model's name in a request; a longer text is no name."""


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    token: str
    logprob: JsonF32
    bytes: list[int] | None | UnsetType = UNSET
    """TGI has no such key."""


class TokenLogprob(TopLogprob, frozen=True, kw_only=True):
    top_logprobs: list[TopLogprob]


class Logprobs(msgspec.Struct, frozen=True):
    content: list[TokenLogprob]


class PromptLogprob(msgspec.Struct, frozen=True):
    logprob: JsonF32
    rank: int | None
    """Place among all tokens, from 1 for the likeliest; of those that tie, one of their places."""
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of a prompt a map from ids to the token itself and the likeliest ones; null for the first (vLLM)."""


class TgiStreamError(msgspec.Struct, frozen=True):
    message: str
    http_status_code: int = 422
    """The same whatever went wrong (`docs/compatibility.md`, row 10)."""


class TgiStreamErrorBody(msgspec.Struct, frozen=True):
    error: TgiStreamError


def model_name(name: str | None, config: ServerConfig) -> str:
    """The model that an answer names: the request's own name for it, whatever that is (`docs/wire.md`, 3.5).

    Each chunk of a stream tells it: a name that is no name, but a text of megabytes, is not told.
    """
    if name is None or name == TGI_MODEL_NAME or len(name) > MAX_MODEL_CHARS:
        return config.model_names[0]
    return name


class Envelope:
    """The fields that all parts of one answer have in common: id, time, fingerprint, spelling of reasons."""

    def __init__(self, config: ServerConfig, prefix: str) -> None:
        """`prefix`: the beginning of OpenAI's ids of this kind."""
        self._is_strict = config.is_strict_tgi
        self.id = "" if self._is_strict else f"{prefix}-{uuid.uuid4().hex}"  # `docs/compatibility.md`, row 22
        self.created = int(time.time())
        self.system_fingerprint = SYSTEM_FINGERPRINT
        self.finish_reasons = TGI_FINISH_REASONS if self._is_strict else FINISH_REASONS

    @property
    def now(self) -> int:
        """The second in which a part is made. TGI's chunks each have their own time, OpenAI's all the same."""
        return int(time.time()) if self._is_strict else self.created


def usage_of(
    config: ServerConfig, prompts: Iterable[Generation], num_generated: int, num_thought: int | None = None
) -> Usage:
    """The usage of so many tokens, `num_thought` of them in thoughts if those count, and of a sequence of each
    prompt."""
    num_prompt_tokens = num_cached = 0
    for generation in prompts:
        num_prompt_tokens += generation.num_prompt_tokens
        num_cached += generation.num_cached_tokens
    details = UNSET if config.is_strict_tgi else PromptTokensDetails(num_cached)
    thoughts = UNSET if num_thought is None else CompletionTokensDetails(num_thought)
    return Usage(num_prompt_tokens, num_generated, num_prompt_tokens + num_generated, details, thoughts)


def num_generated_tokens(streams: Iterable[Stream]) -> int:
    return sum(stream.generation.num_generated_tokens for stream in streams)


def chat_logprobs(tokens: Iterable[GeneratedToken], name: NameOf, max_top: int) -> Logprobs:
    """OpenAI's logprobs; of tokens that tie with the last of `max_top`, only so many are told."""
    return Logprobs(
        [
            TokenLogprob(
                **_named(token, name),
                top_logprobs=[TopLogprob(**_named(top, name)) for top in token.top_tokens[:max_top]],
            )
            for token in tokens
        ]
    )


def _named(token: Scored, name: NameOf) -> dict[str, Any]:
    named = name(token.id)
    return {
        "token": named.text,
        "logprob": f32(token.logprob),
        "bytes": None if named.raw is None else list(named.raw),
    }


def prompt_logprobs(generation: Generation, max_top: int) -> PromptLogprobs:
    """What vLLM answers to `prompt_logprobs`."""
    rows: PromptLogprobs = []
    for token, own_rank, tops in zip(
        generation.prefill, generation.prefill_ranks, generation.prefill_tops, strict=True
    ):
        row = {str(token.id): PromptLogprob(f32(token.logprob), own_rank, token.text)}
        best = enumerate(tops[:max_top], 1)
        row |= {str(top.id): PromptLogprob(f32(top.logprob), rank, top.text) for rank, top in best}
        rows.append(row if rows else None)
    return rows


def tgi_logprobs(tokens: Iterable[GeneratedToken]) -> Logprobs:
    """TGI's: a part of a character is no text."""
    return Logprobs(
        [
            TokenLogprob(
                token=token.text,
                logprob=f32(token.logprob),
                top_logprobs=[TopLogprob(token=top.text, logprob=f32(top.logprob)) for top in token.top_tokens],
            )
            for token in tokens
        ]
    )


async def openai_stream(events: AsyncGenerator[bytes], config: ServerConfig) -> AsyncGenerator[bytes]:
    """`events` and OpenAI's end mark. An error is one more event before the mark."""

    def error_event(error: Exception) -> bytes:
        if config.is_strict_tgi:
            return event(TgiStreamErrorBody(TgiStreamError(error_body(error).error)))
        return event(openai_error_body(error))

    async with contextlib.aclosing(with_error_event(events, error_event)) as items:
        async for item in items:
            yield item
    yield DONE
