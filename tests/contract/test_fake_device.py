"""Whole steps of Qwen2's sizes on a GPU that is not there: everything is on the device, and nothing is read from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.graph_capture import Work
from engine.graphs import GraphLimits
from engine.layers.base import RotaryTable
from engine.layers.norm import RMSNorm
from engine.layers.rope import Rotary
from engine.layers.triton import TritonOps
from engine.link.messages import SamplingParams
from engine.runner import ModelRunner
from engine.sampling.sampler_triton import ChosenRows, make_specs
from engine.scheduling.batch import ScheduledBatch
from quant.base import PackedWeight
from quant.kernels.launch import recorded_launches
from scripts.kernels_aot import FORMS, MODELS
from tests.diagonal import diagonal
from tests.fake_device import DEVICE, GPU, NUM_POSITIONS, make_fake_batch, make_fake_runner, no_numbers
from tests.no_reads import READS, NoReads, ReadError, no_reads

__all__ = ["no_reads"]

STEPS: dict[str, Callable[[], ScheduledBatch]] = {
    "a token": lambda: make_fake_batch([(700, 1, [])]),
    "tokens and drafts": lambda: make_fake_batch([(40, 1, [3, 4]), (700, 1, [])] * 10),
    "a prompt beside a token": lambda: make_fake_batch([(0, 200, []), (16, 30, []), (90, 1, [])]),
    "a prompt that is scored": lambda: make_fake_batch([(0, 90, [])], is_scored=True),
}


def run_step(runner: ModelRunner, batch: ScheduledBatch) -> torch.Tensor:
    """The logits of a step, after its tokens are chosen: that's where the host reads."""
    with NoReads():
        result = runner.execute(batch)
        specs = make_specs([SamplingParams(seed=1, num_top_tokens=2)] * batch.num_rows, [0] * batch.num_rows, None)
        ChosenRows.launch(result.logits, specs, None, 14)
    return result.logits


@pytest.mark.parametrize(("name", "form"), diagonal([*MODELS], FORMS))
def test_steps_stay_on_the_device(name: str, form: str, no_reads: Callable[..., None]) -> None:
    with no_numbers(), recorded_launches() as launches:
        runner = make_fake_runner(name, form)
        no_reads("numpy", "cpu")
        for make_step in STEPS.values():
            batch = make_step()
            logits = run_step(runner, batch)
            assert logits.device == GPU
            assert logits.dtype == torch.float32
            assert logits.shape == (batch.num_rows, MODELS[name][4])
    assert {"skinny_kernel", "norm_kernel", "choose_kernel"} <= {launch.name for launch in launches}


class Recorder:
    """Runs the work once, and gives its result from then on."""

    def capture(self, work: Work) -> Work:
        with NoReads():
            result = work()
        return lambda: result


@pytest.mark.parametrize("form", FORMS)
def test_the_work_of_a_graph_stays_on_the_device(form: str, no_reads: Callable[..., None]) -> None:
    device = dataclasses.replace(DEVICE, make_recorder=Recorder)
    with no_numbers():
        runner = make_fake_runner("7B", form, device=device)
        no_reads("numpy", "cpu")
        runner.capture(GraphLimits(sizes=(32, 1), max_seq_len=NUM_POSITIONS, num_kv_tokens=NUM_POSITIONS))
        with recorded_launches() as launches:
            logits = run_step(runner, make_fake_batch([(40, 1, [3, 4]), (700, 1, [])] * 5))
    assert logits.device == GPU
    assert logits.shape[0] == 20
    assert "norm_kernel" not in {launch.name for launch in launches}, "a replay has the forward pass"


@pytest.mark.parametrize("fault", READS)
def test_a_planted_read_is_found(fault: str, no_reads: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    silu_and_mul = TritonOps.silu_and_mul

    def planted(ops: TritonOps, gate_up: torch.Tensor) -> torch.Tensor:
        READS[fault](gate_up)
        return silu_and_mul(ops, gate_up)

    with no_numbers():
        runner, batch = make_fake_runner("0.5B", "dense"), STEPS["a token"]()
        monkeypatch.setattr(TritonOps, "silu_and_mul", planted)
        no_reads("numpy", "cpu")
        with pytest.raises(ReadError):
            run_step(runner, batch)


def left_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RMSNorm, "finish", lambda norm, device: None)


def left_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    move = PackedWeight.to

    def planted(packed: PackedWeight, device: torch.device) -> PackedWeight:
        return dataclasses.replace(move(packed, device), scales=packed.scales)

    monkeypatch.setattr(PackedWeight, "to", planted)


def left_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(rotary: Rotary, angles: torch.Tensor) -> RotaryTable:
        return RotaryTable(angles.cos(), angles.sin())

    monkeypatch.setattr(Rotary, "_table", planted)


@pytest.mark.parametrize("plant", [left_norm, left_scales, left_table])
def test_a_tensor_left_on_the_cpu_is_found(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with no_numbers():
        runner = make_fake_runner("0.5B", "int4")
        with pytest.raises(ValueError, match="tensors on cpu, cuda:0"):
            run_step(runner, STEPS["a token"]())
