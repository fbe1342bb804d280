"""The errors that a request can end in, and the one table from error to status and `error_type`.

Exception
 ├─ BodyError                  the route cannot read the body; plain text, but for OpenAI's routes
 ├─ ValidationError            a parameter or a length is not acceptable
 ├─ TemplateError              the chat template failed
 ├─ ToolError                  tools cannot be used like this
 ├─ SuffixError                /v1/completions: there is a `suffix`
 ├─ BatchSizeError             /v1/completions: there are too many prompts
 ├─ NoInstanceError            /vertex: there is nothing to do
 ├─ ModelNotFoundError         /v1/models/{id}, `model`: the server has another model
 ├─ AdapterNotFoundError       /v1/unload_lora_adapter: there is no such adapter
 ├─ UnauthorizedError          the API key is absent or wrong; only OpenAI's routes say so in a body
 ├─ OverloadedError            no permit is free, or too many grammars wait
 ├─ UnhealthyError             a probe fails
 ├─ StartingError              the model is on its way
 ├─ IncompleteGenerationError  the engine ended without a final token
 ├─ FailedInstanceError        /vertex with --strict-tgi: an instance failed, for whatever reason
 └─ of the engine (`engine.link.errors`)
     ├─ GenerationError        a step failed, or the server is stopping
     ├─ EngineDeadError        the engine is gone
     └─ EngineHungError        the engine hangs

`ERROR_KINDS` has every one but BodyError, which carries its own status. Any other exception is a 500 that keeps its
text to itself.

The client reads an error's whole text. The log has `logged_text`, without words that may be the client's, but for the
names and folders of adapters that are loaded while the server runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from engine.link.errors import EngineDeadError, EngineHungError, GenerationError

INVALID_VALUE = "invalid_value"
"""OpenAI's `code` of a request that cannot be answered for no reason that has a code of its own."""
MAX_SHOWN_NAMES = 5
"""Names that a refusal of an unknown one tells; /v1/models has them all."""


def known_names(names: Iterable[str]) -> str:
    """The end of the refusal of an unknown name: what names there are, or the first of them."""
    names = [*names]
    if not names:
        return "there is none"
    shown = ", ".join(f"`{name}`" for name in names[:MAX_SHOWN_NAMES])
    return f"there is {shown}" + " and more, see /v1/models" * (len(names) > MAX_SHOWN_NAMES)


class ValidationError(Exception):
    """The text is TGI's (`docs/wire.md`, 2.2), or ours for parameters that TGI does not have."""

    def __init__(
        self, text: str, *, logged: str | None = None, param: str | None = None, code: str = INVALID_VALUE
    ) -> None:
        """`logged` is what the log has in place of `text`; None: the text has no words of the client's.

        `param` and `code` are those of OpenAI's error object.
        """
        super().__init__(text)
        self.logged_text = text if logged is None else logged
        self.param = param
        self.code = code


class OverloadedError(Exception):
    def __init__(self, text: str = "Model is overloaded") -> None:
        super().__init__(text)


class TemplateError(Exception):
    """The text is the template engine's, which may quote a message."""

    logged_text = "the chat template refuses the messages"
    param = "messages"


class ToolError(Exception):
    """The text says what cannot be done with the tools, and names them."""

    logged_text = "the tools cannot be used like this"
    param = "tools"


class SuffixError(Exception):
    param = "suffix"
    code = "unsupported_parameter"

    def __init__(self) -> None:
        super().__init__("Suffix is not supported and can be achieved by preprocessing the prompt.")


class BatchSizeError(Exception):
    param = "prompt"
    code = "array_above_max_length"

    def __init__(self, max_prompts: int) -> None:
        super().__init__(f"Number of prompts exceeds the maximum allowed batch size of {max_prompts}")


class ModelNotFoundError(Exception):
    def __init__(self, name: str, served: Iterable[str]) -> None:
        """`served`: the names that there are instead."""
        super().__init__(f"The model `{name}` does not exist: {known_names(served)}")
        self.logged_text = "the model does not exist"


class AdapterNotFoundError(Exception):
    def __init__(self, name: str, served: Iterable[str]) -> None:
        """`served`: the names that adapters have instead."""
        super().__init__(f"The LoRA adapter `{name}` does not exist: {known_names(served)}")
        self.logged_text = "the LoRA adapter does not exist"


class NoInstanceError(Exception):
    def __init__(self) -> None:
        super().__init__("Input validation error")


class FailedInstanceError(Exception):
    def __init__(self) -> None:
        super().__init__("Incomplete generation")


class IncompleteGenerationError(Exception):
    def __init__(self) -> None:
        super().__init__("Incomplete generation")


class UnhealthyError(Exception):
    def __init__(self) -> None:
        super().__init__("unhealthy")


class StartingError(Exception):
    def __init__(self, text: str) -> None:
        """`text`: how far the start is."""
        super().__init__(f"The model is not there yet. {text}")


class UnauthorizedError(Exception):
    """The API key is absent or wrong."""

    code = "invalid_api_key"

    def __init__(self) -> None:
        super().__init__("The API key is missing or wrong: send it as `Authorization: Bearer KEY`")


BODY_FAULTS = {
    400: "the request body is not JSON",
    408: "the request body comes too slowly",
    413: "the request body is too long",
    415: "the request body has a Content-Type or Content-Encoding that is not read",
    422: "the request body has not the fields and types of this route",
}
"""The words of the log about a body that is refused. The client reads what exactly is wrong, which may quote it."""


