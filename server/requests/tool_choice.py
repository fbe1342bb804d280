"""The `tool_choice` of a chat (`docs/wire.md`, 3.6)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ValidationError, ValidationInfo, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from server.requests.serde import ListOf, WireModel, is_strict, max_items, wrong

MAX_TOOLS = 1_024


class FunctionName(WireModel):
    name: str


class NamedToolChoice(WireModel):
    function: FunctionName

    @model_validator(mode="before")
    @classmethod
    def _read_flat(cls, data: Any, info: ValidationInfo) -> Any:
        """The shape of /v1/responses has no object around the name."""
        is_flat = isinstance(data, dict) and "function" not in data and not is_strict(info)
        return {"function": data} if is_flat else data


class AllowedTools(WireModel):
    mode: Literal["auto", "required"] = "auto"
    tools: Annotated[ListOf[NamedToolChoice], max_items(MAX_TOOLS)]


class AllowedToolsChoice(WireModel):
    """Some of the tools, which alone may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools

    @model_validator(mode="before")
    @classmethod
    def _read_flat(cls, data: Any, info: ValidationInfo) -> Any:
        if is_strict(info):
            raise wrong("TGI has no such choice")
        is_flat = isinstance(data, dict) and "allowed_tools" not in data
        return {"type": data.get("type"), "allowed_tools": data} if is_flat else data


ToolChoice = str | NamedToolChoice | AllowedToolsChoice | None


def _read_choice(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    try:
        return handler(value)
    except ValidationError:
        if is_strict(info):
            raise wrong("data did not match any variant of untagged enum ToolTypeDeserializer") from None
    raise wrong(
        'invalid value, expected "none", "auto", "required", {"type": "function", "function": {"name": NAME}} or '
        '{"type": "allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": [...]}}'
    )


ReadToolChoice = Annotated[ToolChoice, WrapValidator(_read_choice)]
