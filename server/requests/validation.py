"""A request becomes engine requests, or is refused with TGI's texts in TGI's order (`docs/wire.md`, section 2).

Comments `# text n` name texts of the table there, in 2.2; those of single parameters stand in their rows.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.link.messages import EngineReady, GenerationRequest, SamplingParams
from server.config import ServerConfig
from server.errors import INVALID_VALUE, ValidationError
from server.requests.adapters import AdapterNames
from server.requests.dialects import MAX_CHOICES
from server.requests.grammar import GrammarCompiler, after
from server.requests.grammar_check import Check, Checked
from server.requests.rows import Dialect, Refusal, Row
from server.requests.sampling import ROWS, WHOLE_WINDOW, Parameters
from server.requests.values import GrammarSpec
from server.requests.wording import TGI_WORDING, Wording
from server.text.pieces import AnswerReader
from server.text.tokenizer import TextTokenizer

MAX_CHECKED_NEW_TOKENS = 1024
"""TGI's length check counts no more new tokens than this; generation then stops at the window (row 15 of
`docs/compatibility.md`)."""
MAX_STOP_CHARS = 4_096
"""Characters of a stop string. To prepare to look for one takes a millisecond for so many."""
MAX_WORD_CHARS = 128
"""Characters of a word that may not come."""
MAX_PROMPT_TOPS = 131_072
"""Likeliest tokens of a whole prompt: a full window of most models with one each, or 6,553 tokens with 20."""
TOO_LONG = "context_length_exceeded"
"""OpenAI's code of a request that does not fit the window."""

_REFUSALS: list[tuple[str, Row, Refusal]] = sorted(
    ((name, row, row.refusal) for name, row in ROWS.items() if row.refusal is not None), key=lambda item: item[2].number
)
"""Name, row and refusal of each parameter that has one, in the order of the checks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationInput:
    """What a route asks for, whatever the route: a prompt and parameters."""

    inputs: str
    parameters: Parameters
    is_stream: bool
    token_ids: list[int] | None = None
    """The prompt as the client tokenized it; `inputs` is its text then."""
    add_special_tokens: bool = True
    num_choices: int = 1
    """Number of answers to this prompt, each drawn by itself; 1 on the native routes, which have best_of."""
    dialect: Dialect = Dialect.NATIVE
    """Whose words the parameters are in; under --strict-tgi they mean the same in all."""
    wording: Wording = TGI_WORDING
    """The words of refusals."""
    num_prompt_top_tokens: int = 0
    """Number of the likeliest tokens to report for each token of a prompt that has logprobs."""
    tool_grammar: Check | None = None
    """What the model is held to if it has to call a function; the grammar of `parameters` has no effect then."""
    grammar_preface: str = ""
    """Rules for what the model may write before it is held to a grammar (`server.requests.grammar.after`)."""
    shown_ids: frozenset[int] = frozenset()
    """Special tokens whose text the reader needs."""
    reader: Callable[[], AnswerReader] = AnswerReader
    """Makes the reader of one answer."""

    @property
    def has_prompt_logprobs(self) -> bool:
        return self.parameters.decoder_input_details or self.parameters.prompt_logprobs is not None

    @property
    def max_prompt_top_tokens(self) -> int:
        """The same number, with what vLLM's parameter asks for."""
        return max(self.num_prompt_top_tokens, self.parameters.prompt_logprobs or 0)

    @property
    def is_openai(self) -> bool:
        """Parameters mean what they mean to OpenAI: `frequency_penalty` counts, `stop` is not part of the answer."""
        return self.dialect is not Dialect.NATIVE

    @property
    def num_sequences(self) -> int:
        return self.num_choices * max(1, self.parameters.best_of or 1)

    @property
    def echo(self) -> str:
        """The text before the generated one in an answer of the native routes: the prompt, or nothing."""
        return self.inputs if self.parameters.return_full_text else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidatedRequest:
    """One sequence, ready for the engine. Stop strings stay on this side, where the text is."""

    generation: GenerationRequest
    parameters: Parameters
    is_stop_hidden: bool
    """The text ends before a stop string, as OpenAI has it."""
    left_open: Sequence[str] = ()
    """Places of its schemas that the model is not held to."""
    shown_ids: frozenset[int] = frozenset()
    """Special tokens whose text is a part of the answer."""
    reader: Callable[[], AnswerReader] = AnswerReader


