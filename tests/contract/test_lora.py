"""Adapters (LoRA) beside the model: every row of a step has the ids of its own merged model, whoever is beside it.

The oracle is `transformers` with weights that the test has merged in float32.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import msgspec
import numba
import pytest
import torch
from safetensors.torch import load_file, save_file

import engine.adapters
import engine.core
import engine.start
import server.client
from engine.build import build_model, choose_quantization, make_adapter_slots
from engine.checkpoint.adapter import AdapterWeights
from engine.checkpoint.files import read_model_config
from engine.core import UNLOADED_ERROR, EngineCore
from engine.link.config import EngineConfig
from engine.link.errors import StartError
from engine.link.ipc import EngineEndpoint
from engine.link.messages import AdapterReply, GenerationRequest, LoadAdapter, SamplingParams, UnloadAdapter
from engine.runner import ModelRunner, StepResult
from engine.scheduling.adapters import AdapterCache
from engine.scheduling.batch import ScheduledBatch
from engine.start import start_engine
from parallel.state import ParallelState
from quant.base import AdapterRows, LowRankKernel, LowRankShape, LowRankUpdate
from quant.kernels.low_rank_cpu import LowRankCpu
from quant.kernels.low_rank_torch import LowRankTorch
from quant.kernels.program_cpu import Program
from server.client import EngineClient
from tests.contract.harness import (
    KERNELS,
    make_sequence,
    oracle_greedy,
    oracle_logits,
    random_ids,
    run_requests,
    run_step,
)
from tests.contract.oracles import FAMILIES
from tests.contract.test_adapter import ATTENTION, MLP, merged_by_hand
from tests.tiny_model import write_tiny_gptq, write_tiny_qwen2
from tests.unit.parallel.threads import run_ranks
from tests.unit.server.harness import LIMITS

FIRST_MLP = [name.replace("layers.1", "layers.0") for name in MLP]
TARGETS = {
    "all": [*ATTENTION, *FIRST_MLP, *MLP],
    "queries": [name for name in ATTENTION if name.endswith(("q_proj", "v_proj"))],
    "down": [MLP[2]],
}
RANKS = {"all": 4, "queries": 16, "down": 3}
SCALINGS = {name: 16 / rank for name, rank in RANKS.items()}


def write_adapter(folder: Path, base: Path, modules: list[str], *, rank: int, seed: int = 0, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "lora_alpha": 16, "r": rank, "base_model_name_or_path": str(base), **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator, weights, tensors = torch.Generator().manual_seed(seed), load_file(base / "model.safetensors"), {}
    for module in modules:
        outputs, inputs = weights[f"{module}.weight"].shape
        for part, size in {"A": (rank, inputs), "B": (outputs, rank)}.items():
            tensors[f"base_model.model.{module}.lora_{part}.weight"] = torch.randn(size, generator=generator) / 8
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base model, its adapters, and the merged models, which are called `merged-NAME`."""
    root = tmp_path_factory.mktemp("lora")
    base = root / "base"
    write_tiny_qwen2(base, dtype=torch.float32)
    found = {"base": base}
    for seed, (name, modules) in enumerate(TARGETS.items()):
        found[name] = write_adapter(root / name, base, modules, rank=RANKS[name], seed=seed)
        scaling = dict.fromkeys(modules, SCALINGS[name])
        found[f"merged-{name}"] = merged_by_hand(base, found[name], root / f"merged-{name}", scaling)
    return found


def start(folders: dict[str, Path], names: list[str], **flags: Any) -> EngineCore:
    adapters = [(name, str(folders[name])) for name in names]
    fields = {"dtype": "float32", "max_batch_total_tokens": 1024, "num_threads": 1, **flags}
    return start_engine(EngineConfig(model_path=str(folders["base"]), lora_adapters=adapters, **fields))[0]


def request_of(name: str, prompt: list[int], *, adapter: str | None, num_tokens: int = 10) -> GenerationRequest:
    return GenerationRequest(
        request_id=name,
        prompt_token_ids=prompt,
        max_new_tokens=num_tokens,
        sampling=SamplingParams(),
        adapter_id=adapter,
    )


