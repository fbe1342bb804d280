"""Kernels stay within their tensors in every kind of step, and faults that are planted are found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from engine.attention.triton import TritonAttention
from engine.layers.triton import PRODUCT_BLOCK, TritonOps, product_kernel
from engine.runner import ModelRunner
from quant.kernels.launch import launch
from tests.contract.harness import make_requests, make_runner, run_requests
from tests.interpreted.launches import Descriptions, GuardError, launches_made_by, make_with_guards
from tests.interpreted.test_engine import core_of, expected_ids, interpreted, make_prompts
from tests.interpreted.test_graphs import FEW, STEPS, decode_batch, make_scene


def run(folder: Path, runner: ModelRunner, prompts: list[list[int]]) -> list[list[int]]:
    requests = make_requests(prompts, max_new_tokens=2)
    return run_requests(core_of(folder, runner, max_batch_tokens=24), requests, is_staggered=True).token_ids


def test_no_kernel_leaves_its_tensors(tiny_model_dir: Path) -> None:
    """Prompts, chunks, tokens and a graph, on tensors between NaN."""
    prompts = make_prompts(sizes=[1, 33])
    with launches_made_by(make_with_guards):
        runner = make_runner(tiny_model_dir, device=interpreted())
        runner.capture(FEW)
        ids = run(tiny_model_dir, runner, prompts)
    assert ids == [ids[:2] for ids in expected_ids(tiny_model_dir, prompts)]


def product(gate_up: torch.Tensor, out: torch.Tensor, num_rows: int) -> torch.Tensor:
    launch(product_kernel, (num_rows, 1), gate_up, out, SIZE=out.shape[1], BLOCK=PRODUCT_BLOCK)
    return out


def read_past_rows(ops: TritonOps, gate_up: torch.Tensor) -> torch.Tensor:
    rows, width = gate_up.shape
    return product(gate_up[:-1], gate_up.new_empty(rows, width // 2), rows)


def write_past_rows(ops: TritonOps, gate_up: torch.Tensor) -> torch.Tensor:
    rows, width = gate_up.shape
    out = gate_up.new_empty(rows, width // 2)
    product(gate_up, out[:-1], rows)
    return out


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_a_read_past_the_rows_shows(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonOps, "silu_and_mul", read_past_rows)
    runner = make_runner(tiny_model_dir, device=interpreted())
    batch = decode_batch(STEPS["padded"])
    assert runner.execute(batch).logits.isfinite().all(), "what lies there happens to be numbers"
    with launches_made_by(make_with_guards):
        assert not runner.execute(batch).logits.isfinite().all()


def test_a_write_past_the_rows_is_found(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonOps, "silu_and_mul", write_past_rows)
    runner = make_runner(tiny_model_dir, device=interpreted())
    with launches_made_by(make_with_guards), pytest.raises(GuardError, match="product_kernel writes past"):
        runner.execute(decode_batch(STEPS["padded"]))


@triton.jit
def specialized_kernel(x_ptr, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, BLOCK)
    tl.store(x_ptr + places, tl.load(x_ptr + places, mask=places < length, other=0.0))


@triton.jit(do_not_specialize=["length"])
def general_kernel(x_ptr, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, BLOCK)
    tl.store(x_ptr + places, tl.load(x_ptr + places, mask=places < length, other=0.0))


@pytest.mark.parametrize(("kernel", "num_kernels"), [(general_kernel, 1), (specialized_kernel, 3)])
def test_an_integer_that_is_specialized_by_its_value_is_another_kernel(kernel: Any, num_kernels: int) -> None:
    descriptions = Descriptions()
    with launches_made_by(descriptions):
        for length in (1, 5, 7, 16):
            launch(kernel, (1,), torch.ones(16), length, BLOCK=16)
    assert len(descriptions.met) == num_kernels


def length_of_the_host(out: torch.Tensor, step: Any) -> torch.Tensor:
    return out * step.metadata.host_seq_lens[0]


def length_of_the_device(out: torch.Tensor, step: Any) -> torch.Tensor:
    return out * step.metadata.seq_lens[:1]


@pytest.mark.parametrize(("scale", "is_same"), [(length_of_the_host, False), (length_of_the_device, True)])
def test_a_number_of_the_host_that_a_graph_holds_shows(
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    scale: Callable[[torch.Tensor, Any], torch.Tensor],
    is_same: bool,
) -> None:
    """A length that varies is right when it is read on the device, and stale as an argument of a launch."""
    forward = TritonAttention.forward

    def planted(backend: Any, qkv: torch.Tensor, cache: Any, step: Any, *others: Any) -> torch.Tensor:
        return scale(forward(backend, qkv, cache, step, *others), step)

    monkeypatch.setattr(TritonAttention, "forward", planted)
    one_graph = dataclasses.replace(FEW, sizes=(4,))
    (graphed, _), (plain, _) = (make_scene(tiny_model_dir, limits) for limits in (one_graph, None))
    batch = decode_batch(STEPS["padded"])
    assert torch.equal(graphed.execute(batch).logits, plain.execute(batch).logits) == is_same