def _grammar_text(grammar: Checked | None, preface: str) -> str | None:
    if grammar is None:
        return None
    return after(preface, grammar.grammar) if preface else grammar.grammar


def refuse_if(condition: bool, text: str, *, param: str | None = None, code: str = INVALID_VALUE) -> None:
    if condition:
        raise ValidationError(text, param=param, code=code)


class Validator:
    """Checks requests against the limits of this server."""

    def __init__(self, config: ServerConfig, tokenizer: TextTokenizer, grammars: GrammarCompiler) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._grammars = grammars
        self.adapters = AdapterNames(config)

    def check_before_admission(self, request: GenerationInput) -> None:
        """The checks that TGI makes before it asks for a permit, and ours of sizes. Raises ValidationError."""
        with request.wording.speaking():
            self._check_before_admission(request)

    def _check_before_admission(self, request: GenerationInput) -> None:
        parameters, num_choices = request.parameters, request.num_choices
        num_biases, max_biases = len(parameters.logit_bias or {}), self._config.max_logit_bias
        refuse_if(
            num_biases > max_biases,
            f"`logit_bias` supports up to {max_biases} tokens. Given: {num_biases}",
            param="logit_bias",
        )
        refuse_if(
            not 0 < num_choices <= MAX_CHOICES,
            f"`n` must be > 0 and <= {MAX_CHOICES}. Given: {num_choices}",
            param="n",
        )
        refuse_if(
            any(len(text) > MAX_STOP_CHARS for text in parameters.stop),
            f"`stop` supports texts of up to {MAX_STOP_CHARS} characters",
            param="stop",
        )
        best_of, max_best_of = parameters.best_of, self._config.max_best_of
        refuse_if(
            request.is_stream and parameters.prompt_logprobs is not None,
            "`prompt_logprobs` is not supported when streaming tokens",
            param="prompt_logprobs",
        )
        if request.is_stream:
            refuse_if(best_of not in (None, 1), "`best_of` != 1 is not supported when streaming tokens")  # text 3
            refuse_if(
                parameters.decoder_input_details and not request.is_openai,  # whose first chunk has them
                "`decoder_input_details` == true is not supported when streaming tokens",
            )  # text 4
        elif best_of is not None and best_of > 1:
            refuse_if(max_best_of == 1, "`best_of` != 1 is not allowed for this endpoint")  # text 1
            refuse_if(best_of > max_best_of, f"`best_of` must be > 0 and <= {max_best_of}. Given: {best_of}")  # text 2

    def check_number(self, num_sequences: int) -> None:
        """Refuse what would find no permits however often it came back. Raises ValidationError."""
        limit = self._config.max_concurrent_requests
        refuse_if(num_sequences > limit, f"prompts times `n` must be <= {limit}. Given: {num_sequences}", param="n")

    async def validate(self, request: GenerationInput, limits: EngineReady) -> list[ValidatedRequest]:
        """An engine request for each sequence. Raises ValidationError."""
        with request.wording.speaking():
            return await self._validate(request, limits)

    async def _validate(self, request: GenerationInput, limits: EngineReady) -> list[ValidatedRequest]:
        parameters = request.parameters
        adapter = self.adapters.resolve(parameters.adapter_id, is_openai=request.is_openai)
        check_parameters(parameters, self._config, request.dialect)
        _check_bans(parameters)
        _check_text(request, limits.max_input_tokens)
        token_ids = await self._tokenize(request, _truncation(parameters, limits))
        _check_vocabulary(token_ids, request, limits.vocab_size)
        max_new_tokens = _check_lengths(len(token_ids), request, limits)
        _check_prompt_tops(len(token_ids), request)
        grammar = await self._grammar(request)
        is_strict = self._config.is_strict_tgi
        generation = GenerationRequest(
            request_id="",
            prompt_token_ids=token_ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling_params(parameters, is_openai=request.is_openai, is_logprob_filtered=is_strict),
            is_ignoring_eos=parameters.ignore_eos,
            stop_token_ids=[*parameters.stop_token_ids],
            banned_sequences=await self._banned_sequences(parameters.bad_words),
            has_prompt_logprobs=request.has_prompt_logprobs and self._has_prompt_logprobs,
            num_prompt_top_tokens=request.max_prompt_top_tokens,
            has_prompt_ranks=parameters.prompt_logprobs is not None,
            grammar=_grammar_text(grammar, request.grammar_preface),
            adapter_id=adapter,
        )
        return [
            ValidatedRequest(
                generation=_numbered(generation, index),
                parameters=parameters,
                is_stop_hidden=request.is_openai,
                left_open=grammar.left_open if grammar else (),
                shown_ids=request.shown_ids,
                reader=request.reader,
            )
            for index in range(request.num_sequences)
        ]

    async def _grammar(self, request: GenerationInput) -> Checked | None:
        spec, tool_grammar = request.parameters.grammar, request.tool_grammar
        if tool_grammar is None:
            return None if spec is None else await self._format(spec)
        try:
            refuse_if(self._config.is_grammar_disabled, "grammar is not supported")  # text 21
            return await self._grammars.compile_tools(tool_grammar)
        except ValidationError as error:
            if spec is not None and not self._config.is_strict_tgi:  # the answer's format may be what is wrong
                await self._format(spec)
            error.param = "tools"
            raise

    async def _format(self, spec: GrammarSpec) -> Checked:
        try:
            refuse_if(self._config.is_grammar_disabled, "grammar is not supported")
            return await self._grammars.compile(spec, is_strict=self._config.is_strict_tgi)
        except ValidationError as error:
            error.param = "grammar"
            raise

    async def _banned_sequences(self, bad_words: Sequence[str]) -> list[list[int]]:
        """The tokens of each word, at the beginning of a text and after a space."""
        texts = [prefix + word.lstrip() for word in bad_words for prefix in ("", " ")]
        banned = [await self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return [token_ids for token_ids in banned if token_ids]

    @property
    def _has_prompt_logprobs(self) -> bool:
        return self._config.has_prompt_logprobs or not self._config.is_strict_tgi  # `docs/compatibility.md`, row 33

    async def _tokenize(self, request: GenerationInput, truncate: int | None) -> list[int]:
        if request.token_ids is not None:
            return request.token_ids if truncate is None else request.token_ids[-truncate:]
        try:
            token_ids = await self._tokenizer.encode(request.inputs, add_special_tokens=request.add_special_tokens)
        except Exception as error:  # the library raises plain Exception
            raise ValidationError(
                f"tokenizer error {error}", logged="tokenizer error", param="inputs"
            ) from None  # text 18
        return token_ids if truncate is None else token_ids[-truncate:]


def check_parameters(parameters: Parameters, config: ServerConfig, dialect: Dialect) -> None:
    """Texts 5 to 15. Raises ValidationError."""
    for name, row, refusal in _REFUSALS:
        if refusal.applies is not None:
            refuse_if(refusal.applies(parameters), refusal.text, param=name)
            continue
        for number in row.bounds.measure(getattr(parameters, name)):
            if not row.bounds.hold(number, config, dialect):
                words = refusal.text if dialect is Dialect.NATIVE else refusal.openai_text or refusal.text
                text = words.format(limit=row.bounds.max_in(config, dialect), given=number)
                raise ValidationError(text, param=name, code=row.bounds.code(number))


def sampling_params(parameters: Parameters, *, is_openai: bool, is_logprob_filtered: bool) -> SamplingParams:
    """The sampler's parameters. What the client did not say stays off; so does chance, unless something asks for it."""
    is_drawn = parameters.do_sample if is_openai else parameters.is_drawn
    values: dict[str, Any] = {"seed": secrets.randbits(64)} if is_drawn else {}
    for name, row in ROWS.items():
        field, value = row.engine_field_for(is_openai=is_openai), getattr(parameters, name)
        if field is not None and value is not None and (is_drawn or not row.is_for_drawing):
            values[field] = value
    return SamplingParams(is_logprob_filtered=is_logprob_filtered, **values)


def _check_text(request: GenerationInput, max_input_tokens: int) -> None:
    truncate = request.parameters.truncate
    is_empty = not (request.token_ids or request.inputs)
    refuse_if(is_empty, "`inputs` cannot be empty", param="inputs")  # text 16
    refuse_if(
        truncate not in (None, WHOLE_WINDOW) and not 0 < truncate <= max_input_tokens,
        f"`truncate` must be strictly positive and less than {max_input_tokens}. Given: {truncate}",
        param="truncate",
    )  # text 17


def _truncation(parameters: Parameters, limits: EngineReady) -> int | None:
    """The number of the prompt's tokens to keep; None: all of them."""
    if parameters.truncate != WHOLE_WINDOW:
        return parameters.truncate
    num_new = parameters.max_new_tokens or 0
    if num_new >= limits.max_total_tokens:  # generation stops at the window
        num_new = MAX_CHECKED_NEW_TOKENS
    return max(1, min(limits.max_input_tokens, limits.max_total_tokens - num_new))


def _check_vocabulary(token_ids: list[int], request: GenerationInput, vocab_size: int) -> None:
    """A tokenizer may have been given tokens that the model was not."""
    named = {
        "tokenizer error": (token_ids, "inputs"),
        "`logit_bias`": (request.parameters.logit_bias or {}, "logit_bias"),
        "`stop_token_ids`": (request.parameters.stop_token_ids, "stop_token_ids"),
        "`allowed_token_ids`": (request.parameters.allowed_token_ids or [], "allowed_token_ids"),
    }
    for subject, (ids, param) in named.items():
        unknown = max(ids, default=0)
        refuse_if(unknown >= vocab_size, f"{subject} token {unknown} is not in the model's vocabulary", param=param)


def _check_lengths(num_input: int, request: GenerationInput, limits: EngineReady) -> int:
    """The number of new tokens: as many as the request allows and the window has room for."""
    max_input, max_total = limits.max_input_tokens, limits.max_total_tokens
    max_new_tokens = request.parameters.max_new_tokens
    room = max(0, max_total - num_input)
    counted = room if max_new_tokens is None else min(max_new_tokens, MAX_CHECKED_NEW_TOKENS)
    shown = max_new_tokens if request.is_openai and max_new_tokens is not None else counted
    refuse_if(
        num_input + counted > max_total,
        f"`inputs` tokens + `max_new_tokens` must be <= {max_total}. "
        f"Given: {num_input} `inputs` tokens and {shown} `max_new_tokens`",
        param="inputs",
        code=TOO_LONG,
    )  # text 19
    refuse_if(
        num_input > max_input,
        f"`inputs` must have less than {max_input} tokens. Given: {num_input}",
        param="inputs",
        code=TOO_LONG,
    )  # text 20
    return room if max_new_tokens is None else min(max_new_tokens, room)


def _check_bans(parameters: Parameters) -> None:
    min_tokens, max_new_tokens = parameters.min_tokens or 0, parameters.max_new_tokens
    refuse_if(
        max_new_tokens is not None and min_tokens > max_new_tokens,
        f"`min_tokens` must be <= `max_new_tokens`. Given: {min_tokens} and {max_new_tokens}",
        param="min_tokens",
    )
    refuse_if(parameters.allowed_token_ids == [], "`allowed_token_ids` cannot be empty", param="allowed_token_ids")
    refuse_if(not all(map(str.strip, parameters.bad_words)), "`bad_words` cannot be empty", param="bad_words")
    longest = max(map(len, parameters.bad_words), default=0)
    refuse_if(
        longest > MAX_WORD_CHARS,
        f"`bad_words` must have at most {MAX_WORD_CHARS} characters each. Given: {longest}",
        param="bad_words",
    )


def _check_prompt_tops(num_input: int, request: GenerationInput) -> None:
    num_top = request.max_prompt_top_tokens
    refuse_if(
        num_top * num_input > MAX_PROMPT_TOPS,
        f"{num_top} likeliest tokens for each of {num_input} prompt tokens are more than {MAX_PROMPT_TOPS}",
        param="logprobs" if num_top == request.num_prompt_top_tokens else "prompt_logprobs",
    )


def _numbered(request: GenerationRequest, index: int) -> GenerationRequest:
    """The request with an id of its own and, from the second on, other random numbers."""
    seed = request.sampling.seed
    if index and seed is not None:
        request = msgspec.structs.replace(
            request, sampling=msgspec.structs.replace(request.sampling, seed=(seed + index) % 2**64)
        )
    return msgspec.structs.replace(request, request_id=uuid.uuid4().hex)
