"""The `x-` headers of a successful answer (`docs/wire.md`, 1.12), and one of ours."""

from __future__ import annotations

from collections.abc import Sequence

from server.generation import Generation
from server.schemas.parts import named

LEFT_OPEN = "x-schema-left-open"
"""The places of the request's schemas that the model is not held to (`docs/structured-output.md`)."""


def stream_headers(compute_type: str, prompt: str, left_open: Sequence[str] = ()) -> dict[str, str]:
    """The headers that are known before the first token."""
    headers = {"x-compute-type": compute_type, "x-compute-characters": str(len(prompt))}
    return headers | left_open_header(left_open)


def left_open_header(left_open: Sequence[str]) -> dict[str, str]:
    return {LEFT_OPEN: named(left_open)} if left_open else {}


def plain_headers(compute_type: str, prompt: str, generation: Generation, left_open: Sequence[str]) -> dict[str, str]:
    return {
        "x-compute-type": compute_type,
        "x-compute-time": f"{generation.timings.total_s:.9f}",
        "x-compute-characters": str(len(prompt)),
        **{name: str(value) for name, value in _counts(generation).items()},
        **left_open_header(left_open),
    }


def plain_headers_of_prompts(
    compute_type: str, prompts: str, generations: Sequence[Sequence[Generation]], left_open: Sequence[str]
) -> dict[str, str]:
    """Sums over the sequences of all prompts; the tokens of a prompt count once, however many sequences it has."""
    headers = {"x-compute-type": compute_type, "x-compute-characters": str(len(prompts))}
    all_counts = [_counts(generation) for sequences in generations for generation in sequences]
    sums = {name: sum(counts[name] for counts in all_counts) for name in all_counts[0]}
    sums["x-prompt-tokens"] = sum(sequences[0].num_prompt_tokens for sequences in generations)
    return headers | {name: str(value) for name, value in sums.items()} | left_open_header(left_open)


def _counts(generation: Generation) -> dict[str, int]:
    timings = generation.timings
    return {
        "x-total-time": _milliseconds(timings.total_s),
        "x-validation-time": _milliseconds(timings.validation_s),
        "x-queue-time": _milliseconds(timings.queue_s),
        "x-inference-time": _milliseconds(timings.inference_s),
        "x-time-per-token": _milliseconds(generation.time_per_token_s),
        "x-prompt-tokens": generation.num_prompt_tokens,
        "x-generated-tokens": generation.num_generated_tokens,
    }


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
