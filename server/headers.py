"""The `x-` headers of a successful answer (reference 1.12)."""

from __future__ import annotations

from server.generation import Generation


def stream_headers(compute_type: str, prompt: str) -> dict[str, str]:
    """What is known before the first token."""
    return {"x-compute-type": compute_type, "x-compute-characters": str(len(prompt))}


def plain_headers(compute_type: str, prompt: str, generation: Generation) -> dict[str, str]:
    timings = generation.timings
    return {
        "x-compute-type": compute_type,
        "x-compute-time": f"{timings.total_s:.9f}",
        "x-compute-characters": str(len(prompt)),
        "x-total-time": _milliseconds(timings.total_s),
        "x-validation-time": _milliseconds(timings.validation_s),
        "x-queue-time": _milliseconds(timings.queue_s),
        "x-inference-time": _milliseconds(timings.inference_s),
        "x-time-per-token": _milliseconds(generation.time_per_token_s),
        "x-prompt-tokens": str(generation.num_prompt_tokens),
        "x-generated-tokens": str(generation.num_generated_tokens),
    }


def _milliseconds(seconds: float) -> str:
    return str(int(seconds * 1000))
