"""Adapters of experts beside the model: every row has the ids of its own merged model, whoever is beside it.

The oracle is `transformers` with weights that the test has merged in float32; files of `peft` are in test_adapter.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.link.errors import StartError
from engine.link.messages import LoadAdapter
from quant.base import AdapterRows, LowRankKernel, LowRankShape, LowRankUpdate, RowGroups
from quant.kernels.low_rank_cpu import LowRankCpu
from quant.kernels.low_rank_torch import LowRankTorch
from quant.kernels.program_cpu import Program
from tests.contract.harness import random_ids, run_requests
from tests.contract.test_adapter import merged_by_hand
from tests.contract.test_lora import (
    check_batch,
    check_company,
    check_programs,
    check_shards,
    expected_ids,
    likeness_of_changes,
    replies_to,
    request_of,
    start,
    write_adapter,
)
from tests.tiny_model import write_tiny_qwen2_moe

ENDS = {
    "all": "proj mlp.gate shared_expert_gate".split(),
    "queries": ["3.up_proj", "q_proj"],
    "down": ["experts.0.down_proj", "experts.5.down_proj", "experts.5.gate_proj"],
}
"""Adapter -> the ends of the names of the modules that it changes: all, one expert, a part of some."""
RANKS = {"all": 4, "queries": 16, "down": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base model, its adapters, and the merged models, which are called `merged-NAME`."""
    root = tmp_path_factory.mktemp("experts")
    base = root / "base"
    write_tiny_qwen2_moe(base)
    names = [name.removesuffix(".weight") for name in load_file(base / "model.safetensors") if "layers" in name]
    found = {"base": base}
    for seed, (name, ends) in enumerate(ENDS.items()):
        modules = [module for module in names if module.endswith(tuple(ends))]
        found[name] = write_adapter(root / name, base, modules, rank=RANKS[name], seed=seed)
        scaling = dict.fromkeys(modules, 16 / RANKS[name])
        found[f"merged-{name}"] = merged_by_hand(base, found[name], root / f"merged-{name}", scaling)
    return found


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("is_staggered", [False, True])
def test_three_adapters_and_the_base_in_one_batch(folders: dict[str, Path], is_staggered: bool) -> None:
    check_batch(folders, is_staggered=is_staggered)


@pytest.mark.usefixtures("kernels")
def test_a_row_does_not_depend_on_its_company(folders: dict[str, Path]) -> None:
    check_company(folders)