class BodyError(Exception):
    """A refusal in plain text, in the words of TGI's web framework (`docs/wire.md`, 0.2)."""

    def __init__(
        self, status: int, text: str, *, hint: str = "", param: str | None = None, code: str | None = None
    ) -> None:
        """`param` and `code` are those of OpenAI's error object, which stands for the plain text on OpenAI's routes.

        `hint`: what is added to the text there.
        """
        super().__init__(text)
        self.status = status
        self.hint = hint
        self.logged_text = BODY_FAULTS.get(status, "the request body is refused")
        self.param = param
        self.code = code


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """One row of the table."""

    status: int
    error_type: str
    prefix: str = ""
    """What the client reads before the error's own text."""

    @property
    def is_clients_mistake(self) -> bool:
        """Whether the client can do something about it, and nobody who runs the server has to."""
        return 400 <= self.status < 424 or self.status == 429


_GENERATION = ErrorKind(424, "generation", "Request failed during generation: Server error: ")

ERROR_KINDS: dict[type[Exception], ErrorKind] = {
    ValidationError: ErrorKind(422, "validation", "Input validation error: "),
    OverloadedError: ErrorKind(429, "overloaded"),
    TemplateError: ErrorKind(422, "template_error", "Template error: "),
    ToolError: ErrorKind(422, "tool_error", "Tool error: "),
    SuffixError: ErrorKind(422, "suffix not supported"),
    BatchSizeError: ErrorKind(422, "batch size exceeded"),
    ModelNotFoundError: ErrorKind(404, "model_not_found"),
    AdapterNotFoundError: ErrorKind(404, "model_not_found"),
    UnauthorizedError: ErrorKind(401, "unauthorized"),
    NoInstanceError: ErrorKind(422, "Input validation error"),
    FailedInstanceError: ErrorKind(500, "Incomplete generation"),
    IncompleteGenerationError: ErrorKind(500, "incomplete_generation"),
    UnhealthyError: ErrorKind(503, "healthcheck"),
    StartingError: ErrorKind(503, "starting"),
    GenerationError: _GENERATION,
    EngineDeadError: _GENERATION,
    EngineHungError: _GENERATION,
}


def logged_text(error: Exception) -> str:
    """The words of a known error for the log. The engine's may quote a grammar after the first colon."""
    if isinstance(error, GenerationError):
        return str(error).partition(":")[0]
    return str(getattr(error, "logged_text", error))


class ErrorBody(msgspec.Struct, frozen=True):
    """The error object of every route."""

    error: str
    error_type: str


def error_body(error: Exception) -> ErrorBody:
    """TGI's error object. An exception that nobody foresaw keeps its text to itself."""
    kind = ERROR_KINDS.get(type(error))
    if kind is None:
        return ErrorBody("Internal server error", "internal")
    return ErrorBody(f"{kind.prefix}{error}", kind.error_type)


class OpenAIError(msgspec.Struct, frozen=True):
    message: str
    type: str
    code: str | None
    param: str | None = None


class OpenAIErrorBody(msgspec.Struct, frozen=True):
    """What OpenAI's clients read."""

    error: OpenAIError


def openai_status(status: int) -> int:
    """OpenAI's status for TGI's: a request that cannot be answered is a bad one."""
    return 400 if status == 422 else status


def _openai_type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if 400 <= status < 424 else "server_error"


def _openai_status_of(error: Exception) -> int:
    if isinstance(error, BodyError):
        return openai_status(error.status)
    kind = ERROR_KINDS.get(type(error))
    return 500 if kind is None else openai_status(kind.status)


def openai_error_body(error: Exception) -> OpenAIErrorBody:
    """OpenAI's error object. `code` is OpenAI's where an error has one, else TGI's error_type."""
    type_, param = _openai_type(_openai_status_of(error)), getattr(error, "param", None)
    if isinstance(error, BodyError):
        return OpenAIErrorBody(OpenAIError(f"{error}{error.hint}", type_, error.code, param))
    body = error_body(error)
    return OpenAIErrorBody(OpenAIError(body.error, type_, getattr(error, "code", body.error_type), param))


class AnthropicError(msgspec.Struct, frozen=True):
    type: str
    message: str


class AnthropicErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """What Anthropic's clients read."""

    type: str = "error"
    error: AnthropicError


ANTHROPIC_TYPES: dict[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
}
"""Status -> `type` of Anthropic's error object; any other status is an `api_error`."""


def anthropic_error_body(error: Exception) -> AnthropicErrorBody:
    message = f"{error}{error.hint}" if isinstance(error, BodyError) else error_body(error).error
    return AnthropicErrorBody(error=AnthropicError(ANTHROPIC_TYPES.get(_openai_status_of(error), "api_error"), message))


_BODIES: dict[type[msgspec.Struct], Callable[[Exception], msgspec.Struct]] = {
    ErrorBody: error_body,
    OpenAIErrorBody: openai_error_body,
    AnthropicErrorBody: anthropic_error_body,
}


def error_type(path: str, *, is_strict: bool) -> type[msgspec.Struct]:
    """The error object of a path."""
    if is_strict or not path.startswith("/v1/"):
        return ErrorBody
    return AnthropicErrorBody if re.match(r"/v1/messages(/|$)", path) else OpenAIErrorBody


def error_body_for(path: str, error: Exception, *, is_strict: bool) -> msgspec.Struct:
    """An error in the shape that the clients of a path read."""
    return _BODIES[error_type(path, is_strict=is_strict)](error)
