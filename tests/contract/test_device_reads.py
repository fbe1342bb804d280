"""Between the start of a step and its sampled ids nothing reads what the device has computed.

On a GPU each such read waits for all that was launched. `tests.no_reads` forbids it where the tensors lie in host
memory, or have no numbers.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.build import build_model
from engine.checkpoint.files import read_model_config
from engine.device import Device
from engine.layers.torch import TorchOps
from engine.link.messages import GenerationRequest, SamplingParams
from engine.runner import ModelRunner
from engine.sampling.sampler_torch import sample
from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.sequence import Sequence
from tests.contract.harness import KERNELS, random_ids
from tests.no_reads import READS, NoReads, ReadError, no_reads

__all__ = ["no_reads"]

REFERENCES = dataclasses.replace(KERNELS, attention="torch", ops="torch", matrices="torch")


def make_runner(folder: Path, device: Device) -> ModelRunner:
    runner = ModelRunner(build_model(read_model_config(folder), folder, torch.float32, device), device)
    runner.allocate(32, torch.float32, num_positions=256)
    return runner


def make_batch() -> ScheduledBatch:
    """A whole prompt that is scored, a chunk of one, a token with a draft of two."""
    batch = ScheduledBatch()
    for number, (num_computed, num_tokens, draft) in enumerate([(0, 70, []), (16, 20, []), (69, 1, [3, 4])]):
        request = GenerationRequest(
            request_id=f"r{number}",
            prompt_token_ids=random_ids(70, seed=number),
            max_new_tokens=1,
            has_prompt_logprobs=number == 0,
            has_prompt_ranks=number == 0,
        )
        sequence = Sequence(request, arrival_time=0.0)
        sequence.block_table = array("i", range(5 * number, 5 * number + 5))
        sequence.num_computed_tokens = num_computed
        batch.add(sequence, num_tokens, draft)
    return batch


def test_a_step_reads_nothing(
    tiny_model_dir: Path, no_reads: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(tiny_model_dir, KERNELS, no_reads, monkeypatch)  # CPU kernels take their arrays of tensors


@pytest.mark.parametrize("tiny_model_dir", ["qwen2", "qwen3"], indirect=True)
def test_the_references_read_nothing(
    tiny_model_dir: Path, no_reads: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference for the matrices of experts alone reads: how many rows each has."""
    check(tiny_model_dir, REFERENCES, lambda: no_reads("numpy", "cpu"), monkeypatch)


@pytest.mark.parametrize(
    ("tiny_model_dir", "has_reads"), [("qwen2", False), ("qwen2_moe", True)], indirect=["tiny_model_dir"]
)
def test_a_model_that_reads_has_no_graphs(tiny_model_dir: Path, has_reads: bool) -> None:
    reason = "the host reads how many rows each expert has"
    assert (reason in make_runner(tiny_model_dir, REFERENCES).why_no_graphs()) is has_reads
    assert reason not in make_runner(tiny_model_dir, KERNELS).why_no_graphs()


def check(folder: Path, device: Device, forbid: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a step after `forbid` as before it."""
    runner, batch = make_runner(folder, device), make_batch()
    expected = runner.execute(batch)
    assert len(expected.scores) == 2, "69 scored tokens are two pieces"
    forbid()
    with NoReads():
        result = runner.execute(batch)
    monkeypatch.undo()
    assert torch.equal(result.logits, expected.logits)
    assert result.copy_scores().read().tolist() == expected.copy_scores().read().tolist()


def test_the_reference_sampler_reads_its_result_once(
    no_reads: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One copy brings tokens, logprobs and whether they are finite; filters and draws read nothing before it."""
    filters = [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"typical_p": 0.5}, {"temperature": 0.3}]
    params = [SamplingParams(), *(SamplingParams(seed=7, **chosen) for chosen in filters)]
    logits = torch.randn(len(params), 3000, generator=torch.Generator().manual_seed(0))
    expected = sample(logits.clone(), params, range(len(params)))
    shapes: list[torch.Size] = []
    read = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> Any:
        shapes.append(tensor.shape)
        return read(tensor)

    no_reads("numpy", "cpu")
    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    with NoReads():
        result = sample(logits, params, range(len(params)))
    assert shapes == [(3, len(params))]
    assert result == expected


@pytest.mark.parametrize("fault", READS)
def test_a_planted_read_is_found(
    tiny_model_dir: Path, fault: str, no_reads: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, batch = make_runner(tiny_model_dir, REFERENCES), make_batch()
    silu_and_mul = TorchOps.silu_and_mul

    def planted(ops: TorchOps, gate_up: torch.Tensor) -> torch.Tensor:
        READS[fault](gate_up)
        return silu_and_mul(ops, gate_up)

    monkeypatch.setattr(TorchOps, "silu_and_mul", planted)
    no_reads("numpy", "cpu")
    with NoReads(), pytest.raises(ReadError):
        runner.execute(batch)
