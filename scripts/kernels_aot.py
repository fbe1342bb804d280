"""Compile the GPU kernels as a model would launch them, for cards that are not there, and hold them to their limits.

A layer, the head and the choice of tokens of each model run on tensors without numbers, which records the launches;
Triton compiles them for every architecture. Prints registers, spills and shared memory. Exit code 1 for a kernel that a
card can't run, one of decoding that spills, or a layer with more launches than are known.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.adapters import adaptable_matrices
from engine.attention.base import AttentionMetadata
from engine.attention.triton import TritonAttention
from engine.build import make_model
from engine.device import find_cpu
from engine.layers.base import RotaryTable, Rotation
from engine.link.messages import SamplingParams
from engine.models.base import CausalLM, Loadable
from engine.sampling.grammar import WORD_BITS
from engine.sampling.grammar_triton import apply_masks
from engine.sampling.penalties import Adjustments, GreenList, Places
from engine.sampling.penalties_triton import adjust_logits
from engine.sampling.sampler_triton import SPARE_PLACES, ChosenRows, make_specs
from quant.base import AdapterRows, LowRankShape, MatrixShard, PackedWeight
from quant.config import Quantization
from quant.dense import DenseMethod
from quant.kernels import make_low_rank_kernel
from quant.kernels.launch import ALIGNMENT, FP_FUSION, Launch, recorded_launches

KB = 1024
MAX_LAUNCHES_PER_LAYER = 10
"""Launches that a layer makes in a decode step."""
MAX_ADAPTER_LAUNCHES = 8
"""Launches that adapters add to those: two for each place where matrices have a common input."""
ADAPTER_RANKS = (16, 64)
NUM_SLOTS = 8
"""Adapters that there is memory for."""
GROUP_SIZE = 128
ASSEMBLERS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

MODELS: dict[str, tuple[int, int, int, int, int, bool]] = {
    "0.5B": (896, 4864, 14, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 4, 152_064, False),
    "72B": (8192, 29_568, 64, 8, 152_064, False),
}
"""Qwen2's sizes: hidden, inner, heads, key and value heads, vocabulary, whether the head is tied."""


@dataclasses.dataclass(frozen=True)
class Card:
    """An architecture and what it has for one program."""

    target: GPUTarget
    shared_bytes: int
    dtype: torch.dtype = torch.bfloat16
    may_spill: bool = False
    models: tuple[str, ...] = tuple(MODELS)


def cuda(capability: int, shared_kb: int, **changes: Any) -> Card:
    return Card(GPUTarget("cuda", capability, 32), shared_kb * KB, **changes)


FLOAT32: dict[str, Any] = {"dtype": torch.float32, "may_spill": True, "models": ("0.5B", "7B")}

CARDS: dict[str, Card] = {
    "sm_75": cuda(75, 64, dtype=torch.float16, may_spill=True),
    "sm_80": cuda(80, 163),
    "sm_86": cuda(86, 99),
    "sm_89": cuda(89, 99),
    "sm_90": cuda(90, 227),
    "sm_100": cuda(100, 227),
    "sm_120": cuda(120, 99),
    "gfx942": Card(GPUTarget("hip", "gfx942", 64), 64 * KB, may_spill=True),
    "gfx1100": Card(GPUTarget("hip", "gfx1100", 32), 64 * KB, may_spill=True),
    "float32-sm_75": cuda(75, 64, **FLOAT32),
    "float32-sm_80": cuda(80, 163, **FLOAT32),
    "float32-sm_89": cuda(89, 99, **FLOAT32),
    "float32-sm_90": cuda(90, 227, **FLOAT32),
}
"""Name -> card. With `--dtype float32`, which is for comparisons, kernels have to run, and may spill."""

FORMS = "dense int8 int4 act-order".split()
"""How the weights are stored; int4 in groups of `GROUP_SIZE`, with act-order the groups are scattered."""

Step = list[tuple[int, int]]
"""Query tokens and all tokens of each sequence."""

STEPS: dict[str, Step] = {
    "decode 1": [(1, 2000)],
    "decode 20": [(1, 300)] * 20,
    "decode 64": [(1, 300)] * 64,
    "drafts 8 x 5": [(5, 300)] * 8,
    "prompt": [(512, 512)],
}