def expected_ids(folders: dict[str, Path], adapter: str | None, prompt: list[int], num_tokens: int = 10) -> list[int]:
    return oracle_greedy(folders["base" if adapter is None else f"merged-{adapter}"], prompt, num_tokens)[0]


MIXED: list[tuple[str | None, list[int]]] = [
    ("all", random_ids(40, 1)),
    (None, random_ids(40, 1)),
    ("queries", random_ids(40, 1)),
    ("down", random_ids(7, 2)),
    ("all", random_ids(3, 3)),
    (None, random_ids(70, 4)),
]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("is_staggered", [False, True])
def test_three_adapters_and_the_base_in_one_batch(folders: dict[str, Path], is_staggered: bool) -> None:
    check_batch(folders, is_staggered=is_staggered)


def check_batch(folders: dict[str, Path], *, is_staggered: bool) -> None:
    core = start(folders, ["all", "queries", "down"])
    requests = [request_of(f"r{i}", prompt, adapter=adapter) for i, (adapter, prompt) in enumerate(MIXED)]
    outcome = run_requests(core, requests, is_staggered=is_staggered)
    assert outcome.most_running > 3
    assert outcome.token_ids == [expected_ids(folders, *item) for item in MIXED]
    core.scheduler.check_integrity()


@pytest.mark.usefixtures("kernels")
def test_a_row_does_not_depend_on_its_company(folders: dict[str, Path]) -> None:
    """Alone a step is a program, with many rows it is none."""
    check_company(folders)


def check_company(folders: dict[str, Path]) -> None:
    """The bits of the logprobs, since ids may agree by chance."""
    core = start(folders, ["all", "queries", "down"], dtype="bfloat16", is_prefix_caching=False)
    crowd = [request_of(f"c{i}", random_ids(9, i), adapter=a) for i, a in enumerate(["all", None, "down", "all"] * 9)]
    for adapter, prompt in MIXED:
        request = request_of("mine", prompt, adapter=adapter)
        alone = run_requests(core, [request])
        for company in (crowd[:3], crowd):
            beside = run_requests(core, [*company, request])
            assert (beside.token_ids[-1], beside.logprobs[-1]) == (alone.token_ids[-1], alone.logprobs[-1])


