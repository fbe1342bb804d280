"""The messages between the HTTP process and the engine. No torch, no text: token ids only.

Every message is a `msgspec` struct, encoded as MessagePack by `engine.link.ipc`. Messages of `Down` go to the engine,
those of `Up` come back.
"""

from __future__ import annotations

import enum

import msgspec

from engine.link.progress import Stage


class FinishReason(enum.StrEnum):
    """Why a sequence ended, in the spelling of TGI's wire."""

    LENGTH = "length"
    EOS_TOKEN = "eos_token"
    STOP_SEQUENCE = "stop_sequence"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """The choice of the next token; every value is validated before it gets here.

    `seed` is None exactly when decoding is greedy: then nothing is drawn, and temperature and the filters (top-k,
    top-p, min-p, typical-p) have no effect. Penalties and biases come first, then the temperature, then the filters.
    """

    seed: int | None = None
    """Unsigned 64-bit; the same seed gives the same tokens whatever else is in the batch."""
    is_watermarked: bool = False
    """Whether the logits of the watermark's green list are raised."""
    repetition_penalty: float = 1.0
    """Divides or multiplies the logits of tokens in prompt and output; 1.0 is off."""
    relative_frequency_penalty: float = 0.0
    """TGI's penalty: it is taken off times the token's part of prompt and output."""
    frequency_penalty: float = 0.0
    """OpenAI's penalty: it is taken off times the number of the token's places in the output."""
    presence_penalty: float = 0.0
    """OpenAI's penalty: it is taken off once for each token that is in the output."""
    logit_bias: dict[int, float] = {}
    """Token id -> number that is added to its logit."""
    min_tokens: int = 0
    """Before so many tokens of output no end token and none of `stop_token_ids` may come, unless a grammar says so."""
    allowed_token_ids: list[int] = []
    """The only tokens that may come; empty is off."""
    temperature: float = 1.0
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    """1.0 is off."""
    min_p: float = 0.0
    """Tokens less likely than this part of the likeliest one are dropped; 0.0 is off."""
    typical_p: float = 1.0
    """1.0 is off."""
    num_top_tokens: int = 0
    """Number of the likeliest tokens to report beside the chosen one; ties with the last are reported, too."""
    is_logprob_filtered: bool = False
    """Whether logprobs are of the distribution after all of the above, as in TGI, or of the model's own."""


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """One validated request: the prompt fits the window and `max_new_tokens` is within it."""

    request_id: str
    prompt_token_ids: list[int]
    max_new_tokens: int
    sampling: SamplingParams = SamplingParams()
    is_ignoring_eos: bool = False
    """Whether only the length or an abort ends it."""
    stop_token_ids: list[int] = []
    """Tokens that end it beside the model's own end tokens, also where those are ignored."""
    banned_sequences: list[list[int]] = []
    """Tokens, one at least, that may not come one after the other in the output."""
    has_prompt_logprobs: bool = False
    """Whether the first event has the prompt's logprobs; the prefix cache is not read then."""
    num_prompt_top_tokens: int = 0
    """Number of the likeliest tokens to report beside each prompt token that has a logprob."""
    has_prompt_ranks: bool = False
    """Whether the first event has the ranks of the tokens whose logprobs it has."""
    grammar: str | None = None
    """The grammar that the output is held to, in llguidance's text; None: any output."""
    adapter_id: str | None = None
    """The name of an adapter that the engine has; None: the model as it is."""


class AbortRequest(msgspec.Struct, frozen=True, tag="abort"):
    """The caller no longer wants `request_id`: free its memory. Unknown ids are ignored (it may just have ended)."""

    request_id: str


class LoadAdapter(msgspec.Struct, frozen=True, tag="load"):
    """Let requests name the adapter in a folder; one of that name is replaced. An `AdapterReply` follows."""

    name: str
    path: str


class UnloadAdapter(msgspec.Struct, frozen=True, tag="unload"):
    """No request will name the adapter any more; those that have it go on. An `AdapterReply` follows."""

    name: str


class AdapterReply(msgspec.Struct, frozen=True):
    """An adapter was loaded or unloaded, or could not be. Replies come in the order of what they answer."""

    error: str | None = None
    """The reason, in words for the user."""


class Goodbye(msgspec.Struct, frozen=True, tag="goodbye"):
    """The last message: the HTTP process ends in good order, so the ranks of other hosts may, too."""


