"""A step's numbers reach the kernels in one array whose places stay."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.step_buffers import SECTIONS, StepBuffers, StepTensors
from engine.step_inputs import StepInputs

CPU, STAND_IN = torch.device("cpu"), torch.device("meta")


def make_inputs(num_seqs: int, width: int = 3, num_scored: int = 0) -> StepInputs:
    """Two tokens for every sequence, numbers that differ everywhere."""
    tokens = range(2 * num_seqs)
    return StepInputs(
        input_ids=[1000 + token for token in tokens],
        positions=[2000 + token for token in tokens],
        query_start_loc=[2 * index for index in range(num_seqs + 1)],
        seq_lens=[3000 + index for index in range(num_seqs)],
        block_table=[[width * index + block for block in range(width)] for index in range(num_seqs)],
        slot_mapping=[(1 << 40) + token for token in tokens],
        prompt_lens=[1] * num_seqs,
        logits_indices=[2 * index + 1 for index in range(num_seqs)],
        scored_indices=list(range(num_scored)),
        scored_token_ids=[4000 + index for index in range(num_scored)],
    )


def make_items(num_items: int) -> npt.NDArray[np.int64]:
    return np.arange(4 * num_items, dtype=np.int64).reshape(num_items, 4)


def tensors_of(step: StepTensors) -> dict[str, torch.Tensor]:
    both = {**vars_of(step), **vars_of(step.attention)}
    return {name: both[name] for name in SECTIONS}


def vars_of(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def addresses(step: StepTensors) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors_of(step).items()}


@pytest.mark.parametrize("num_seqs", [1, 5, 300])
@pytest.mark.parametrize("num_scored", [0, 1, 9])
def test_every_number_arrives(num_seqs: int, num_scored: int) -> None:
    inputs, items = make_inputs(num_seqs, num_scored=num_scored), make_items(num_seqs + 1)
    step = StepBuffers(CPU).fill(inputs, items)
    for name, tensor in tensors_of(step).items():
        assert tensor.dtype == SECTIONS[name]
        assert tensor.is_contiguous()
        assert tensor.tolist() == (items.tolist() if name == "work_items" else getattr(inputs, name)), name
    assert step.attention.host_query_start_loc == inputs.query_start_loc
    assert step.attention.host_seq_lens == inputs.seq_lens


def test_places_stay_until_a_section_is_too_small() -> None:
    buffers = StepBuffers(CPU)
    first = addresses(buffers.fill(make_inputs(4), make_items(4)))
    assert addresses(buffers.fill(make_inputs(4), make_items(5))) == first
    assert addresses(buffers.fill(make_inputs(1, width=9), make_items(1))) == first
    buffers.fill(make_inputs(100), make_items(100))  # 200 tokens and 400 numbers of items, in sections of 64
    grown = addresses(buffers.fill(make_inputs(4), make_items(4)))
    assert grown != first
    assert addresses(buffers.fill(make_inputs(120), make_items(120))) == grown, "sections grow by doubling"
    assert addresses(buffers.fill(make_inputs(1), make_items(1))) == grown, "sections never shrink"


class Copies(TorchDispatchMode):
    """Counts the operations that copy memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "copy" in func.name():
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("device", "copies"), [(CPU, []), (STAND_IN, ["aten::copy_"])], ids=["cpu", "stand-in"])
def test_a_step_takes_one_copy_to_another_memory_and_none_to_the_same(device: torch.device, copies: list[str]) -> None:
    buffers = StepBuffers(device)
    with Copies() as mode:
        step = buffers.fill(make_inputs(3, num_scored=2), make_items(3))
    assert mode.names == copies
    assert {tensor.device for tensor in tensors_of(step).values()} == {device}
