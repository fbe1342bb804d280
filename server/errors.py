"""What a request can end in, and the one table from exception to status and `error_type` (reference 0.4).

Exception
 ├─ ValidationError            a parameter or length is not acceptable
 ├─ OverloadedError            no permit is free
 ├─ TemplateError              the chat template failed
 ├─ ToolError                  tools cannot be used like this
 ├─ SuffixError                /v1/completions: `suffix` is given
 ├─ BatchSizeError             /v1/completions: too many prompts
 ├─ ModelNotFoundError         /v1/models/{id}: another model
 ├─ NoInstanceError            /vertex: nothing to do
 ├─ FailedInstanceError        /vertex under --strict-tgi: whatever went wrong with an instance
 ├─ IncompleteGenerationError  the engine ended without a final token
 ├─ UnhealthyError             /health says no
 └─ BodyError                  the body is not what the route reads; plain text, before any handler
engine.link.errors.GenerationError, EngineDeadError, EngineHungError
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from engine.link.errors import EngineDeadError, EngineHungError, GenerationError


class ValidationError(Exception):
    """The text is what reference 2.2 lists."""


class OverloadedError(Exception):
    def __init__(self) -> None:
        super().__init__("Model is overloaded")


class TemplateError(Exception):
    """The text is the template engine's."""


class ToolError(Exception):
    """The text says what cannot be done with the tools."""


class SuffixError(Exception):
    def __init__(self) -> None:
        super().__init__("Suffix is not supported and can be achieved by preprocessing the prompt.")


class BatchSizeError(Exception):
    def __init__(self, max_client_batch_size: int) -> None:
        super().__init__(f"Number of prompts exceeds the maximum allowed batch size of {max_client_batch_size}")


class ModelNotFoundError(Exception):
    def __init__(self, model_id: str) -> None:
        super().__init__(f"The model `{model_id}` does not exist")


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


class BodyError(Exception):
    """A refusal in plain text, as TGI's web framework gives it before a handler runs."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True)
class ErrorKind:
    status: int
    error_type: str
    prefix: str = ""


_GENERATION = ErrorKind(424, "generation", "Request failed during generation: Server error: ")

ERROR_KINDS: dict[type[Exception], ErrorKind] = {
    ValidationError: ErrorKind(422, "validation", "Input validation error: "),
    OverloadedError: ErrorKind(429, "overloaded"),
    TemplateError: ErrorKind(422, "template_error", "Template error: "),
    ToolError: ErrorKind(422, "tool_error", "Tool error: "),
    SuffixError: ErrorKind(422, "suffix not supported"),
    BatchSizeError: ErrorKind(422, "batch size exceeded"),
    ModelNotFoundError: ErrorKind(404, "model_not_found"),
    NoInstanceError: ErrorKind(422, "Input validation error"),
    FailedInstanceError: ErrorKind(500, "Incomplete generation"),
    IncompleteGenerationError: ErrorKind(500, "incomplete_generation"),
    UnhealthyError: ErrorKind(503, "healthcheck"),
    GenerationError: _GENERATION,
    EngineDeadError: _GENERATION,
    EngineHungError: _GENERATION,
}


class ErrorBody(msgspec.Struct, frozen=True):
    """The error object of every route."""

    error: str
    error_type: str


def error_body(error: Exception) -> ErrorBody:
    """What the client reads; an exception nobody foresaw keeps its text to itself."""
    kind = ERROR_KINDS.get(type(error))
    if kind is None:
        return ErrorBody("Internal server error", "internal")
    return ErrorBody(f"{kind.prefix}{error}", kind.error_type)


class OpenAIError(msgspec.Struct, frozen=True):
    message: str
    type: str
    code: str
    param: None = None


class OpenAIErrorBody(msgspec.Struct, frozen=True):
    """What OpenAI's clients read (quirk 11); `code` is TGI's error_type."""

    error: OpenAIError


def is_openai_path(path: str) -> bool:
    """Whether errors of this path are OpenAI's objects, without --strict-tgi."""
    return path.startswith("/v1/")


OPENAI_TYPES = {404: "invalid_request_error", 422: "invalid_request_error", 429: "rate_limit_error"}


def openai_error_body(error: Exception) -> OpenAIErrorBody:
    body = error_body(error)
    kind = ERROR_KINDS.get(type(error))
    status = 500 if kind is None else kind.status
    type_ = OPENAI_TYPES.get(status, "server_error")
    return OpenAIErrorBody(OpenAIError(body.error, type_, body.error_type))
