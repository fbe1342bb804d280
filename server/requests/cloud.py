"""Bodies of the cloud platforms' routes: one of several shapes each (`docs/wire.md`, 1.7 and 1.8)."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from pydantic import Field, RootModel

from server.requests.dialects import parameters_of
from server.requests.native import CompatGenerateRequest, VertexInstance
from server.requests.openai import ChatRequest, CompletionRequest
from server.requests.rows import Dialect
from server.requests.sampling import Parameters
from server.requests.serde import ListOf, WireModel, max_items, untagged

MAX_INSTANCES = 4_096


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

    instances: Annotated[
        ListOf[Annotated[VertexInstance | ChatRequest, Field(union_mode="left_to_right"), untagged("VertexInstance")]],
        max_items(MAX_INSTANCES),
    ]


def vertex_parameters(instance: VertexInstance, *, is_strict: bool) -> Parameters:
    """TGI samples whatever is asked for, and looks at two parameters only; here all have their effect."""
    if instance.parameters is None:
        return Parameters(do_sample=True)
    parameters = parameters_of(Dialect.NATIVE, instance.parameters)
    if is_strict:
        return Parameters(do_sample=True, max_new_tokens=parameters.max_new_tokens, seed=parameters.seed)
    has_choice = "do_sample" in instance.parameters.model_fields_set
    return parameters if has_choice else dataclasses.replace(parameters, do_sample=True)