@pytest.mark.usefixtures("kernels")
def test_a_step_without_adapters_makes_the_calls_of_a_server_without_them(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []
    run = Program.run
    monkeypatch.setattr(Program, "run", lambda program, *args: called.append(program.names) or run(program, *args))
    with_adapters, without = start(folders, ["all"]), start(folders, [])
    names = []
    for core, adapter in ((with_adapters, None), (without, None), (with_adapters, "all")):
        called.clear()
        run_requests(core, [request_of("r", random_ids(20), adapter=adapter)])
        names.append(called[-1])
    assert names[0] == names[1]
    changes = {"shrink": 8, "expand": 6, "expand_gated": 2}  # in two layers, of four products each
    assert {name: names[2].count(name) for name in changes} == changes
    assert [name for name in names[2] if name not in changes] == [name for name in names[0] if "_silu" not in name]


@pytest.mark.usefixtures("kernels")
def test_programs_give_the_bits_of_calls(folders: dict[str, Path]) -> None:
    check_programs(folders)


def check_programs(folders: dict[str, Path]) -> None:
    """Prompts of three adapters and of the base in chunks and whole, and tokens beside them."""
    logits: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for is_off, steps in logits.items():
        core = start(folders, ["all", "queries", "down"], max_batch_prefill_tokens=32, max_input_tokens=32)
        runner: Any = core.runner
        programs, execute = runner._programs, runner.execute
        programs.is_off = is_off

        def note(batch: ScheduledBatch, execute: Any = execute, steps: list[torch.Tensor] = steps) -> StepResult:
            result: StepResult = execute(batch)
            steps.append(result.logits.clone())
            return result

        runner.execute = note
        for size in (1, 3, 6):
            requests = [request_of(f"r{i}", ids, adapter=adapter) for i, (adapter, ids) in enumerate(MIXED[:size])]
            run_requests(core, requests, is_staggered=True)
        assert not programs.refusals
    assert {len(each) for each in logits[True]} >= {0, 1, 2, 3}
    for plain, repeated in zip(*logits.values(), strict=True):
        assert torch.equal(plain, repeated)
    # All rows have logits, some, none: each with adapters and without, the latter two from the warm-up.
    assert len(programs.programs) == 5


@pytest.mark.usefixtures("device")
def test_the_last_layer_has_the_changes_of_the_rows_that_it_computes(folders: dict[str, Path]) -> None:
    """Prompts of two adapters and of the base end in one step, then others of the same lengths in the next one."""
    core = start(folders, ["all", "down"], is_prefix_caching=False)
    for seed in (1, 2):
        items = [(a, random_ids(size, size + seed)) for a, size in [("down", 9), (None, 30), ("all", 17), ("down", 3)]]
        requests = [request_of(f"r{i}", ids, adapter=a, num_tokens=1) for i, (a, ids) in enumerate(items)]
        assert run_requests(core, requests).token_ids == [expected_ids(folders, *item, 1) for item in items]


@pytest.mark.usefixtures("device")
def test_a_scored_prompt_has_all_its_rows_after_one_that_needed_its_last(folders: dict[str, Path]) -> None:
    core = start(folders, ["all"], is_prefix_caching=False)
    for is_scored in (False, True):
        prompt = random_ids(20, int(is_scored))
        request = request_of("r", prompt, adapter="all", num_tokens=1)
        request = msgspec.structs.replace(request, has_prompt_logprobs=is_scored)
        assert run_requests(core, [request]).token_ids == [expected_ids(folders, "all", prompt, 1)]


@pytest.mark.usefixtures("device")
def test_a_prompt_in_equal_chunks_has_its_adapter_in_each(folders: dict[str, Path]) -> None:
    """The steps of the first chunks need no row at all behind the last layer's attention, and are alike otherwise."""
    core = start(folders, ["all"], max_batch_prefill_tokens=32, max_input_tokens=32, is_prefix_caching=False)
    prompt = random_ids(70, 4)
    assert run_requests(core, [request_of("r", prompt, adapter="all")]).token_ids == [
        expected_ids(folders, "all", prompt)
    ]


@pytest.mark.usefixtures("kernels")
def test_more_adapters_than_places_in_memory(folders: dict[str, Path]) -> None:
    """A sequence that waits for a place gets it once a running one has ended: first come, first served."""
    core = start(folders, ["all", "queries", "down"], max_loras=1)
    requests = [request_of(f"r{i}", prompt, adapter=adapter) for i, (adapter, prompt) in enumerate(MIXED)]
    outcome = run_requests(core, requests)
    assert outcome.token_ids == [expected_ids(folders, *item) for item in MIXED]
    assert core.scheduler.adapters.num_loads > 3


@pytest.mark.usefixtures("kernels")
def test_a_prompt_finds_the_blocks_of_its_own_adapter_alone(folders: dict[str, Path]) -> None:
    core = start(folders, ["all", "queries"])
    prompt = random_ids(100, 5)
    for adapter, num_found in [("all", 0), (None, 0), ("queries", 0), ("all", 99), (None, 99), ("queries", 99)]:
        outcome = run_requests(core, [request_of("r", prompt, adapter=adapter)])
        assert outcome.token_ids == [expected_ids(folders, adapter, prompt)]
        assert outcome.most_cached_tokens == num_found


@pytest.mark.usefixtures("kernels")
def test_each_matrix_that_is_read_is_a_sign_of_life(folders: dict[str, Path]) -> None:
    """When an adapter is opened, when its slot is filled, and when another one had its slot meanwhile."""
    config = EngineConfig(
        model_path=str(folders["base"]), max_loras=1, max_lora_rank=16, lora_adapters=[("all", str(folders["all"]))]
    )
    model = build_model(read_model_config(folders["base"]), folders["base"], torch.float32, KERNELS)
    slots = make_adapter_slots(config, model, torch.float32, KERNELS)
    beats: list[None] = []
    slots.beat = lambda: beats.append(None)
    slots.open(1, str(folders["queries"]))
    num_opening = len(beats)
    assert num_opening >= len(TARGETS["queries"])
    for number in 1, 0:
        assert slots.lacks([(0, number)])
        slots.begin_step([(0, number)], [0], [0, 1])
        assert not slots.lacks([(0, number)])
    num_layers = len(beats) - num_opening
    assert num_layers == 2 * 2 * 4  # twice, in two layers: queries with keys and values, outputs, gate with up, down


@pytest.mark.usefixtures("kernels")
async def test_a_disk_on_which_an_adapter_takes_long_is_not_taken_for_a_hang(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load, and a step that reads once more what had to make place, take longer than the silence of a hang."""
    monkeypatch.setattr(server.client, "WATCH_S", 0.02)
    monkeypatch.setattr(engine.core, "HEARTBEAT_S", 0.02)
    core = start(folders, [], is_lora_updating=True, max_loras=1)
    ours, theirs = socket.socketpair()
    endpoint, client, read = EngineEndpoint(theirs), EngineClient(ours, hung_silence_s=0.5), AdapterWeights.read

    def read_slowly(weights: AdapterWeights, module: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        time.sleep(0.06)
        return read(weights, module)

    async def ids_with(adapter: str) -> list[int]:
        with client.generate(request_of(adapter, random_ids(20, 7), adapter=adapter)) as events:
            return [token_id async for event in events for token_id in event.token_ids]

    endpoint.send(LIMITS)
    await client.connect()
    serving, watching = (
        asyncio.create_task(asyncio.to_thread(core.serve, endpoint)),
        asyncio.create_task(client.watch()),
    )
    monkeypatch.setattr(AdapterWeights, "read", read_slowly)
    try:
        for name in "all", "queries":
            assert await client.change_adapters(LoadAdapter(name, str(folders[name]))) == AdapterReply()
        for name in "all", "queries", "all":
            assert await ids_with(name) == expected_ids(folders, name, random_ids(20, 7))
        assert not watching.done()
    finally:
        await client.close()
        with pytest.raises(EOFError):
            await serving
        await watching
        theirs.close()


@pytest.mark.usefixtures("kernels")
def test_drafts_are_checked_with_the_adapter(folders: dict[str, Path]) -> None:
    core = start(folders, ["all"], max_draft_tokens=3)
    prompt = random_ids(12, 6) * 5
    outcome = run_requests(core, [request_of("r", prompt, adapter="all", num_tokens=30)])
    assert outcome.token_ids == [expected_ids(folders, "all", prompt, 30)]


def test_the_kernel_equals_the_reference_implementation() -> None:
    """Widths that fill no tile, ranks that fill no quad, matrices of a group that an adapter leaves alone."""
    generator = torch.Generator().manual_seed(7)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    sizes, num_inputs, ranks = [40, 24, 8], 64, [[16, 16, 16], [3, 0, 5], [0, 1, 0]]
    step = AdapterRows()
    shape = LowRankShape(num_inputs, sizes, len(ranks), 16, torch.float32, torch.device("cpu"))
    kernels: list[LowRankKernel] = [LowRankCpu(shape, step), LowRankTorch(shape, step)]
    for slot in (0, 1, 2, 1):  # a slot that held a larger rank has nothing left of it
        for slot_ranks in (ranks[0], ranks[slot]):
            updates = [
                LowRankUpdate(random(rank, num_inputs), random(size, rank), 0.5) if rank else None
                for rank, size in zip(slot_ranks, sizes, strict=True)
            ]
            for kernel in kernels:
                kernel.put(slot, updates)
    slots = torch.tensor([-1] * 3 + [0] * 70 + [1] * 5 + [2])
    slots_of_rows = slots[torch.randperm(len(slots), generator=generator)]
    step.rows, step.slots = slots_of_rows.argsort(stable=True), slots
    step.segments = [(0, 3, 73), (1, 73, 78), (2, 78, 79)]
    x, y = random(len(slots), num_inputs), random(len(slots), sum(sizes))
    results = [y.clone(), y.clone()]
    for kernel, result in zip(kernels, results, strict=True):
        kernel.add_to(result, x)
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    assert torch.equal(results[0][step.rows[:3]], y[step.rows[:3]])
    assert not torch.allclose(results[0], y)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("flags", [{"dtype": "bfloat16", "quantize": "int4"}, {"dtype": "bfloat16"}, {}])
def test_over_other_forms_of_the_base(folders: dict[str, Path], flags: dict[str, Any]) -> None:
    """The change is added beside the base's own product, so it is the same over any form of it."""
    assert likeness_of_changes(folders, flags) > 0.95


def likeness_of_changes(folders: dict[str, Path], flags: dict[str, Any]) -> float:
    """The cosine between what adapter `all` changes of a prompt's last logits, and what it does in float32."""
    core = start(folders, ["all"], **flags)
    prompt = random_ids(40, 1)
    logits = []
    for adapter in (None, "all"):
        core.take(request_of("r", prompt, adapter=adapter))
        logits.append(core.runner.execute(core.scheduler.schedule()).logits[0].clone())
        core.scheduler.abort("r")
    expected = [oracle_logits(folders[name], prompt)[-1] for name in ("base", "merged-all")]
    change, expected_change = logits[1] - logits[0], expected[1] - expected[0]
    return float(torch.nn.functional.cosine_similarity(change, expected_change, dim=0))


@pytest.mark.usefixtures("kernels")
def test_over_a_quantised_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    """In float32 ids are those of the matrices that the checkpoint stands for, with the changes added."""
    base = tmp_path / "gptq"
    write_tiny_gptq(base)
    plain = tmp_path / "plain"
    widen_gptq(base, plain)
    merged = merged_by_hand(plain, folders["all"], tmp_path / "merged", dict.fromkeys(TARGETS["all"], 4.0))
    core = start({**folders, "base": base}, ["all"])
    prompt = random_ids(30, 8)
    outcome = run_requests(core, [request_of("r", prompt, adapter="all"), request_of("b", prompt, adapter=None)])
    assert outcome.token_ids == [oracle_greedy(merged, prompt, 10)[0], oracle_greedy(plain, prompt, 10)[0]]


def widen_gptq(quantised: Path, folder: Path) -> None:
    """The checkpoint of `write_tiny_gptq` with its matrices in float32, and nothing else changed."""
    shutil.copytree(quantised, folder)
    weights = load_file(quantised / "model.safetensors")
    for name in [name for name in weights if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        packed, scales, groups = (weights.pop(f"{module}.{part}") for part in ("qweight", "scales", "g_idx"))
        del weights[f"{module}.qzeros"]
        q = (packed[:, None] >> torch.arange(0, 32, 4)[None, :, None]) & 15
        weights[f"{module}.weight"] = ((q.flatten(0, 1) - 8) * scales.float()[groups.long()]).T.contiguous()
    save_file({name: tensor.float() for name, tensor in weights.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))


@pytest.mark.parametrize(("size", "quantize"), [(2, None), (3, None), (2, "int8")])
def test_on_shards(size: int, quantize: str | None, folders: dict[str, Path]) -> None:
    """Each rank has its part of the changes; matrices whose kernels round gather all inputs."""
    check_shards(size, quantize, folders, [*TARGETS])


def check_shards(size: int, quantize: str | None, folders: dict[str, Path], names: list[str]) -> None:
    """A step of MIXED on some ranks has the logits of one."""
    base, dtype = folders["base"], torch.float32 if quantize is None else torch.bfloat16
    model_config = read_model_config(base)
    adapters = [(name, str(folders[name])) for name in names]
    config = EngineConfig(model_path=str(base), lora_adapters=adapters)

    def work(parallel: ParallelState) -> torch.Tensor:
        numba.set_num_threads(1)
        quantization = choose_quantization(model_config, base, dtype, KERNELS, quantize, None)
        model = build_model(model_config, base, dtype, KERNELS, quantization, parallel)
        runner = ModelRunner(model, KERNELS, make_adapter_slots(config, model, dtype, KERNELS))
        runner.allocate(16, KERNELS.kv_dtype(dtype), num_positions=256)
        sequences = [make_sequence(prompt[:30], [2 * i, 2 * i + 1]) for i, (_, prompt) in enumerate(MIXED)]
        cache = AdapterCache(len(names))
        for name in names:
            cache.add(name)
        for sequence, (name, _) in zip(sequences, MIXED, strict=True):
            sequence.adapter = None if name is None else cache.find(name)
        return run_step(runner, sequences, [len(sequence.token_ids) for sequence in sequences])

    [whole], (first, *others) = run_ranks(1, work), run_ranks(size, work)
    assert all(rows.shape[0] == 0 for rows in others)
    torch.testing.assert_close(first, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_adapters(tmp_path: Path, family: str) -> None:
    """In attention, dense MLPs, routers, shared experts and single ones."""
    base = tmp_path / "base"
    FAMILIES[family].write(base)
    weights = load_file(base / "model.safetensors")
    modules = [name.removesuffix(".weight") for name in weights if re.search(r"layers.*(proj|gate)\.weight$", name)]
    adapter = write_adapter(tmp_path / "adapter", base, modules, rank=4)
    merged = merged_by_hand(base, adapter, tmp_path / "merged", dict.fromkeys(modules, 4.0))
    prompt = random_ids(30, 9)
    outcome = run_requests(
        start({"base": base, "adapter": adapter}, ["adapter"]),
        [request_of("r", prompt, adapter="adapter"), request_of("b", prompt, adapter=None)],
    )
    assert outcome.token_ids == [oracle_greedy(folder, prompt, 10)[0] for folder in (merged, base)]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("modules", "flags", "sentence"),
    [
        (["lm_head"], {}, "changes lm_head, and beside the model only the matrices of its layers can be changed"),
        ([MLP[2]], {"max_lora_rank": 2}, "has rank 4, and there is memory for 2: start with --max-lora-rank 4"),
        (
            [MLP[2]],
            {"max_loras": 2**62},
            r"--max-loras 4\d+ of rank 4 take .* GB are free: lower --max-loras or --max-",
        ),
        ([MLP[2]], {"max_lora_rank": 2**40}, "--max-loras 8 of rank 1099511627776 take .* GB are free: lower --max-l"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_start(
    tmp_path: Path, modules: list[str], flags: dict[str, Any], sentence: str
) -> None:
    base = tmp_path / "base"
    write_tiny_qwen2(base, is_tied=False)
    adapter = write_adapter(tmp_path / "adapter", base, modules, rank=4)
    with pytest.raises(StartError, match=sentence):
        start({"base": base, "adapter": adapter}, ["adapter"], **flags)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"A": (4, 32), "B": (64, 4)}, r"by B \[64, 4\] and A \[4, 32\], the model has \[64, 64\]"),
        ({"A": (4, 64), "B": (64, 5)}, r"by B \[64, 5\] and A \[4, 64\], the model has \[64, 64\]"),
    ],
)
def test_an_adapter_of_matrices_of_another_size(
    folders: dict[str, Path], tmp_path: Path, tensors: dict[str, tuple[int, ...]], sentence: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", folders["base"], [], rank=4)
    stored = {f"{ATTENTION[0]}.lora_{part}.weight": torch.zeros(size) for part, size in tensors.items()}
    save_file(stored, adapter / "adapter_model.safetensors")
    with pytest.raises(StartError, match=sentence):
        start({**folders, "adapter": adapter}, ["adapter"])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("flag", ["--lora-adapters", "--model-id"])
def test_an_adapter_of_a_module_that_the_model_does_not_have(
    folders: dict[str, Path], tmp_path: Path, flag: str
) -> None:
    """No advice to merge what can't be merged either. A head that is the table can."""
    module = "model.layers.2.mlp.up_proj"
    adapter = write_adapter(tmp_path / "adapter", folders["base"], [], rank=4)
    half = {"A": torch.zeros(4, 64), "B": torch.zeros(96, 4)}
    save_file({f"{module}.lora_{part}.weight": x for part, x in half.items()}, adapter / "adapter_model.safetensors")
    if flag == "--model-id":
        with pytest.raises(StartError, match=f"changes {module}.weight, which its base model does not have"):
            start(folders, [], adapter_path=str(adapter))
        return
    with pytest.raises(StartError, match=f"changes {module}, which the model does not have: it says that it was made"):
        start({**folders, "adapter": adapter}, ["adapter"])
    half["B"] = torch.zeros(264, 4)
    save_file({f"lm_head.lora_{part}.weight": x for part, x in half.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(StartError, match="changes lm_head, and beside the model .* give the adapter as --model-id"):
        start({**folders, "adapter": adapter}, ["adapter"])


@pytest.mark.usefixtures("kernels")
def test_numbers_that_the_models_dtype_can_not_hold(folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", folders["base"], ATTENTION, rank=4)
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = 1e6
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(StartError, match=r"that torch\.float16 can't hold: start with --dtype bfloat16"):
        start({**folders, "adapter": adapter}, ["adapter"], dtype="float16")


@pytest.mark.usefixtures("kernels")
def test_an_adapter_with_values_that_are_no_numbers(folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", folders["base"], ATTENTION, rank=4)
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(StartError, match="has NaN or infinite values for model.layers"):
        start({**folders, "adapter": adapter}, ["adapter"])


def replies_to(core: EngineCore, *messages: LoadAdapter | UnloadAdapter) -> list[str | None]:
    """The errors of the replies."""
    for message in messages:
        core.take(message)
    core.close_unused_adapters()
    replies, core.replies = core.replies, []
    return [reply.error for reply in replies]


@pytest.mark.usefixtures("kernels")
def test_adapters_come_go_and_are_replaced_while_requests_run(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence has the adapter that its name meant when it came, to its end; files are closed after that."""
    monkeypatch.setattr(engine.adapters, "MAX_OPEN", 2)
    core = start(folders, [], is_lora_updating=True, max_loras=2)
    prompt, events = random_ids(20, 7), dict[str, list[int]]()

    def run(num_steps: int) -> None:
        while num_steps and core.has_work:
            num_steps -= 1
            for event in core.step():
                events.setdefault(event.request_id, []).extend(event.token_ids)

    copy = shutil.copytree(folders["all"], tmp_path / "copy")
    assert replies_to(core, LoadAdapter("x", str(copy))) == [None]
    shutil.rmtree(copy)
    core.take(request_of("former", prompt, adapter="x"))
    run(3)
    queries, down = (LoadAdapter(name, str(folders[name])) for name in ("queries", "down"))
    assert replies_to(core, LoadAdapter("x", queries.path)) == [None]
    core.take(request_of("latter", prompt, adapter="x"))
    run(3)
    assert replies_to(core, UnloadAdapter("x"), down) == [None, "2 adapters are open: unload one"]
    core.scheduler.preempt(core.scheduler.running[1])
    run(20)
    assert not core.has_work
    assert events == {
        "former": expected_ids(folders, "all", prompt),
        "latter": expected_ids(folders, "queries", prompt),
    }
    assert replies_to(core) == []
    assert replies_to(core, down, queries) == [None, None]
    for name in ("down", "queries"):
        outcome = run_requests(core, [request_of("r", prompt, adapter=name)])
        assert outcome.token_ids == [expected_ids(folders, name, prompt)]
    core.take(request_of("late", prompt, adapter="x"))
    assert [event.error for event in core.take_compiled()] == [UNLOADED_ERROR]
    monkeypatch.setattr(engine.adapters, "MAX_OPEN", 3)
    for error in (AttributeError("x"), MemoryError("x")):  # no check foresees these
        with monkeypatch.context() as patch:
            patch.setattr(engine.adapters, "AdapterWeights", Mock(side_effect=error))
            assert replies_to(core, down) == [f"{down.path} can't be used ({error!r}): fetch the adapter again"]


def change_file(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def change_config(text: str) -> Callable[[Path], None]:
    """`text`, members of a JSON object, comes after the others and counts."""
    return change_file("adapter_config.json", lambda content: content.strip()[:-1] + f", {text}}}".encode())


def change_a(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        name = next(name for name in tensors if "lora_A" in name)
        save_file({**tensors, name: change(tensors[name])}, folder / "adapter_model.safetensors")

    return write


def change_rank(rank: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        change_a(lambda a: a.repeat(-(-rank // len(a)), 1)[:rank].clone())(folder)
        change_config(f'"r": {rank}')(folder)

    return write


WEIGHTS = "adapter_model.safetensors"
BROKEN: list[tuple[Callable[[Path], None], str]] = [
    (lambda folder: (folder / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    (lambda folder: (folder / WEIGHTS).unlink() or (folder / WEIGHTS).mkdir(), f"has no {WEIGHTS}"),
    (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
    (change_file("adapter_config.json", lambda content: b"[]"), "is not a JSON object"),
    (change_file("adapter_config.json", lambda content: content[:-5]), "cannot be read"),
    (change_file(WEIGHTS, lambda content: b""), "is not a whole safetensors file"),
    (change_file(WEIGHTS, lambda content: content[:-9]), "is not a whole safetensors file"),
    (change_file(WEIGHTS, lambda content: b"\xff" * 8 + content[8:]), "is not a whole safetensors file"),
    (change_file(WEIGHTS, lambda content: content[:8] + b"?" + content[9:]), "is not a whole safetensors file"),
    (change_config('"peft_type": "\\ud800"'), "is an adapter of ?"),
    (change_config('"peft_type": ["LORA"]'), "is an adapter of"),
    (change_config('"lora_alpha": 1' + 400 * "0"), "cannot be used"),
    (change_config('"lora_alpha": 1' + 5000 * "0"), "cannot be read"),
    (change_config('"lora_alpha": 1e400'), "would be multiplied by inf"),
    (change_config('"lora_alpha": -1e40'), "would be multiplied by -2.5e+39"),
    (change_config('"lora_alpha": NaN'), "would be multiplied by nan"),
    (change_config('"lora_alpha": {}'), "cannot be used"),
    (change_config('"alpha_pattern": [1]'), "cannot be used"),
    (change_config('"alpha_pattern": {"(": 1}'), "cannot be used"),
    (change_config('"alpha_pattern": {"a{99999999999}": 1}'), "cannot be used"),
    (change_a(lambda a: a.sum()), "as F32 [], and an adapter is made of matrices in F32, F16, BF16"),
    (change_a(lambda a: a[0].clone()), "as F32 [64], and"),
    (change_a(lambda a: a[None].clone()), "as F32 [1, 4, 64], and"),
    (change_a(lambda a: a.to(torch.float8_e4m3fn)), "as F8_E4M3 [4, 64], and"),
    (change_a(lambda a: a.to(torch.int64)), "as I64 [4, 64], and"),
    (change_a(lambda a: a[:0].clone()), "matrices of rank 0, and adapter_config.json says 4"),
    (change_a(lambda a: a[:3].clone()), "they do not belong together"),
    (change_a(lambda a: a[:, :32].clone()), "they do not belong together, it says that it was made for "),
    (change_a(lambda a: a.repeat(5, 1)), "matrices of rank 20, and adapter_config.json says 4"),
    (change_rank(20), "has rank 20, and there is memory for 16"),
    (change_a(lambda a: a / 0), "has NaN or infinite values"),
]
NO_FOLDERS = ["a" * 300, "/proc/1/root/x", "/dev/null", "\0", "~", 2000 * "a/"]


@pytest.mark.usefixtures("kernels")
def test_what_can_not_be_loaded_is_told_in_a_sentence_and_ends_nothing(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(folders, ["down"], is_lora_updating=True, max_lora_rank=16)
    prompt = random_ids(20, 7)
    core.take(request_of("r", prompt, adapter="down"))
    ids = [token_id for event in core.step() for token_id in event.token_ids]
    cases = [("", "has no adapter_config.json")]  # the working directory
    cases += [(path, "there is no folder") for path in NO_FOLDERS]
    for number, (damage, sentence) in enumerate(BROKEN):
        folder = write_adapter(tmp_path / str(number), folders["base"], MLP[:1], rank=4)
        damage(folder)
        cases.append((str(folder), sentence))
    for path, sentence in cases:
        (error,) = replies_to(core, LoadAdapter("x", path))
        assert error is not None and sentence in error, (error, sentence)
        assert len(error.splitlines()) == 1
    monkeypatch.setattr(engine.adapters, "AdapterWeights", lambda folder: {}[folder])
    (error,) = replies_to(core, LoadAdapter("x", "/good"))
    assert error is not None and error.startswith("/good can't be used (KeyError")
    while core.has_work:
        ids += [token_id for event in core.step() for token_id in event.token_ids]
    assert ids == expected_ids(folders, "down", prompt)
    assert "x" not in core.scheduler.adapters
