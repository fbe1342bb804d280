"""Bodies of the native routes, field by field as TGI reads them (reference `tgi-http.md` 1.1, 1.2, 3.7).

A field that may be `null` is `X | None`; the others refuse an explicit null even where they have a default.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, Field, PlainValidator

from server.requests.serde import F32, I32, U32, U64, Usize, WireModel, read_f32, unexpected, wrong


def _read_logit_bias(value: object) -> dict[int, float]:
    """OpenAI's map: token ids, as strings, to what is added to their logits."""
    if not isinstance(value, dict):
        raise wrong(f"invalid type: {unexpected(value)}, expected a map")
    bias = {}
    for token_id, amount in value.items():
        if not token_id.isdecimal() or not token_id.isascii():
            raise wrong(f"invalid value: {unexpected(token_id)}, expected a token id")
        bias[int(token_id)] = read_f32(amount)
    return bias


LogitBias = Annotated[dict[int, float], PlainValidator(_read_logit_bias, json_schema_input_type=dict[str, float])]


class Grammar(WireModel):
    """A constraint on the output (reference 3.7)."""

    type: Literal["json", "json_object", "json_schema", "regex"]
    value: Any


class GenerateParameters(WireModel):
    """`parameters` of a native request; the OpenAI routes are mapped to it as well."""

    best_of: Usize | None = None
    temperature: F32 | None = None
    repetition_penalty: F32 | None = None
    frequency_penalty: F32 | None = None
    top_k: I32 | None = None
    top_p: F32 | None = None
    typical_p: F32 | None = None
    do_sample: bool = False
    max_new_tokens: U32 | None = None
    return_full_text: bool | None = None
    stop: list[str] = []
    truncate: Usize | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: U64 | None = None
    top_n_tokens: U32 | None = None
    grammar: Grammar | None = None
    adapter_id: str | None = None
    presence_penalty: F32 | None = None
    min_p: F32 | None = None
    logit_bias: LogitBias | None = None
    ignore_eos: bool = False

    extensions: ClassVar[frozenset[str]] = frozenset({"presence_penalty", "min_p", "logit_bias", "ignore_eos"})


def _absent_parameters() -> GenerateParameters:
    return GenerateParameters(do_sample=True)


class GenerateRequest(WireModel):
    """Body of /generate and /generate_stream."""

    inputs: str
    parameters: GenerateParameters = Field(default_factory=_absent_parameters)
    """Left out altogether it means sampling, while `{}` means greedy (quirk 1)."""


class CompatGenerateRequest(GenerateRequest):
    """Body of POST /."""

    stream: bool = False


class DetokenizeRequest(WireModel):
    """Body of /detokenize, as vLLM has it; `ids` is what /tokenize calls them."""

    tokens: list[U32] = Field(validation_alias=AliasChoices("tokens", "ids"))


class VertexInstance(WireModel):
    """A native request to /vertex."""

    inputs: str
    parameters: GenerateParameters | None = None
