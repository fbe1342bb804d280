"""A wire request becomes engine requests, or is refused with TGI's texts in TGI's order (reference 2).

The comments `# n` are the rows of the reference's table; what TGI does not have is checked after what is like it.
"""

from __future__ import annotations

import secrets
import uuid
from dataclasses import dataclass

import msgspec

from engine.link.messages import EngineReady, GenerationRequest, SamplingParams
from server.config import ServerConfig
from server.errors import ValidationError
from server.requests.grammar import compile_grammar, compile_tool_grammar
from server.requests.native import GenerateParameters
from server.text.tokenizer import TextTokenizer

MAX_CHECKED_NEW_TOKENS = 1024
"""TGI's length check counts no more new tokens than this; generation then stops at the window (quirk 15)."""
MAX_CHOICES = 128
"""OpenAI's limit of `n`."""
MAX_BIAS = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationInput:
    """What a route asks for, whatever the route: a prompt and native parameters."""

    inputs: str
    parameters: GenerateParameters
    is_stream: bool
    token_ids: list[int] | None = None
    """The prompt as the client tokenised it; `inputs` is its text then."""
    add_special_tokens: bool = True
    num_choices: int = 1
    """Answers to this prompt, each drawn by itself; 1 on the native routes, which have best_of."""
    is_openai: bool = False
    """Parameters mean what they mean to OpenAI: `frequency_penalty` counts, `stop` is not part of the answer."""
    tool_grammar: str | None = None
    """What llguidance reads, where the model has to call a function; `parameters` have no grammar then."""

    @property
    def num_sequences(self) -> int:
        return self.num_choices * max(1, self.parameters.best_of or 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidatedRequest:
    """Ready for the engine; `stop` stays on this side, where the text is."""

    generation: GenerationRequest
    stop: list[str]
    is_stop_hidden: bool


def refuse_if(condition: bool, text: str) -> None:
    if condition:
        raise ValidationError(text)


class Validator:
    """Checks requests against the limits of this server."""

    def __init__(self, config: ServerConfig, tokenizer: TextTokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer

    def check_before_admission(self, wanted: GenerationInput) -> None:
        """What TGI refuses before it asks for a permit (reference 2.1)."""
        parameters, num_choices = wanted.parameters, wanted.num_choices
        refuse_if(not 0 < num_choices <= MAX_CHOICES, f"`n` must be > 0 and <= {MAX_CHOICES}. Given: {num_choices}")
        best_of, max_best_of = parameters.best_of, self._config.max_best_of
        if wanted.is_stream:
            refuse_if(best_of not in (None, 1), "`best_of` != 1 is not supported when streaming tokens")  # 3
            refuse_if(
                parameters.decoder_input_details,
                "`decoder_input_details` == true is not supported when streaming tokens",
            )  # 4
        elif best_of is not None and best_of > 1:
            refuse_if(max_best_of == 1, "`best_of` != 1 is not allowed for this endpoint")  # 1
            refuse_if(best_of > max_best_of, f"`best_of` must be > 0 and <= {max_best_of}. Given: {best_of}")  # 2

    async def validate(self, wanted: GenerationInput, limits: EngineReady) -> list[ValidatedRequest]:
        """A request for each sequence. Raises ValidationError."""
        parameters = wanted.parameters
        _check_sampling(wanted)
        self._check_counts(wanted)
        self._check_text(wanted, limits.max_input_tokens)
        token_ids = await self._tokenize(wanted)
        _check_vocabulary(token_ids, parameters, limits.vocab_size)
        max_new_tokens = _check_lengths(len(token_ids), parameters.max_new_tokens, limits)
        grammar = await self._grammar(wanted)
        request = GenerationRequest(
            request_id="",
            prompt_token_ids=token_ids,
            max_new_tokens=max_new_tokens,
            sampling=self._sampling(wanted),
            is_ignoring_eos=parameters.ignore_eos,
            has_prompt_logprobs=parameters.decoder_input_details and self._has_prompt_logprobs,
            grammar=grammar,
        )
        stop, is_stop_hidden = parameters.stop, wanted.is_openai
        return [
            ValidatedRequest(generation=_numbered(request, index), stop=stop, is_stop_hidden=is_stop_hidden)
            for index in range(wanted.num_sequences)
        ]

    async def _grammar(self, wanted: GenerationInput) -> str | None:
        own, tool_grammar = wanted.parameters.grammar, wanted.tool_grammar
        if own is None and tool_grammar is None:
            return None
        refuse_if(self._config.is_grammar_disabled, "grammar is not supported")  # 21
        if tool_grammar is not None:
            return await compile_tool_grammar(tool_grammar)
        assert own is not None
        return await compile_grammar(own, is_strict=self._config.is_strict_tgi)  # 21 to 24

    @property
    def _has_prompt_logprobs(self) -> bool:
        return self._config.has_prompt_logprobs or not self._config.is_strict_tgi  # quirk 33

    def _sampling(self, wanted: GenerationInput) -> SamplingParams:
        """Greedy unless something asks for chance (reference 2.4); a seed is reported only if it had an effect."""
        p = wanted.parameters
        frequency = p.frequency_penalty or 0.0
        sampling = SamplingParams(
            is_watermarked=p.watermark,
            repetition_penalty=1.0 if p.repetition_penalty is None else p.repetition_penalty,
            relative_frequency_penalty=0.0 if wanted.is_openai else frequency,
            frequency_penalty=frequency if wanted.is_openai else 0.0,
            presence_penalty=p.presence_penalty or 0.0,
            logit_bias=p.logit_bias or {},
            num_top_tokens=p.top_n_tokens or 0,
            is_logprob_filtered=self._config.is_strict_tgi,
        )
        filters = (p.top_k, p.top_p, p.typical_p, p.min_p)
        if not p.do_sample and p.temperature in (None, 1) and all(value is None for value in filters):
            return sampling
        return msgspec.structs.replace(
            sampling,
            seed=secrets.randbits(64) if p.seed is None else p.seed,
            temperature=1.0 if p.temperature is None else p.temperature,
            top_k=p.top_k or 0,
            top_p=1.0 if p.top_p is None else p.top_p,
            min_p=p.min_p or 0.0,
            typical_p=1.0 if p.typical_p is None else p.typical_p,
        )

    def _check_counts(self, wanted: GenerationInput) -> None:
        parameters = wanted.parameters
        max_stop, num_stop = self._config.max_stop_sequences, len(parameters.stop)
        refuse_if(parameters.max_new_tokens == 0, "`max_new_tokens` must be strictly positive")  # 12
        refuse_if(num_stop > max_stop, f"`stop` supports up to {max_stop} stop sequences. Given: {num_stop}")  # 13
        has_best_of = (parameters.best_of or 1) > 1
        refuse_if(parameters.seed is not None and has_best_of, "`seed` must not be set when `best_of` > 1")  # 14
        max_top, num_top = self._config.max_top_n_tokens, parameters.top_n_tokens or 0
        refuse_if(num_top > max_top, f"`top_n_tokens` must be >= 0 and <= {max_top}. Given: {num_top}")  # 15

    def _check_text(self, wanted: GenerationInput, max_input: int) -> None:
        truncate = wanted.parameters.truncate
        refuse_if(not (wanted.token_ids or wanted.inputs), "`inputs` cannot be empty")  # 16
        refuse_if(
            truncate is not None and not 0 < truncate <= max_input,
            f"`truncate` must be strictly positive and less than {max_input}. Given: {truncate}",
        )  # 17

    async def _tokenize(self, wanted: GenerationInput) -> list[int]:
        if wanted.token_ids is not None:
            return wanted.token_ids
        try:
            token_ids = await self._tokenizer.encode(wanted.inputs, add_special_tokens=wanted.add_special_tokens)
        except Exception as error:  # the library raises plain Exception
            raise ValidationError(f"tokenizer error {error}") from None  # 18
        truncate = wanted.parameters.truncate
        return token_ids if truncate is None else token_ids[-truncate:]


def _check_sampling(wanted: GenerationInput) -> None:
    p = wanted.parameters
    choices = (p.temperature, p.top_k, p.top_p, p.typical_p)
    may_sample = p.do_sample or any(choice is not None for choice in choices)
    refuse_if((p.best_of or 1) > 1 and not may_sample, "you must use sampling when `best_of` is > 1")  # 5
    refuse_if(p.temperature is not None and p.temperature <= 0, "`temperature` must be strictly positive")  # 6
    _check_penalties(wanted)
    refuse_if(p.top_p is not None and not 0 < p.top_p < 1, "`top_p` must be > 0.0 and < 1.0")  # 9
    refuse_if(p.typical_p is not None and not 0 < p.typical_p < 1, "`typical_p` must be > 0.0 and < 1.0")  # 10
    refuse_if(p.min_p is not None and not 0 <= p.min_p <= 1, "`min_p` must be >= 0.0 and <= 1.0")
    refuse_if(p.top_k is not None and p.top_k <= 0, "`top_k` must be strictly positive")  # 11


def _check_penalties(wanted: GenerationInput) -> None:
    p = wanted.parameters
    repetition, frequency, presence = p.repetition_penalty, p.frequency_penalty, p.presence_penalty
    refuse_if(repetition is not None and repetition <= 0, "`repetition_penalty` must be strictly positive")  # 7
    refuse_if(frequency is not None and not -2 <= frequency <= 2, "`frequency_penalty` must be >= -2.0 and <= 2.0")  # 8
    refuse_if(presence is not None and not -2 <= presence <= 2, "`presence_penalty` must be >= -2.0 and <= 2.0")
    biases = (p.logit_bias or {}).values()
    refuse_if(not all(abs(bias) <= MAX_BIAS for bias in biases), "`logit_bias` must be >= -100.0 and <= 100.0")


def _check_vocabulary(token_ids: list[int], parameters: GenerateParameters, vocab_size: int) -> None:
    """A tokenizer may have been given tokens that the model was not."""
    unknown = max(token_ids, default=0)
    refuse_if(unknown >= vocab_size, f"tokenizer error token {unknown} is not in the model's vocabulary")
    unknown = max(parameters.logit_bias or {}, default=0)
    refuse_if(unknown >= vocab_size, f"`logit_bias` token {unknown} is not in the model's vocabulary")


def _check_lengths(num_input: int, max_new_tokens: int | None, limits: EngineReady) -> int:
    """The number of new tokens there is room for and that was asked for (reference 2.3)."""
    max_input, max_total = limits.max_input_tokens, limits.max_total_tokens
    room = max(0, max_total - num_input)
    counted = room if max_new_tokens is None else min(max_new_tokens, MAX_CHECKED_NEW_TOKENS)
    refuse_if(
        num_input + counted > max_total,
        f"`inputs` tokens + `max_new_tokens` must be <= {max_total}. "
        f"Given: {num_input} `inputs` tokens and {counted} `max_new_tokens`",
    )  # 19
    refuse_if(num_input > max_input, f"`inputs` must have less than {max_input} tokens. Given: {num_input}")  # 20
    return room if max_new_tokens is None else min(max_new_tokens, room)


def _numbered(request: GenerationRequest, index: int) -> GenerationRequest:
    """With an id of its own, and from the second on other random numbers."""
    seed = request.sampling.seed
    if index and seed is not None:
        request = msgspec.structs.replace(
            request, sampling=msgspec.structs.replace(request.sampling, seed=(seed + index) % 2**64)
        )
    return msgspec.structs.replace(request, request_id=uuid.uuid4().hex)
