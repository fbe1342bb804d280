"""The parameters of a generation, a row for each.

Whatever a body is shaped like, it becomes `Parameters`. The wire models (`server.requests.dialects`), the checks, the
sampler's parameters (`server.requests.validation`) and the description of the API are made of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.requests.rows import (
    IN_ALL_OF_OURS,
    IN_ALL_OF_TGI,
    IN_OPENAI,
    NATIVE_ONLY,
    OURS,
    TGI,
    Bounds,
    Dialect,
    Refusal,
    Row,
    parameter,
    rows_of,
)
from server.requests.serde import F32, I32, I64, U32, U64, ListOf, Usize
from server.requests.values import Grammar, GrammarSpec, LogitBias

_FRACTION = Bounds(above=0, below=1)
_ADDED = Bounds(min=-2, max=2)
MAX_TOP_TOKENS = 20
"""Likeliest tokens that OpenAI's dialects allow for a place."""
WHOLE_WINDOW = -1
"""A truncation to as many tokens as the window has room for, beside the new ones."""
MAX_WORDS = 256
"""Tokens that stop an answer, and words that it may not have."""
MAX_ALLOWED = 16_384
"""Tokens of a list of those that alone may come."""
TEXTS_OF_CLIENTS = ("stop", "grammar", "adapter_id", "bad_words")
"""Parameters that no log line shows."""
MAX_LOGGED_ENTRIES = 8
"""Entries of a map that a log line shows; of a longer one it has the number."""


def _is_best_of_greedy(parameters: Parameters) -> bool:
    return parameters.has_best_of and not parameters.may_draw


