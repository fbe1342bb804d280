"""The table of devices: each entry's backends exist, and a stranger's device is a row."""

from __future__ import annotations

import ast
import dataclasses
import sys
import types
from pathlib import Path

import pytest
import torch

from engine import device
from engine.attention import ATTENTION_BACKENDS
from engine.device import DEVICES, Device, detect_device, find_cpu, find_interpreted, resolve_dtype
from engine.layers import OPS
from engine.link.errors import StartError
from engine.link.registry import import_entry
from engine.sampling.grammar import MASKS
from engine.sampling.penalties import PENALTIES
from engine.sampling.sampler import SAMPLERS
from quant.kernels import MATRICES
from tests.unit.house import ROOT, source_files

NUM_GPUS = 3


@pytest.fixture
def pretended_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The GPUs that were chosen, on a machine that pretends to have some."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: NUM_GPUS)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    return chosen


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_names_keys_of_the_tables(
    name: str, pretended_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "IS_INTERPRETED", True)
    found: Device = import_entry(DEVICES, name, "device")(0)
    assert found.attention in ATTENTION_BACKENDS
    assert found.ops in OPS
    assert found.matrices in MATRICES
    assert found.sampler in SAMPLERS
    assert found.masks in MASKS
    assert found.penalties in PENALTIES


def test_each_rank_has_a_gpu_of_its_own(pretended_gpus: list[int]) -> None:
    assert detect_device(2).torch_device == torch.device("cuda", 2)
    assert pretended_gpus == [2]


def test_too_few_gpus_are_told_in_a_sentence(pretended_gpus: list[int]) -> None:
    with pytest.raises(StartError, match=r"shard 3 of this host has no GPU, torch sees 3: start at most 3 shards"):
        detect_device(NUM_GPUS)
    assert pretended_gpus == []


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)]
)
def test_old_gpus_run_in_float16(
    capability: tuple[int, int], dtype: torch.dtype, pretended_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = detect_device(0)
    assert resolve_dtype("auto", "bfloat16", gpu) == dtype
    assert resolve_dtype("float16", "bfloat16", gpu) == torch.float16
    if dtype == torch.float16:
        with pytest.raises(StartError, match="give --dtype float16"):
            resolve_dtype("bfloat16", "bfloat16", gpu)


def test_sums_stay_float32_on_a_gpu(pretended_gpus: list[int]) -> None:
    settings = torch.backends.cuda.matmul
    names = [f"allow_{name}_reduced_precision_reduction" for name in ("fp16", "bf16")]
    before = {name: getattr(settings, name) for name in names}
    detect_device(0)
    after = [getattr(settings, name) for name in names]
    for name, value in before.items():
        setattr(settings, name, value)
    assert after == [False, False]


@pytest.mark.parametrize(
    ("capability", "is_installed", "kernels"),
    [((8, 9), True, "triton"), ((8, 9), False, "torch"), ((7, 0), True, "torch")],
)
def test_a_gpu_runs_triton_kernels_where_it_can(
    capability: tuple[int, int],
    is_installed: bool,
    kernels: str,
    pretended_gpus: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: object() if is_installed else None)
    gpu = detect_device(0)
    assert (gpu.matrices, gpu.ops, gpu.attention) == (kernels, kernels, kernels)


def test_the_interpreter_is_never_taken_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_interpreted(0) is None
    monkeypatch.setattr(device, "IS_INTERPRETED", True)
    assert find_interpreted(0) is not None
    assert detect_device(0).attention == "cpu"


def test_a_device_may_be_asked_for(pretended_gpus: list[int]) -> None:
    assert detect_device(1, "cuda").torch_device == torch.device("cuda", 1)
    assert detect_device(1, "cpu").torch_device == torch.device("cpu")
    assert pretended_gpus == [1]


def test_a_device_that_is_not_there_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cpu")
    with pytest.raises(StartError, match=r"^--device cuda: torch 2.11.0\+cpu sees no GPU: install a build .* out$"):
        detect_device(0, "cuda")
    with pytest.raises(StartError, match=r"^--device interpreted: it is for tests, under TRITON_INTERPRET=1: leave"):
        detect_device(0, "interpreted")


def test_only_tests_get_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "IS_INTERPRETED", True)
    assert detect_device(0, "interpreted").attention == "triton"


@pytest.mark.parametrize(("kind", "is_told"), [("xpu", True), ("cpu", False)])
def test_an_accelerator_without_a_row_is_told(
    kind: str, is_told: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(kind))
    assert detect_device().torch_device == torch.device("cpu")
    told = "torch sees an accelerator of type xpu, which is not supported: cpu computes instead"
    assert (told in caplog.text) is is_told


def test_a_strangers_device_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("strange_device")
    strange = dataclasses.replace(find_cpu(0), attention="torch")
    vars(module)["find"] = lambda local_rank: strange if local_rank == 0 else None
    monkeypatch.setitem(sys.modules, "strange_device", module)
    monkeypatch.setattr(device, "DEVICES", {"strange": "strange_device:find", "cpu": DEVICES["cpu"]})
    assert detect_device(0) is strange
    assert detect_device(0, "strange") is strange
    with pytest.raises(StartError, match=r"^--device strange: this machine has none: leave --device out$"):
        detect_device(1, "strange")
    assert detect_device(1).attention == "cpu"


def test_a_machine_without_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "DEVICES", {"cuda": DEVICES["cuda"]})
    with pytest.raises(StartError, match=r"none of the devices that are supported: cuda$"):
        detect_device()


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_table_of_devices_says_cuda(path: Path) -> None:
    """Names of flags and fields are longer words."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    texts = {str(node.value).partition(":")[0] for node in nodes if isinstance(node, ast.Constant)}
    assert ("cuda" in attributes | texts) == (path == ROOT / "engine" / "device.py")
