"""A GPU that is not there: models whose tensors have shapes and the device `cuda:0`, and no numbers.

A tensor that stays on the CPU is an error beside them, and so is a read of what they hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
from array import array
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from engine.build import make_model
from engine.device import Device, find_cpu
from engine.layers.rope import Rotary
from engine.link.messages import GenerationRequest
from engine.runner import ModelRunner
from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.sequence import Sequence
from quant.config import Quantization
from quant.dense import DenseMethod
from quant.on_load import Int8Method
from scripts.kernels_aot import FormMethod, load_shapes, model_config

GPU = torch.device("cuda", 0)
NUM_BLOCKS, BLOCK_SIZE, NUM_POSITIONS = 300, 16, 4096
KERNELS: Any = dict.fromkeys("attention ops matrices sampler masks penalties".split(), "triton")
DEVICE = dataclasses.replace(find_cpu(0), torch_device=GPU, computes_in_float32=False, repeats_calls=False, **KERNELS)


@contextlib.contextmanager
def no_numbers() -> Iterator[None]:
    """Tensors that are made within have no numbers.

    Some methods of tensors ask the device's library before they dispatch, which a CPU build of torch lacks.
    """
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr(torch.Tensor, "__getitem__", _get)
        patch.setattr(torch.Tensor, "__setitem__", lambda x, key, value: _get(x, key).copy_(value))
        patch.setattr(torch.Tensor, "copy_", _copy)
        patch.setattr(torch.Tensor, "nonzero", lambda x: torch.ops.aten.nonzero.default(x))
        yield


def _get(x: torch.Tensor, key: Any) -> torch.Tensor:
    """x[key] by operations alone: slices, numbers and tensors of indices."""
    dim = 0
    for part in key if isinstance(key, tuple) else (key,):
        if isinstance(part, int):
            x = torch.ops.aten.select.int(x, dim, part)
            continue
        if isinstance(part, slice):
            x = torch.ops.aten.slice.Tensor(x, dim, part.start, part.stop)
        elif isinstance(part, torch.Tensor):
            x = torch.ops.aten.index.Tensor(x, [None] * dim + [part])
        else:
            assert part is None
            x = x.unsqueeze(dim)
        dim += 1
    return x


def _copy(x: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    copied: torch.Tensor = torch.ops.aten.copy_.default(x, source, non_blocking)
    return copied


def make_fake_runner(name: str, form: str, dtype: torch.dtype = torch.bfloat16, device: Device = DEVICE) -> ModelRunner:
    """A model of the form as it stands after its weights are loaded, with KV memory. Call it under `no_numbers`."""
    config = model_config(name)
    method: Any = FormMethod(form)
    head: Any = method if form == "dense" else Int8Method()
    dense = DenseMethod(dtype, computes_in_float32=False)
    quantization = Quantization(form, dense, method, head, lambda module: None, "triton")
    with unset_fake_temporarily():
        # Its rotary embedding is checked as it is made: that happens with numbers, on the CPU.
        model = make_model(config, quantization, dtype, dataclasses.replace(device, torch_device=torch.device("cpu")))
        model.rotary = Rotary(model.rotary.rope, model.attention_shape.head_dim, GPU)
    load_shapes(model, config, dtype, GPU)
    runner = ModelRunner(model, device)
    runner.allocate(NUM_BLOCKS, dtype, num_positions=NUM_POSITIONS)
    return runner


def make_fake_batch(parts: list[tuple[int, int, list[int]]], *, is_scored: bool = False) -> ScheduledBatch:
    """A step of sequences: computed tokens, tokens to compute and a draft of each. `is_scored`: their prompts, too."""
    batch = ScheduledBatch()
    for num_computed, num_tokens, draft in parts:
        total = num_computed + num_tokens
        request = GenerationRequest(
            request_id="any", prompt_token_ids=[1] * total, max_new_tokens=9, has_prompt_logprobs=is_scored
        )
        sequence = Sequence(request, arrival_time=0.0)
        sequence.block_table = array("i", range(-(-(total + len(draft)) // BLOCK_SIZE)))
        sequence.num_computed_tokens = num_computed
        batch.add(sequence, num_tokens, draft)
    return batch
