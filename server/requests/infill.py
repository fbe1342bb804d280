"""Filling in the middle: a prompt and a `suffix` become one prompt, in the format of Qwen2.5-Coder."""

from __future__ import annotations

from server.errors import ValidationError
from server.text.tokenizer import TextTokenizer

MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
ENDS = (*MARKS, "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
"""Tokens after which nothing belongs to the middle any more. They are no ends of the model's."""


async def infill_prompt(tokenizer: TextTokenizer, prompt: str | list[int], suffix: str) -> str | list[int]:
    """The prompt that asks for what stands between `prompt` and `suffix`. Raises ValidationError."""
    ids = [tokenizer.token_id(mark) for mark in MARKS]
    prefix_id, suffix_id, middle_id = ids
    if prefix_id is None or suffix_id is None or middle_id is None:
        raise ValidationError(
            f"`suffix` needs a model that fills in the middle: this one does not have {', '.join(MARKS)}",
            param="suffix",
            code="unsupported_parameter",
        )
    if isinstance(prompt, str):
        prefix_mark, suffix_mark, middle_mark = MARKS
        return f"{prefix_mark}{prompt}{suffix_mark}{suffix}{middle_mark}"
    suffix_ids = await tokenizer.encode(suffix, add_special_tokens=False)
    return [prefix_id, *prompt, suffix_id, *suffix_ids, middle_id]
