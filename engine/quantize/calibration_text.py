"""Reading a user's text as token ids: samples to calibrate with, and a part kept apart to score. Knows no model."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import tokenizers

from engine.link.errors import StartError

logger = logging.getLogger(__name__)

MAX_BYTES = 16 << 20
"""Bytes of the dataset that are read; more would be tokenized for nothing."""
JSON_LINES = (".jsonl", ".ndjson", ".json")


@dataclasses.dataclass(frozen=True, slots=True)
class CalibrationText:
    """`samples` lie evenly over the text before its end, which is `held_out`."""

    samples: list[list[int]]
    held_out: list[int]


def read_calibration_text(
    path: Path, tokenizer: Path, *, num_samples: int, sample_tokens: int, num_held_out: int
) -> CalibrationText:
    """Read and split the text; `num_samples` 0: only the held-out part. Raises StartError."""
    token_ids = _encode(_read_text(path), tokenizer)
    min_count = num_samples * sample_tokens + num_held_out
    if len(token_ids) < min_count:
        sizes = f"{num_samples} samples of {sample_tokens}" if num_samples else "none to calibrate with"
        raise StartError(
            f"{path} has {len(token_ids)} tokens, too few: {sizes} and {num_held_out} to score are {min_count}; give a "
            "longer text, or smaller --num-samples, --sample-tokens or --perplexity-tokens"
        )
    num_before = len(token_ids) - num_held_out
    step = (num_before - sample_tokens) / max(num_samples - 1, 1)
    starts = [int(index * step) for index in range(num_samples)]
    return CalibrationText(
        samples=[token_ids[start : start + sample_tokens] for start in starts], held_out=token_ids[num_before:]
    )


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise StartError(f"--dataset {path} is not there: give the path of a text file") from None
    except OSError as error:
        raise StartError(f"--dataset {path} cannot be read ({error.strerror or error}): give a text file") from error
    if len(data) > MAX_BYTES:
        logger.info("Of %s only the first %d MiB are used", path, MAX_BYTES >> 20)
        data = data[: data.rfind(b"\n", 0, MAX_BYTES) + 1] or data[:MAX_BYTES]
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise StartError(f"--dataset {path} is not UTF-8 text: give plain text or JSON lines, uncompressed") from None
    return _join_documents(text, path) if path.suffix in JSON_LINES else text


def _join_documents(text: str, path: Path) -> str:
    """The documents of a text in JSON lines, one after the other. Raises StartError."""
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict) or not isinstance(document.get("text"), str):
            raise StartError(
                f'line {number} of {path} is not an object with a "text": write one per line, like {{"text": "..."}}'
            )
        documents.append(document["text"])
    return "\n\n".join(documents)


def _encode(text: str, tokenizer: Path) -> list[int]:
    try:
        encoder = tokenizers.Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library raises Exception itself
        raise StartError(f"{tokenizer} cannot be read ({error}): fetch the model again") from error
    token_ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
    return token_ids
