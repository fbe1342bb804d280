"""Values of parameters that are more than a number or a word: how they are read off a body."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import PlainValidator

from server.requests.serde import WireModel, read_f32, unexpected, wrong

MAX_ID_DIGITS = 10


def _read_logit_bias(value: object) -> dict[int, float]:
    """OpenAI's map: token ids, as strings, to what is added to their logits."""
    if not isinstance(value, dict):
        raise wrong(f"invalid type: {unexpected(value)}, expected a map")
    bias = {}
    for token_id, amount in value.items():
        # Large numbers can be chosen to have equal hashes, and then take the time of their square to be put in a map.
        if not token_id.isdecimal() or not token_id.isascii() or len(token_id) > MAX_ID_DIGITS:
            raise wrong(f"invalid value: {unexpected(token_id)}, expected a token id")
        bias[int(token_id)] = read_f32(amount)
    return bias


LogitBias = Annotated[dict[int, float], PlainValidator(_read_logit_bias, json_schema_input_type=dict[str, float])]


GrammarType = Literal["json", "json_object", "json_schema", "regex"]


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """A constraint on the output, in the words of the request."""

    type: GrammarType | Literal["grammar"]
    """`grammar`: a text in GBNF or in llguidance's form of Lark, which only OpenAI's routes take."""
    value: Any


class Grammar(WireModel):
    """A constraint on the output."""

    type: GrammarType
    value: Any

    def spec(self) -> GrammarSpec:
        return GrammarSpec(self.type, self.value)