@dataclasses.dataclass(frozen=True)
class FormMethod:
    """A `LinearMethod` whose weights have a form, and no numbers."""

    form: str
    orders: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    """By number of inputs; matrices with the same order are merged, as they are in checkpoints."""

    def param_specs(self, in_features: int, out_features: int, has_bias: bool) -> Mapping[str, Any]:
        return DenseMethod(torch.float32, computes_in_float32=False).param_specs(in_features, out_features, has_bias)

    def decides_order(self, name: str) -> bool:
        return False

    def pack(self, params: Mapping[str, torch.Tensor], shard: MatrixShard | None = None) -> PackedWeight:
        weight, bias = params["weight"], params.get("bias")
        num_outputs, num_inputs = weight.shape
        if self.form == "dense":
            return PackedWeight("dense", weight, bias)
        if self.form == "int8":
            zeros = torch.empty(num_outputs, 1, dtype=torch.int32)
            return PackedWeight("int8", weight.to(torch.int8), bias, torch.empty(num_outputs, 1), zeros)
        scales = torch.empty(num_outputs, num_inputs // GROUP_SIZE, dtype=torch.float16)
        order = self._order(num_inputs) if self.form == "act-order" else None
        pairs = torch.empty(num_outputs, num_inputs // 2, dtype=torch.uint8)
        return PackedWeight("int4", pairs, bias, scales, scales.to(torch.int8), order)

    def _order(self, num_inputs: int) -> torch.Tensor:
        if num_inputs not in self.orders:
            self.orders[num_inputs] = torch.empty(num_inputs, dtype=torch.int64)
        return self.orders[num_inputs]


def record_launches(
    model_name: str, form: str, dtype: torch.dtype, step: Step, num_layers: int = 1, rank: int | None = None
) -> list[Launch]:
    """Every launch of one step of a model with that many layers; `rank` is that of its rows' adapters, None: no row
    has one."""
    config = model_config(model_name, num_layers)
    method: Any = FormMethod(form)
    head: Any = FormMethod("dense" if form == "dense" else "int8")
    dense = DenseMethod(dtype, computes_in_float32=False)
    quantization = Quantization(form, dense, method, head, lambda module: None, "triton")
    device = dataclasses.replace(find_cpu(0), matrices="triton", ops="triton", computes_in_float32=False)
    model = make_model(config, quantization, dtype, device)
    with FakeTensorMode(allow_non_fake_inputs=True), recorded_launches() as launches:
        load_shapes(model, config, dtype, torch.device("cpu"))
        if rank is not None:
            have_adapters(model, dtype, rank, sum(num_queries for num_queries, _ in step))
        run_step(model, step, dtype)
    return launches


def model_config(model_name: str, num_layers: int = 1) -> dict[str, Any]:
    """The config.json of one of `MODELS`, with that many layers."""
    hidden, inner, heads, kv_heads, vocabulary, is_tied = MODELS[model_name]
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": num_layers,
        "vocab_size": vocabulary,
        "tie_word_embeddings": is_tied,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
    }


def matrix_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the matrices, by the last part of their names in checkpoints."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv_size = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    return {
        "q_proj": (hidden, hidden),
        "k_proj": (kv_size, hidden),
        "v_proj": (kv_size, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        "embed_tokens": (vocabulary, hidden),
        "lm_head": (vocabulary, hidden),
    }


def load_shapes(model: CausalLM, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """Give every layer tensors of the stored shapes, and let it move them to the device."""
    shapes = matrix_shapes(config)
    layers: dict[int, Loadable] = {}
    for prefix, (layer, part) in model.checkpoint_layers().items():
        shape = shapes.get(prefix.rpartition(".")[2], (config["hidden_size"],))
        for name in layer.missing(part):
            layer.load(name, part, torch.empty(shape if name == "weight" else shape[:1], dtype=dtype))
        layers[id(layer)] = layer
    for layer in layers.values():
        layer.finish(device)


def have_adapters(model: CausalLM, dtype: torch.dtype, rank: int, num_rows: int) -> None:
    """Let steps of so many rows have adapters in every matrix of the layers."""
    rows = AdapterRows(torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows, dtype=torch.int64))
    device = torch.device("cpu")
    for layer in {id(layer): layer for layer, _ in adaptable_matrices(model).values()}.values():
        layer.allocate_adapters(
            lambda num_inputs, num_outputs, *kind: make_low_rank_kernel(
                "triton", LowRankShape(num_inputs, num_outputs, NUM_SLOTS, rank, dtype, device, *kind), rows
            )
        )


def choose_tokens(logits: torch.Tensor) -> None:
    """Launch what comes between logits and ids: a repetition penalty, a watermark, a grammar, top tokens."""
    rows: Any = np.arange(len(logits))
    places = Places(rows, rows, penalties=np.ones(len(rows), np.float32))
    adjust_logits(logits, Adjustments([GreenList(0, rows)], 1.0, places))
    apply_masks(logits, rows, np.zeros((len(rows), -(-logits.shape[1] // WORD_BITS)), np.int32))
    params = [SamplingParams(seed=1, top_p=0.9, num_top_tokens=1)] * len(rows)
    ChosenRows.launch(logits, make_specs(params, rows.tolist(), None), None, 1 + SPARE_PLACES)


def run_step(model: CausalLM, sequences: Step, dtype: torch.dtype) -> None:
    """A forward pass, and a token after each sequence's last one."""
    backend: Any = TritonAttention(model.attention_shape, TritonAttention.block_sizes[0])
    caches = [backend.allocate(256, dtype, torch.device("cpu")) for _ in range(model.num_layers)]
    model.use_attention(backend, caches)
    starts, seq_lens = [0], [seq_len for _, seq_len in sequences]
    for num_queries, _ in sequences:
        starts.append(starts[-1] + num_queries)
    num_tokens, num_seqs = starts[-1], len(sequences)
    metadata = AttentionMetadata(
        query_start_loc=torch.empty(num_seqs + 1, dtype=torch.int32),
        seq_lens=torch.empty(num_seqs, dtype=torch.int32),
        block_table=torch.empty(num_seqs, 128, dtype=torch.int32),
        slot_mapping=torch.empty(num_tokens, dtype=torch.int64),
        work_items=torch.empty(backend.work_items(starts, seq_lens, 128).shape, dtype=torch.int32),
        host_query_start_loc=starts,
        host_seq_lens=seq_lens,
    )
    half = model.attention_shape.head_dim // 2
    table = RotaryTable(torch.empty(4096, half), torch.empty(4096, half))
    rows = torch.empty(num_tokens, dtype=torch.int64)
    hidden = model.forward(torch.empty_like(rows), Rotation(table, rows), backend.prepare(metadata))
    choose_tokens(model.compute_logits(hidden[:num_seqs].clone()))


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel takes."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


def compile_launch(launch: Launch, card: Card) -> Resources:
    """Compile for the card as Triton would at run time. Raises what the compiler raises."""
    names = [parameter.name for parameter in launch.kernel.params]
    constants, types = dict(launch.constants), dict(launch.signature)
    source = ASTSource(
        fn=launch.kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", ALIGNMENT]] for name in launch.aligned},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": FP_FUSION}
    compiled = triton.compile(source, target=card.target, options=options)
    shared_bytes = compiled.metadata.shared
    if card.target.backend == "cuda":
        return Resources(*_cuda_resources(compiled.asm["ptx"], card.target.arch), shared_bytes)
    text = compiled.asm["amdgcn"]
    spilled = 4 * (_number(r"\.vgpr_spill_count:\s*(\d+)", text) + _number(r"\.sgpr_spill_count:\s*(\d+)", text))
    return Resources(_number(r"\.vgpr_count:\s*(\d+)", text), spilled, shared_bytes)


def _cuda_resources(ptx: str, capability: int) -> tuple[int, int]:
    """Registers of a thread and the bytes that it spills, as the assembler tells them."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target, ptx[:200]
    assembler = ASSEMBLERS / ("ptxas-blackwell" if capability >= 90 else "ptxas")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        options = ["-lineinfo", "-v", "--regAllocOptLevel=2", f"--gpu-name={target[1]}"]  # as Triton gives them
        command = [str(assembler), *options, file.name, "-o", os.devnull]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return _number(r"Used (\d+) registers", text), _number(r"(\d+) bytes spill stores", text)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match, f"no {pattern} in {text[:200]}"
    return int(match[1])


def complaints_of(resources: Resources, card: Card, *, is_decoding: bool) -> list[str]:
    """Why a launch must not stay as it is."""
    complaints = []
    if resources.shared_bytes > card.shared_bytes:
        complaints.append(f"{resources.shared_bytes} bytes of shared memory, the card has {card.shared_bytes}")
    if resources.spilled_bytes and is_decoding and not card.may_spill:
        complaints.append(f"spills {resources.spilled_bytes} bytes")
    return complaints


def launch_complaints(num_launches: int, *, has_adapters: bool = False) -> list[str]:
    """Why a layer of a decode step must not have so many launches."""
    max_launches = MAX_LAUNCHES_PER_LAYER + (MAX_ADAPTER_LAUNCHES if has_adapters else 0)
    if num_launches > max_launches:
        return [f"{num_launches} launches a layer, at most {max_launches} are known"]
    return []


def launches_per_layer(model_name: str, form: str, dtype: torch.dtype, rank: int | None = None) -> int:
    """The launches of a layer of a decode step; `rank` as in `record_launches`."""
    step = STEPS["decode 1"]
    one, two = (len(record_launches(model_name, form, dtype, step, num_layers, rank)) for num_layers in (1, 2))
    return two - one


@dataclasses.dataclass(frozen=True)
class Job:
    """A distinct launch on one card."""

    card_name: str
    launch: Launch
    is_decoding: bool


def distinct_jobs(model_names: list[str], card_names: list[str]) -> Iterator[Job]:
    """Every distinct launch of the models in all forms and steps, for each card."""
    for name in card_names:
        card = CARDS[name]
        launches = distinct_launches(tuple(model for model in model_names if model in card.models), card.dtype)
        yield from (Job(name, launch, is_decoding) for launch, is_decoding in launches.items())


@functools.cache
def distinct_launches(model_names: tuple[str, ...], dtype: torch.dtype) -> dict[Launch, bool]:
    """Every distinct launch of the models in all forms and steps; whether decoding makes it."""
    decoding: dict[Launch, bool] = {}
    for model_name, form, step in itertools.product(model_names, FORMS, STEPS):
        for launch in record_launches(model_name, form, dtype, STEPS[step]):
            decoding[launch] = decoding.get(launch, False) or step != "prompt"
    for model_name, rank in itertools.product(model_names, ADAPTER_RANKS):  # rows and forms decide nothing
        decoding |= dict.fromkeys(record_launches(model_name, "dense", dtype, STEPS["decode 1"], rank=rank), True)
    return decoding


def label_of(launch: Launch) -> str:
    """The kernel and what it is compiled with."""
    sizes = " ".join(f"{name}={value}" for name, value in launch.constants if name.isupper())
    return f"{launch.name} warps={launch.num_warps} stages={launch.num_stages} {sizes}"


_jobs: list[Job] = []


def _run_job(index: int) -> tuple[str, list[str]]:
    """The line to print and the complaints; jobs are inherited by forked workers, since kernels can't be sent."""
    job = _jobs[index]
    card, launch = CARDS[job.card_name], job.launch
    label = f"{job.card_name} {label_of(launch)}"
    try:
        resources = compile_launch(launch, card)
    except Exception as error:  # whatever the compiler says, the other kernels are still of interest
        return label, [f"does not compile: {error}"]
    numbers = f"{resources.registers:4} registers {resources.spilled_bytes:5} spilled {resources.shared_bytes:7} shared"
    return f"{numbers}  {label}", complaints_of(resources, card, is_decoding=job.is_decoding)


def parse_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Names of models and of cards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables: dict[str, Mapping[str, Any]] = {"models": MODELS, "cards": CARDS}
    for name, table in tables.items():
        known = ", ".join(table)
        parser.add_argument(f"--{name}", default=",".join(table), help=f"some of {known}, separated by commas (all)")
    names = {name: value.split(",") for name, value in vars(parser.parse_args(arguments)).items()}
    for name, table in tables.items():
        if unknown := [value for value in names[name] if value not in table]:
            parser.error(f"--{name}: {', '.join(unknown)} not known: name some of {', '.join(table)}")
    return names["models"], names["cards"]


def main() -> int:
    model_names, card_names = parse_arguments(sys.argv[1:])
    num_failures = 0
    for model_name in model_names:
        for form in FORMS:
            num_launches = launches_per_layer(model_name, form, torch.bfloat16)
            print(f"{num_launches} launches a layer: {model_name} {form}")
            num_failures += len(launch_complaints(num_launches))
        num_launches = launches_per_layer(model_name, "dense", torch.bfloat16, ADAPTER_RANKS[0])
        print(f"{num_launches} launches a layer: {model_name} with adapters")
        num_failures += len(launch_complaints(num_launches, has_adapters=True))
    _jobs.extend(distinct_jobs(model_names, card_names))
    if not _jobs:
        print(f"nothing to compile: {', '.join(card_names)} take none of {', '.join(model_names)}")
        return 1
    with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        for line, complaints in pool.map(_run_job, range(len(_jobs))):
            print(line, *(f"\n  FAILED: {complaint}" for complaint in complaints), flush=True)
            num_failures += len(complaints)
    print(f"{len(_jobs)} kernels on {len(card_names)} cards, {num_failures} failures")
    return min(num_failures, 1)


if __name__ == "__main__":
    sys.exit(main())
