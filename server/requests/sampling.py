"""The sampling parameters of the OpenAI-shaped routes as native ones (reference `tgi-http.md` 1.9, 1.11, 3.5)."""

from __future__ import annotations

from server.requests.native import GenerateParameters
from server.requests.openai import ChatRequest, CompletionRequest


def native_parameters(request: ChatRequest | CompletionRequest, *, is_strict: bool) -> GenerateParameters:
    """Sampling unless the temperature is exactly 0; what only one of the routes has is left to it."""
    is_greedy = request.temperature == 0
    presence, repetition = request.presence_penalty, request.repetition_penalty
    if is_strict and presence is not None:
        repetition, presence = presence + 2, None  # quirk 5
    parameters = GenerateParameters(
        do_sample=not is_greedy,
        temperature=None if is_greedy else request.temperature,
        top_p=None if request.top_p == 1 and not is_strict else request.top_p,  # quirk 3
        top_k=None if request.top_k in (-1, 0) else request.top_k,  # either is off to some server
        min_p=request.min_p,
        typical_p=request.typical_p,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=presence,
        repetition_penalty=repetition,
        max_new_tokens=request.max_tokens,
        stop=request.stop or [],
        seed=request.seed,
        ignore_eos=request.ignore_eos,
        details=True,
    )
    return parameters.model_copy(update={"logit_bias": request.logit_bias})  # not read a second time: its keys are ids