class TokenEvent(msgspec.Struct, kw_only=True, omit_defaults=True):
    """New tokens of one request. The last event of a request, and only that one, has `finish_reason` or `error` set."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[float] = []
    """One per token, as `SamplingParams.is_logprob_filtered` says."""
    top_token_ids: list[list[int]] = []
    """For each token the likeliest ones at its place, the likeliest first; empty unless the request wants them."""
    top_logprobs: list[list[float]] = []
    prompt_logprobs: list[float] = []
    """Logprob of each prompt token but the first, by the model's own distribution; only on the first event."""
    prompt_ranks: list[int] = []
    """For each of `prompt_logprobs` the number of tokens that are at least as likely, the token itself among them."""
    prompt_top_token_ids: list[list[int]] = []
    """For each of `prompt_logprobs` the likeliest tokens at its place, the likeliest first."""
    prompt_top_logprobs: list[list[float]] = []
    num_cached_tokens: int = 0
    """Prompt tokens that were in the prefix cache when the request first joined a batch; only on the first event."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    """Set when the engine could not go on with this request; the text is fit for the user."""
    queue_time_s: float | None = None
    """Seconds between arrival and joining a batch; only on the first event."""

    @property
    def is_terminal(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def extend(self, later: TokenEvent) -> None:
        """Take in a later event of the same request, while the reader lags."""
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.top_token_ids += later.top_token_ids
        self.top_logprobs += later.top_logprobs
        self.finish_reason = later.finish_reason
        self.error = later.error


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot after a step. Counts of tokens, preemptions and drafts are since the start."""

    num_running: int = 0
    num_waiting: int = 0
    num_used_blocks: int = 0
    """KV blocks that some sequence holds; blocks kept only for prefix reuse do not count."""
    num_cached_blocks: int = 0
    """KV blocks that no sequence holds and whose content can still be reused."""
    num_blocks: int = 0
    block_size: int = 0
    num_prefix_hit_tokens: int = 0
    """Prompt tokens that were in the prefix cache when their sequence first joined a batch."""
    num_preemptions: int = 0
    """Times that a sequence had to give its blocks back and wait again."""
    num_draft_steps: int = 0
    """Times that a sequence had a draft in a step."""
    num_drafted_tokens: int = 0
    """Tokens that speculation guessed and steps checked."""
    num_accepted_tokens: int = 0
    """Drafted tokens that were right."""
    num_adapter_loads: int = 0
    """Times that an adapter got a place in memory, those of the start included."""


class EngineStarting(msgspec.Struct, frozen=True, kw_only=True, tag="starting"):
    """How far the start has come, before the engine is ready."""

    stage: Stage
    done: float | None = None
    """The part of the stage that is done, 0 to 1; None: nobody knows."""
    text: str = ""
    """The same in words."""


class EngineReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The engine can serve, within the limits that it resolved from the model, the flags and the memory."""

    max_input_tokens: int
    max_total_tokens: int
    max_batch_prefill_tokens: int
    max_batch_total_tokens: int
    vocab_size: int
    """Token ids are below this; the HTTP process refuses to start with a tokenizer that has more tokens."""
    pid: int | None = None
    """The process of the engine's first rank, whose memory the dashboard shows; None: unknown."""


class StepReport(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The work of one step and the seconds that its parts took, by the engine's clock; filled while the step runs."""

    is_prefill: bool = False
    """Whether a part of some prompt was computed; otherwise every sequence only lacked its newest token."""
    is_failed: bool = False
    """Whether the step raised: its times are not known then."""
    num_sequences: int = 0
    num_admitted: int = 0
    """Sequences that left the queue for this step."""
    num_draft_hits: list[int] = []
    """For each sequence that got tokens the number of them that came from its draft."""
    total_s: float = 0.0
    schedule_s: float = 0.0
    forward_s: float = 0.0
    """Time of the model and the sampling."""
    update_s: float = 0.0
    """Time for taking the tokens in and looking for the ends of sequences."""


class StepOutput(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """The outcome of one step; while idle it is sent without events, as a sign of life."""

    events: list[TokenEvent]
    stats: EngineStats
    reports: list[StepReport] = []
    """The steps since the last frame: one, or none while idle, or several after the reader has lagged."""
    replies: list[AdapterReply] = []


Down = GenerationRequest | AbortRequest | LoadAdapter | UnloadAdapter | Goodbye
Up = EngineStarting | EngineReady | StepOutput