@pytest.mark.usefixtures("kernels")
def test_steps_of_few_rows_are_programs(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    run = Program.run
    monkeypatch.setattr(Program, "run", lambda program, *args: called.append(program.names) or run(program, *args))
    core = start(folders, ["all"])
    run_requests(core, [request_of("r", random_ids(20), adapter="all")])
    # In both layers q/k/v, o, gate/up and down, of the dense block or the shared expert; in the second also two of the
    # experts and the router. The dense block and the shared expert have gates.
    changes = {"shrink": 11, "expand": 9, "expand_gated": 2, "_find_places": 2}
    assert {name: called[-1].count(name) for name in changes} == changes
    called.clear()
    run_requests(core, [request_of("r", random_ids(20), adapter=None)])
    assert "shrink" not in called[-1] and "_find_places" not in called[-1]


@pytest.mark.usefixtures("kernels")
def test_programs_give_the_bits_of_calls(folders: dict[str, Path]) -> None:
    check_programs(folders)


@pytest.mark.usefixtures("kernels")
def test_places_are_taken_over_and_blocks_kept_apart(folders: dict[str, Path]) -> None:
    """An adapter that leaves experts alone finds nothing of the last one's there."""
    core = start(folders, ["all", "queries", "down"], max_loras=1)
    prompt = random_ids(100, 5)
    for adapter, num_found in [("all", 0), ("down", 0), (None, 0), ("queries", 0), ("all", 99), ("down", 99)]:
        outcome = run_requests(core, [request_of("r", prompt, adapter=adapter)])
        assert outcome.token_ids == [expected_ids(folders, adapter, prompt)]
        assert outcome.most_cached_tokens == num_found


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("flags", [{"dtype": "bfloat16", "quantize": form} for form in ("int4", "eetq", None)])
def test_over_other_forms_of_the_base(folders: dict[str, Path], flags: dict[str, Any]) -> None:
    assert likeness_of_changes(folders, flags) > 0.9


@pytest.mark.parametrize(("size", "quantize"), [(2, None), (3, None), (2, "int8")])
def test_on_shards(size: int, quantize: str | None, folders: dict[str, Path]) -> None:
    """Each rank has its part of the changes; experts whose kernels round gather all inputs."""
    check_shards(size, quantize, folders, [*ENDS])


@pytest.mark.usefixtures("kernels")
def test_experts_have_memory_for_adapters_only_if_the_start_names_one_of_experts(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    plain = write_adapter(tmp_path / "plain", folders["base"], ["model.layers.0.self_attn.q_proj"], rank=16)
    without = start({**folders, "plain": plain}, ["plain"], is_lora_updating=True)
    with_experts = start({**folders, "plain": plain}, ["plain", "down"], is_lora_updating=True)
    late = LoadAdapter("late", str(folders["queries"]))
    (error,) = replies_to(without, late)
    assert error is not None and "and experts have no memory for adapters: name one that changes experts in" in error
    assert replies_to(with_experts, late) == [None]
    prompt = random_ids(20, 7)
    outcome = run_requests(with_experts, [request_of("r", prompt, adapter="late")])
    assert outcome.token_ids == [expected_ids(folders, "queries", prompt)]
    with pytest.raises(StartError, match=r"--max-loras \d+ of rank 16 take .* GB are free: lower --max-loras"):
        start(folders, ["queries"], max_loras=2**40)


@pytest.mark.parametrize("kernel_class", [LowRankCpu, LowRankTorch])
def test_each_row_has_the_change_of_its_adapter_and_its_expert(kernel_class: type[LowRankKernel]) -> None:
    check_changes_of_experts(kernel_class)


def check_changes_of_experts(kernel_class: type[LowRankKernel]) -> None:
    """Against float64. An adapter leaves some experts alone; a row of the step has none, one has several experts."""
    generator = torch.Generator().manual_seed(7)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    sizes, num_inputs, num_experts = [40, 24], 64, 3
    shape = LowRankShape(num_inputs, sizes, 2, 8, torch.float32, torch.device("cpu"), num_experts)
    step = AdapterRows(torch.tensor([1, 3, 0, 2]), torch.tensor([-1, 0, 1, 1]), [(0, 1, 2), (1, 2, 4)])
    slots_of_rows = [1, -1, 1, 0]
    matrices, sources = [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 3, 1, 2, 3]
    groups = RowGroups(*(torch.tensor(numbers, dtype=torch.int32) for numbers in ([0], [0], matrices, sources)))
    kernel = kernel_class(shape, step)
    updates: dict[int, list[LowRankUpdate | None]] = {}
    for place, ranks in enumerate([(8, 8), (3, 0), (0, 0), (1, 5), (0, 2), (8, 1)]):
        updates[place] = [
            LowRankUpdate(random(rank, num_inputs), random(size, rank), 0.5) if rank else None
            for rank, size in zip(ranks, sizes, strict=True)
        ]
        kernel.put(place, updates[place])
    x, y = random(len(matrices), num_inputs), random(len(matrices), sum(sizes))
    expected, result = y.double(), y.clone()
    for row, (matrix, source) in enumerate(zip(matrices, sources, strict=True)):
        place = slots_of_rows[source] * num_experts + matrix
        for first, update in zip((0, sizes[0]), updates.get(place, [None] * 2), strict=True):
            if update is not None:
                change = x[row].double() @ update.a.double().T @ update.b.double().T * update.scaling
                expected[row, first : first + len(update.b)] += change
    kernel.add_to(result, x, groups)
    torch.testing.assert_close(result, expected.float(), atol=1e-4, rtol=1e-4)
    unchanged = [row for row, source in enumerate(sources) if slots_of_rows[source] < 0]
    assert torch.equal(result[unchanged], y[unchanged])