def _is_best_of_seeded(parameters: Parameters) -> bool:
    return parameters.has_best_of and parameters.seed is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """What a request asks of its generation; None where it says nothing.

    Every field is the row of its parameter. The order is that of TGI's native body and of its log lines.
    """

    best_of: int | None = parameter(
        Row(
            Usize,
            NATIVE_ONLY,
            bounds=Bounds(max_setting="max_best_of"),
            refusal=Refusal(5, "you must use sampling when `best_of` is > 1", _is_best_of_greedy),
        )
    )
    temperature: float | None = parameter(
        Row(
            F32,
            IN_ALL_OF_TGI,
            bounds=Bounds(above=0),
            openai_bounds=Bounds(min=0),
            refusal=Refusal(6, "`temperature` must be strictly positive", openai_text="`temperature` must be >= 0.0"),
            engine_field="temperature",
            is_for_drawing=True,
        )
    )
    repetition_penalty: float | None = parameter(
        Row(
            F32,
            {Dialect.NATIVE: TGI, Dialect.CHAT: OURS, Dialect.COMPLETIONS: TGI},
            bounds=Bounds(above=0),
            refusal=Refusal(7, "`repetition_penalty` must be strictly positive"),
            engine_field="repetition_penalty",
        )
    )
    frequency_penalty: float | None = parameter(
        Row(
            F32,
            IN_ALL_OF_TGI,
            bounds=_ADDED,
            refusal=Refusal(8, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
            engine_field="relative_frequency_penalty",
            openai_engine_field="frequency_penalty",
        )
    )
    top_k: int | None = parameter(
        Row(
            I32,
            {Dialect.NATIVE: TGI, Dialect.CHAT: OURS, Dialect.COMPLETIONS: OURS},
            bounds=Bounds(min=1),
            openai_bounds=Bounds(min=-1),
            refusal=Refusal(11, "`top_k` must be strictly positive", openai_text="`top_k` must be >= -1"),
            engine_field="top_k",
            is_for_drawing=True,
            is_filter=True,
        )
    )
    top_p: float | None = parameter(
        Row(
            F32,
            IN_ALL_OF_TGI,
            bounds=_FRACTION,
            openai_bounds=Bounds(min=0, max=1),
            refusal=Refusal(9, "`top_p` must be > 0.0 and < 1.0", openai_text="`top_p` must be >= 0.0 and <= 1.0"),
            engine_field="top_p",
            is_for_drawing=True,
            is_filter=True,
        )
    )
    typical_p: float | None = parameter(
        Row(
            F32,
            {Dialect.NATIVE: TGI, Dialect.CHAT: OURS, Dialect.COMPLETIONS: OURS},
            bounds=_FRACTION,
            openai_bounds=Bounds(above=0, max=1),
            refusal=Refusal(
                10, "`typical_p` must be > 0.0 and < 1.0", openai_text="`typical_p` must be > 0.0 and <= 1.0"
            ),
            engine_field="typical_p",
            is_for_drawing=True,
            is_filter=True,
        )
    )
    do_sample: bool = parameter(Row(bool, NATIVE_ONLY, default=False))
    max_new_tokens: int | None = parameter(
        Row(
            U32,
            {
                Dialect.NATIVE: TGI,
                Dialect.CHAT: TGI.named("max_tokens", "max_completion_tokens"),
                Dialect.COMPLETIONS: TGI.named("max_tokens"),
            },
            bounds=Bounds(min=1),
            refusal=Refusal(12, "`max_new_tokens` must be strictly positive"),
        )
    )
    return_full_text: bool | None = parameter(Row(bool, NATIVE_ONLY))
    stop: Sequence[str] = parameter(
        Row(
            ListOf[str],
            IN_ALL_OF_TGI,
            default=(),
            bounds=Bounds(max_setting="max_stop_sequences", measured="length"),
            openai_bounds=Bounds(),  # OpenAI's may be one string, which has no items
            refusal=Refusal(13, "`stop` supports up to {limit} stop sequences. Given: {given}"),
        )
    )
    truncate: int | None = parameter(
        Row(
            Usize,
            {
                Dialect.NATIVE: TGI,
                Dialect.CHAT: OURS.named("truncate_prompt_tokens"),
                Dialect.COMPLETIONS: OURS.named("truncate_prompt_tokens"),
            },
            openai_type=I64,
            bounds=Bounds(min=1),
            openai_bounds=Bounds(min=WHOLE_WINDOW),
        )
    )
    watermark: bool = parameter(Row(bool, NATIVE_ONLY, default=False, engine_field="is_watermarked"))
    details: bool = parameter(Row(bool, NATIVE_ONLY, default=False))
    decoder_input_details: bool = parameter(Row(bool, NATIVE_ONLY, default=False))
    seed: int | None = parameter(
        Row(
            U64,
            IN_ALL_OF_TGI,
            refusal=Refusal(14, "`seed` must not be set when `best_of` > 1", _is_best_of_seeded),
            engine_field="seed",
            is_for_drawing=True,
        )
    )
    top_n_tokens: int | None = parameter(
        Row(
            U32,
            {
                Dialect.NATIVE: TGI,
                Dialect.CHAT: TGI.named("top_logprobs"),
                Dialect.COMPLETIONS: OURS.named("logprobs"),
            },
            bounds=Bounds(max_setting="max_top_n_tokens", openai_max=MAX_TOP_TOKENS),
            refusal=Refusal(15, "`top_n_tokens` must be >= 0 and <= {limit}. Given: {given}"),
            engine_field="num_top_tokens",
        )
    )
    grammar: GrammarSpec | None = parameter(
        Row(
            Grammar,
            {
                Dialect.NATIVE: TGI,
                Dialect.CHAT: TGI.named("response_format"),
                Dialect.COMPLETIONS: OURS.named("response_format"),
            },
        )
    )
    adapter_id: str | None = parameter(Row(str, NATIVE_ONLY))
    presence_penalty: float | None = parameter(
        Row(
            F32,
            {Dialect.NATIVE: OURS, Dialect.CHAT: TGI, Dialect.COMPLETIONS: OURS},
            bounds=_ADDED,
            refusal=Refusal(8, "`presence_penalty` must be >= -2.0 and <= 2.0"),
            engine_field="presence_penalty",
        )
    )
    min_p: float | None = parameter(
        Row(
            F32,
            IN_ALL_OF_OURS,
            bounds=Bounds(min=0, max=1),
            refusal=Refusal(10, "`min_p` must be >= 0.0 and <= 1.0"),
            engine_field="min_p",
            is_for_drawing=True,
            is_filter=True,
        )
    )
    logit_bias: Mapping[int, float] | None = parameter(
        Row(
            LogitBias,
            {Dialect.NATIVE: OURS, Dialect.CHAT: TGI, Dialect.COMPLETIONS: OURS},
            bounds=Bounds(min=-100, max=100, measured="members"),
            refusal=Refusal(8, "`logit_bias` must be >= -100.0 and <= 100.0"),
            engine_field="logit_bias",
        )
    )
    ignore_eos: bool = parameter(Row(bool, IN_ALL_OF_OURS, default=False))
    prompt_logprobs: int | None = parameter(
        Row(
            I64,
            IN_OPENAI,
            bounds=Bounds(min=0, max=MAX_TOP_TOKENS),
            refusal=Refusal(
                15, "`prompt_logprobs` must be >= 0 and <= {limit}, not all tokens of the model (-1). Given: {given}"
            ),
        )
    )
    min_tokens: int | None = parameter(Row(U32, IN_OPENAI, engine_field="min_tokens"))
    stop_token_ids: Sequence[int] = parameter(
        Row(
            ListOf[U32],
            IN_OPENAI,
            default=(),
            bounds=Bounds(max=MAX_WORDS, measured="length"),
            refusal=Refusal(13, "`stop_token_ids` supports up to {limit} tokens. Given: {given}"),
        )
    )
    bad_words: Sequence[str] = parameter(
        Row(
            ListOf[str],
            IN_OPENAI,
            default=(),
            bounds=Bounds(max=MAX_WORDS, measured="length"),
            refusal=Refusal(13, "`bad_words` supports up to {limit} words. Given: {given}"),
        )
    )
    allowed_token_ids: list[int] | None = parameter(
        Row(
            ListOf[U32],
            IN_OPENAI,
            bounds=Bounds(max=MAX_ALLOWED, measured="length"),
            refusal=Refusal(13, "`allowed_token_ids` supports up to {limit} tokens. Given: {given}"),
            engine_field="allowed_token_ids",
        )
    )
    skip_special_tokens: bool = parameter(Row(bool, IN_OPENAI, default=True))
    include_stop_str_in_output: bool = parameter(Row(bool, IN_OPENAI, default=False))

    @property
    def has_best_of(self) -> bool:
        return (self.best_of or 1) > 1

    @property
    def may_draw(self) -> bool:
        """What TGI looks at to allow `best_of`."""
        choices = (self.temperature, self.top_k, self.top_p, self.typical_p)
        return self.do_sample or any(choice is not None for choice in choices)

    @property
    def is_drawn(self) -> bool:
        """Tokens are drawn, since something asks for chance; otherwise the likeliest one is taken.

        In OpenAI's dialects `do_sample` alone decides that.
        """
        has_filter = any(row.is_filter and getattr(self, name) is not None for name, row in ROWS.items())
        return self.do_sample or has_filter or self.temperature not in (None, 1)

    def logged(self) -> str:
        """The parameters that are not the default, as a log line shows them; no text of the client's is among them."""
        values = {name: getattr(self, name) for name in ROWS if name not in TEXTS_OF_CLIENTS}
        shown = [f"{name!r}: {_shown(value)}" for name, value in values.items() if value != ROWS[name].default]
        return "{" + ", ".join(shown) + "}"


def _shown(value: object) -> str:
    """A value as a log line shows it; of a long map or list only the number of its entries."""
    if isinstance(value, Mapping | list) and len(value) > MAX_LOGGED_ENTRIES:
        return f"<{len(value)} entries>"
    return repr(value)


ROWS = rows_of(Parameters)
"""Name -> row."""
