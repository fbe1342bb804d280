"""Bodies of the native routes, as TGI reads them (`docs/wire.md`, 1.1 to 1.3).

A field that may be null is `X | None`; the others refuse an explicit null even where they have a default.
"""

from __future__ import annotations

from pydantic import AliasChoices, Field

from server.requests.dialects import parameters_of, speaking
from server.requests.rows import Dialect
from server.requests.sampling import Parameters
from server.requests.serde import U32, ListOf, WireModel


@speaking(Dialect.NATIVE)
class GenerateParameters(WireModel):
    """`parameters` of a native request; the OpenAI routes are mapped to it as well."""


def _absent_parameters() -> GenerateParameters:
    return GenerateParameters.model_validate({"do_sample": True})


class GenerateRequest(WireModel):
    """Body of /generate and /generate_stream."""

    inputs: str
    parameters: GenerateParameters = Field(default_factory=_absent_parameters)
    """Left out altogether it means sampling, while `{}` means greedy (`docs/compatibility.md`, row 1)."""


class CompatGenerateRequest(GenerateRequest):
    """Body of POST /."""

    stream: bool = False


def native_parameters(body: GenerateRequest) -> Parameters:
    return parameters_of(Dialect.NATIVE, body.parameters)


class DetokenizeRequest(WireModel):
    """Body of /detokenize, as vLLM has it; `ids` is what /tokenize calls them."""

    tokens: ListOf[U32] = Field(validation_alias=AliasChoices("tokens", "ids"))


class VertexInstance(WireModel):
    """A native request to /vertex."""

    inputs: str
    parameters: GenerateParameters | None = None
