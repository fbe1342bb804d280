"""Bodies of the cloud platforms' routes: one of several shapes each (reference `tgi-http.md` 1.7, 1.8)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, RootModel

from server.requests.native import CompatGenerateRequest, VertexInstance
from server.requests.openai import ChatRequest, CompletionRequest
from server.requests.serde import WireModel, untagged


class SagemakerRequest(
    RootModel[
        Annotated[
            CompatGenerateRequest | ChatRequest | CompletionRequest,
            Field(union_mode="left_to_right"),
            untagged("SagemakerRequest"),
        ]
    ]
):
    """Body of /invocations: the first shape that fits."""


class VertexRequest(WireModel):
    """Body of /vertex."""

    instances: list[
        Annotated[VertexInstance | ChatRequest, Field(union_mode="left_to_right"), untagged("VertexInstance")]
    ]
