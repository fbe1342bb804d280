"""Weights go to the device layer by layer: how much of the host's memory a load takes does not depend on the layers."""

from __future__ import annotations

import gc
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from engine.build import choose_quantization, make_model
from engine.checkpoint.files import read_model_config
from engine.checkpoint.loader import load_weights
from engine.device import Device
from engine.models.base import CausalLM, CheckpointLayers, Loadable
from tests.tiny_model import write_tiny_gptq, write_tiny_qwen2
from tests.unit.test_seams import reference_device

GPU = torch.device("meta")
"""A stand-in for a device: what is moved to it leaves the host."""
NUM_LAYERS = 12
SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": NUM_LAYERS}


@pytest.fixture(autouse=True)
def only_new_objects() -> None:
    """Let the collector know the objects of this test alone: other tests leave a million, and dead ones among them.

    They stay frozen as those of `pytest_collection_finish` do, so that the tests that follow are as quick.
    """
    gc.collect()
    gc.freeze()


def host_bytes() -> int:
    """Bytes of all tensors of at least 4 KB in the host's memory that this test has made, each memory once."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for size in storages.values() if size >= 4096)


class WatchedWeights:
    """Weights that are made when they are read; notes the host's memory before each."""

    files: list[Path] = []

    def __init__(self, folder: Path) -> None:
        self._path = folder / "model.safetensors"
        self._shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in load_file(self._path).items()}
        self.largest = max(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self._shapes.values())
        self.layer_bytes = self._layer_bytes()
        self.before = host_bytes()
        self.peak = 0
        self.read_names: list[str] = []

    def _layer_bytes(self) -> int:
        sizes = [
            torch.Size(shape).numel() * dtype.itemsize
            for name, (shape, dtype) in self._shapes.items()
            if name.startswith("model.layers.0.")
        ]
        return sum(sizes)

    @property
    def names(self) -> list[str]:
        return sorted(self._shapes, key=lambda name: name.rpartition(".")[2])  # the layers lie all over the file

    def file(self, name: str) -> Path:
        return self._path

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name][0]

    def dtype(self, name: str) -> str:
        return {torch.float32: "F32", torch.float16: "F16", torch.int32: "I32"}[self._shapes[name][1]]

    def read(self, name: str, index: tuple[slice, ...] = (), *, is_kept: bool = False) -> torch.Tensor:
        assert not is_kept, "nothing of a file is used in place on another device"
        self.peak = max(self.peak, host_bytes() - self.before)
        self.read_names.append(name)
        with safe_open(self._path, "pt") as file:
            return cast(torch.Tensor, file.get_tensor(name).clone()[index])


class Postponed:
    """The planted fault: a layer that stays in the host's memory when it should go to the device."""

    def __init__(self, layer: Loadable) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def finish(self, device: torch.device) -> None:
        pass


class PostponedModel:
    def __init__(self, model: CausalLM) -> None:
        self.is_ignored = model.is_ignored
        self._layers = model.checkpoint_layers()

    def checkpoint_layers(self) -> CheckpointLayers:
        proxies = {id(layer): Postponed(layer) for layer, _ in self._layers.values()}
        return {prefix: (cast(Loadable, proxies[id(layer)]), part) for prefix, (layer, part) in self._layers.items()}


def load(folder: Path, flag: str | None, *, is_postponed: bool) -> WatchedWeights:
    """Load the folder's model onto the device."""
    config = read_model_config(folder)
    device: Device = reference_device(computes_in_float32=False)
    quantization = choose_quantization(config, folder, torch.float32, device, flag, None)
    model = make_model(config, quantization, torch.float32, device)
    weights = WatchedWeights(folder)
    load_weights(cast(CausalLM, PostponedModel(model)) if is_postponed else model, folder, weights, GPU)
    return weights


@pytest.mark.parametrize(
    ("write", "flag"), [(write_tiny_qwen2, None), (write_tiny_qwen2, "int8"), (write_tiny_gptq, None)]
)
def test_the_host_holds_two_layers_at_most(write: Callable[..., None], flag: str | None, tmp_path: Path) -> None:
    write(tmp_path, **SIZES)
    weights = load(tmp_path, flag, is_postponed=False)
    bound = 2 * weights.layer_bytes + weights.largest
    assert 0 < weights.peak <= bound
    assert load(tmp_path, flag, is_postponed=True).peak > bound, "the test sees what stays"


def test_what_decides_the_order_of_inputs_comes_first_and_then_layer_after_layer(tmp_path: Path) -> None:
    write_tiny_gptq(tmp_path, **SIZES)
    names = load(tmp_path, None, is_postponed=False).read_names
    first = [name for name in names if name.endswith(".g_idx")]
    assert names[: len(first)] == first and len(first) == 7 * NUM_LAYERS
    modules = [name.rpartition(".")[0] for name in names[len(first) :]]
    modules = [re.sub("(q|k|v)_proj", "qkv_proj", re.sub("(gate|up)_proj", "gate_up_proj", name)) for name in modules]
    assert len([*itertools.groupby(modules)]) == len(set(modules)), "a matrix is whole before the next one begins"
