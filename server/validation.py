"""A wire request becomes an engine request, or is refused with TGI's texts in TGI's order (reference 2).

The comments `# n` are the rows of the reference's table. What is known but not built yet is refused where it would have
an effect, right after TGI's own check of that parameter.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.types import EngineReady, GenerationRequest, SamplingParams
from server.config import ServerConfig
from server.errors import ToolError, ValidationError
from server.schemas import ChatRequest, GenerateParameters, NamedToolChoice
from server.tokenizer import TextTokenizer

MAX_CHECKED_NEW_TOKENS = 1024
"""TGI's length check counts no more new tokens than this; generation then stops at the window (quirk 15)."""

CHAT_NAMES = {"top_n_tokens": "top_logprobs", "grammar": "response_format"}


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationInput:
    """What a route asks for, whatever the route: a prompt and native parameters."""

    inputs: str
    parameters: GenerateParameters
    is_stream: bool
    add_special_tokens: bool = True
    presence_penalty: float | None = None
    """Only chats have it; None and 0 are off (quirk 5: ours keeps OpenAI's meaning)."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Parameters that the route spells differently."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidatedRequest:
    """Ready for the engine; `stop` stays on this side, where the text is."""

    generation: GenerationRequest
    stop: list[str]


def refuse_if(condition: bool, text: str) -> None:
    if condition:
        raise ValidationError(text)


def chat_input(request: ChatRequest, prompt: str) -> GenerationInput:
    """Native parameters of a chat (reference 3.5): sampling unless the temperature is exactly 0."""
    is_greedy = request.temperature == 0
    parameters = GenerateParameters(
        do_sample=not is_greedy,
        temperature=None if is_greedy else request.temperature,
        top_p=None if request.top_p == 1 else request.top_p,  # quirk 3: here 1 is off
        frequency_penalty=request.frequency_penalty,
        max_new_tokens=request.max_tokens,
        stop=request.stop or [],
        seed=request.seed,
        top_n_tokens=request.top_logprobs,
        grammar=request.response_format,
        details=True,
    )
    return GenerationInput(
        inputs=prompt,
        parameters=parameters,
        is_stream=request.stream,
        add_special_tokens=False,
        presence_penalty=request.presence_penalty,
        names=CHAT_NAMES,
    )


def check_tools(request: ChatRequest) -> None:
    """Refused before the prompt is rendered, and so before a stream begins."""
    if request.tools is not None and request.response_format is not None:
        raise ToolError("Grammar and tools are mutually exclusive")
    if not request.tools or request.tool_choice == "none":
        return
    if isinstance(request.tool_choice, NamedToolChoice):
        _require_tool(request, request.tool_choice.function.name)
    elif request.tool_choice not in (None, "auto", "required"):
        _require_tool(request, request.tool_choice)
    raise ValidationError("`tools` is not supported yet")


def _require_tool(request: ChatRequest, name: str) -> None:
    if all(tool.function.name != name for tool in request.tools or []):
        raise ToolError(f"Tool with name {name} not found")


class Validator:
    """Checks requests against the limits of this server."""

    def __init__(self, config: ServerConfig, tokenizer: TextTokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer

    def check_before_admission(self, wanted: GenerationInput) -> None:
        """What TGI refuses before it asks for a permit (reference 2.1)."""
        parameters = wanted.parameters
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

    async def validate(self, wanted: GenerationInput, limits: EngineReady) -> ValidatedRequest:
        parameters = wanted.parameters
        _check_sampling(wanted)
        self._check_counts(wanted)
        self._check_text(wanted, limits.max_input_tokens)
        token_ids = await self._tokenize(wanted)
        _check_vocabulary(token_ids, limits.vocab_size)
        max_new_tokens = _check_lengths(len(token_ids), parameters.max_new_tokens, limits)
        has_grammar = parameters.grammar is not None
        refuse_if(has_grammar and self._config.is_grammar_disabled, "grammar is not supported")  # 21
        _refuse_unbuilt(wanted, "grammar", has_grammar)
        generation = GenerationRequest(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=token_ids,
            max_new_tokens=max_new_tokens,
            sampling=_sampling(parameters),
        )
        return ValidatedRequest(generation=generation, stop=parameters.stop)

    def _check_counts(self, wanted: GenerationInput) -> None:
        parameters = wanted.parameters
        max_stop, num_stop = self._config.max_stop_sequences, len(parameters.stop)
        refuse_if(parameters.max_new_tokens == 0, "`max_new_tokens` must be strictly positive")  # 12
        refuse_if(num_stop > max_stop, f"`stop` supports up to {max_stop} stop sequences. Given: {num_stop}")  # 13
        has_best_of = (parameters.best_of or 1) > 1
        refuse_if(parameters.seed is not None and has_best_of, "`seed` must not be set when `best_of` > 1")  # 14
        _refuse_unbuilt(wanted, "best_of", has_best_of)
        _refuse_unbuilt(wanted, "watermark", parameters.watermark)
        max_top, num_top = self._config.max_top_n_tokens, parameters.top_n_tokens or 0
        refuse_if(num_top > max_top, f"`top_n_tokens` must be >= 0 and <= {max_top}. Given: {num_top}")  # 15
        _refuse_unbuilt(wanted, "top_n_tokens", num_top > 0)

    def _check_text(self, wanted: GenerationInput, max_input: int) -> None:
        truncate = wanted.parameters.truncate
        refuse_if(wanted.inputs == "", "`inputs` cannot be empty")  # 16
        refuse_if(
            truncate is not None and not 0 < truncate <= max_input,
            f"`truncate` must be strictly positive and less than {max_input}. Given: {truncate}",
        )  # 17

    async def _tokenize(self, wanted: GenerationInput) -> list[int]:
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
    _refuse_unbuilt(wanted, "typical_p", p.typical_p is not None)
    refuse_if(p.top_k is not None and p.top_k <= 0, "`top_k` must be strictly positive")  # 11


def _check_penalties(wanted: GenerationInput) -> None:
    repetition, frequency = wanted.parameters.repetition_penalty, wanted.parameters.frequency_penalty
    refuse_if(repetition is not None and repetition <= 0, "`repetition_penalty` must be strictly positive")  # 7
    _refuse_unbuilt(wanted, "repetition_penalty", repetition not in (None, 1))
    refuse_if(frequency is not None and not -2 <= frequency <= 2, "`frequency_penalty` must be >= -2.0 and <= 2.0")  # 8
    _refuse_unbuilt(wanted, "frequency_penalty", frequency not in (None, 0))
    _refuse_unbuilt(wanted, "presence_penalty", wanted.presence_penalty not in (None, 0))


def _refuse_unbuilt(wanted: GenerationInput, name: str, is_used: bool) -> None:
    refuse_if(is_used, f"`{wanted.names.get(name, name)}` is not supported yet")


def _check_vocabulary(token_ids: list[int], vocab_size: int) -> None:
    """A tokenizer may have been given tokens that the model was not."""
    unknown = max(token_ids, default=0)
    refuse_if(unknown >= vocab_size, f"tokenizer error token {unknown} is not in the model's vocabulary")


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


def _sampling(p: GenerateParameters) -> SamplingParams:
    """Greedy unless something asks for chance (reference 2.4); a seed is reported only if it had an effect."""
    is_sampling = p.do_sample or p.temperature not in (None, 1) or p.top_k is not None or p.top_p is not None
    if not is_sampling:
        return SamplingParams()
    return SamplingParams(
        seed=secrets.randbits(64) if p.seed is None else p.seed,
        temperature=1.0 if p.temperature is None else p.temperature,
        top_k=p.top_k or 0,
        top_p=1.0 if p.top_p is None else p.top_p,
    )
