"""The same shapes in transformers: `generate` with a dynamic cache and with a static one, as a user would call it."""

from __future__ import annotations

import functools
import importlib.util
import time
from typing import Any

import torch

from benchmarks.gpu_proof.clock import synchronize
from benchmarks.gpu_proof.models import QWEN2_7B, SINGLE_LAYER
from benchmarks.gpu_proof.report import Report
from benchmarks.gpu_proof.settings import Settings
from engine.device import Device, detect_device

CONTEXT, NEW_TOKENS = 1024, 64
TOY_CONTEXT, TOY_NEW_TOKENS = 8, 3
CACHES = ("dynamic", "static")


def run(settings: Settings, report: Report) -> None:
    if importlib.util.find_spec("transformers") is None:
        report.leave_out("transformers is not installed")
        return
    device = detect_device(0, "cpu" if settings.is_interpreted else settings.device)
    model = _random_model(SINGLE_LAYER if settings.is_toy else QWEN2_7B, device.torch_device, settings.seed)
    context, new = (TOY_CONTEXT, TOY_NEW_TOKENS) if settings.is_toy else (CONTEXT, NEW_TOKENS)
    prompt = torch.arange(context, device=device.torch_device).remainder(97).unsqueeze(0)
    for cache in CACHES:
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
        if cache == "static":
            options |= {"cache_implementation": "static", "disable_compile": settings.is_toy}
        seconds = functools.partial(_seconds, model, prompt, device, options)
        if not settings.is_toy:
            seconds(new)  # compiles
        (one, first_complaints), (all_tokens, complaints) = seconds(1), seconds(new)
        report.check(f"{new} tokens, {cache} cache", first_complaints + complaints)
        report.row(
            "transformers, 16 bits, one sequence",
            cache=cache,
            context=context,
            **{"first token ms": round(one * 1000, 2), "ms a token": round((all_tokens - one) / (new - 1) * 1000, 3)},
        )


def _seconds(
    model: Any, prompt: torch.Tensor, device: Device, options: dict[str, Any], count: int
) -> tuple[float, list[str]]:
    """Seconds for so many tokens, and what is wrong with the result."""
    synchronize(device)
    started = time.perf_counter()
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, **options)
    synchronize(device)
    seconds = time.perf_counter() - started
    length = prompt.shape[1] + count
    return seconds, [] if ids.shape[1] == length else [f"{ids.shape[1]} tokens instead of {length}"]


def _random_model(config: dict[str, Any], device: torch.device, seed: int) -> Any:
    """The model with random weights in 16 bits, made on the device."""
    import transformers

    settings = transformers.Qwen2Config(**{name: value for name, value in config.items() if name != "model_type"})
    with torch.device("meta"):
        model: Any = transformers.Qwen2ForCausalLM(settings)
    model = model.to(torch.bfloat16).to_empty(device=device).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(settings).to(device)  # its frequencies are no parameters
    return model
