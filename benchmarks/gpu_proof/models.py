"""Models of random weights, made on the device layer by layer, and engines around them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_proof.weights import Form, RandomMethod
from engine import overlap
from engine.build import make_model
from engine.core import EngineCore
from engine.device import Device, find_cpu
from engine.layers.norm import RMSNorm
from engine.link.messages import GenerationRequest
from engine.link.registry import import_entry
from engine.models.base import CausalLM, Loadable
from engine.runner import ModelRunner
from engine.sampling.batch_sampler import BatchSampler, LogitsProcessor
from engine.sampling.grammar import MASKS, Grammars
from engine.sampling.penalties import Penalties
from engine.sampling.sampler import SAMPLERS
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.speculate import Drafter
from engine.scheduling.step_costs import UnusedCosts
from engine.scheduling.step_limit import StepLimit
from quant.config import Quantization
from quant.dense import DenseMethod
from scripts.kernels_aot import matrix_shapes

Config = dict[str, Any]

_SHARED: Config = {
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 32_768,
}
QWEN2_7B: Config = _SHARED | {
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "vocab_size": 152_064,
}
TINY: Config = _SHARED | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 500,
}
SINGLE_LAYER: Config = TINY | {"num_hidden_layers": 1}
"""For the interpreter, which takes a tenth of a second for a product."""


def reference_device() -> Device:
    """Plain torch on the CPU, which the tests hold to transformers' ids."""
    return dataclasses.replace(
        find_cpu(0),
        attention="torch",
        ops="torch",
        matrices="torch",
        sampler="torch",
        masks="torch",
        penalties="torch",
        computes_in_float32=False,
        step_limit_s=None,
        alone_step_limit_s=None,
    )


def random_model(
    config: Config, form: Form, head: Form, dtype: torch.dtype, device: Device, generator: torch.Generator
) -> CausalLM:
    """A model whose weights are made on the generator's device; the same generator makes the same model."""
    dense = DenseMethod(dtype, computes_in_float32=False)
    table: Any = RandomMethod(Form("dense"), dtype, generator)
    linear, head_method = (dataclasses.replace(table, form=each, orders={}) for each in (form, head))
    quantization = Quantization("random", dense, linear, head_method, lambda module: None, device.matrices)
    quantization = dataclasses.replace(quantization, dense=table).tuned_for(device.architecture)
    model = make_model(config, quantization, dtype, device)
    fill_model(model, config, device.torch_device, generator)
    return model


def fill_model(model: CausalLM, config: Config, device: torch.device, generator: torch.Generator) -> None:
    """Give each layer tensors that have shapes alone, of which its method makes weights."""
    shapes = matrix_shapes(config)
    layers: dict[int, Loadable] = {}
    for prefix, (layer, part) in model.checkpoint_layers().items():
        if isinstance(layer, RMSNorm):
            numbers = torch.randn(config["hidden_size"], device=generator.device, generator=generator)
            layer.load("weight", part, 1 + 0.1 * numbers)
        else:
            shape = shapes[prefix.rpartition(".")[2]]
            for name in layer.missing(part):
                layer.load(name, part, torch.empty(shape if name == "weight" else shape[:1], device="meta"))
        layers[id(layer)] = layer
    for layer in layers.values():
        layer.finish(device)


def make_runner(
    model: CausalLM, device: Device, dtype: torch.dtype, *, num_blocks: int, num_positions: int
) -> ModelRunner:
    runner = ModelRunner(model, device)
    runner.allocate(num_blocks, device.kv_dtype(dtype), num_positions=num_positions)
    return runner


def make_core(
    runner: ModelRunner,
    device: Device,
    vocab_size: int,
    *,
    num_blocks: int,
    max_batch_tokens: int,
    drafter: Drafter | None = None,
    is_overlapped: bool = False,
) -> EngineCore:
    """An engine without a tokenizer, end tokens or step limits.

    `is_overlapped`: each step is launched before the last one is read.
    """
    grammars = Grammars(Path("none"), vocab_size, [], 1, lambda: import_entry(MASKS, device.masks, "mask"))
    processors: list[LogitsProcessor] = [Penalties(backend=device.penalties), grammars]
    sampler = BatchSampler(import_entry(SAMPLERS, device.sampler, "sampler"), processors)
    scheduler = Scheduler(
        BlockManager(num_blocks, runner.block_size),
        max_batch_tokens=max_batch_tokens,
        eos_token_ids=[],
        drafter=drafter,
        needs_tokens=sampler.needs_tokens,
    )
    return overlap.make_core(
        device,
        scheduler,
        runner,
        sampler,
        grammars,
        StepLimit(None, None),
        UnusedCosts(),
        is_overlapped=is_overlapped,
    )


def greedy_request(name: str, prompt: list[int], max_new_tokens: int) -> GenerationRequest:
    return GenerationRequest(
        request_id=name, prompt_token_ids=prompt, max_new_tokens=max_new_tokens, is_ignoring_eos=True
    )


def run_requests(core: EngineCore, requests: Sequence[GenerationRequest]) -> list[list[int]]:
    """The ids of each request. Raises RuntimeError where one ends with an error."""
    for request in requests:
        core.take(request)
    token_ids: dict[str, list[int]] = {request.request_id: [] for request in requests}
    while core.has_work:
        for event in core.step():
            if event.error is not None:
                raise RuntimeError(event.error)
            token_ids[event.request_id] += event.token_ids
    return list(token_ids.values())
