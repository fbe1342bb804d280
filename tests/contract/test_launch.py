"""What a launch of a Triton kernel checks, and what of it is recorded where there is nothing to compute with."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.layers.triton import norm_kernel
from quant.kernels.launch import Launch, launch, recorded_launches
from quant.kernels.skinny_triton import sum_kernel


def record(num_rows: int, num_outputs: int, *, offset: int = 0) -> list[Launch]:
    with FakeTensorMode(), recorded_launches() as launches:
        partial = torch.empty(2 * num_rows * num_outputs + offset)[offset:]
        bias, out = torch.empty(num_outputs), torch.empty(num_rows, num_outputs)
        launch(
            sum_kernel,
            (1, num_rows),
            partial.view(2, num_rows, num_outputs),
            bias,
            out.half(),
            num_rows,
            num_outputs,
            HAS_BIAS=True,
            SPLITS=2,
            BLOCK=256,
        )
    return launches


def test_a_launch_is_recorded_as_the_compiler_sees_it() -> None:
    (recorded,) = record(16, 48)
    assert recorded.name == "sum_kernel"
    assert dict(recorded.signature) == {
        "partial_ptr": "*fp32",
        "bias_ptr": "*fp32",
        "out_ptr": "*fp16",
        "num_rows": "i32",
        "num_outputs": "i32",
    }
    assert recorded.aligned == {"partial_ptr", "bias_ptr", "out_ptr", "num_outputs"}, "the rows change in each step"
    assert dict(recorded.constants) == {"HAS_BIAS": True, "SPLITS": 2, "BLOCK": 256}


def test_integers_of_one_and_odd_addresses_are_specialized_as_triton_does() -> None:
    (recorded,) = record(1, 1, offset=1)
    assert dict(recorded.constants)["num_outputs"] == 1
    assert ("num_rows", "i32") in recorded.signature
    assert recorded.aligned == {"bias_ptr", "out_ptr"}


def test_nothing_is_recorded_for_no_rows_or_outside_of_a_recording() -> None:
    assert record(0, 16) == []
    with FakeTensorMode():
        x = torch.empty(2, 8)
        launch(norm_kernel, (2,), x, x, torch.empty(8), x, 1e-6, SIZE=8, BLOCK=8, HAS_X=False)


@pytest.mark.parametrize(
    ("weight", "complaint"),
    [
        (torch.empty(8, device="meta"), "norm_kernel: tensors on cpu, meta"),
        (torch.empty(8, dtype=torch.float64), "norm_kernel: no kernel takes torch.float64"),
        (torch.empty(16)[::2], r"norm_kernel: a tensor of shape \[8\] is not contiguous"),
    ],
    ids="device dtype holes".split(),
)
def test_tensors_that_a_kernel_would_misread_are_refused(weight: torch.Tensor, complaint: str) -> None:
    x = torch.empty(2, 8)
    with pytest.raises(ValueError, match=complaint):
        launch(norm_kernel, (2,), x, x, weight, x, 1e-6, SIZE=8, BLOCK=8, HAS_X=False)
