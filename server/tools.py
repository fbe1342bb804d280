"""Tools of a chat: which are offered, and how a call is read out of the text."""

from __future__ import annotations

from server.errors import ToolError, ValidationError
from server.openai_schemas import ChatRequest, NamedToolChoice


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
