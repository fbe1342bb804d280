"""Each kernel's time over its floor: matrices by tile and rows, adapters by rank and rows, attention by batch and
context."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.floors import QWEN2_7B
from benchmarks.gpu_proof.adapter_times import time_adapters
from benchmarks.gpu_proof.attention_times import time_attention
from benchmarks.gpu_proof.card import Ceilings, read_ceilings
from benchmarks.gpu_proof.clock import call_seconds
from benchmarks.gpu_proof.compiling import card_name, compile_all
from benchmarks.gpu_proof.inputs import Inputs
from benchmarks.gpu_proof.report import Report
from benchmarks.gpu_proof.settings import Settings
from benchmarks.gpu_proof.tiles import TUNED_ROWS, Product, best_tile, candidates, product_with, tuning_entry
from benchmarks.gpu_proof.weights import FORMS, Form, random_weight
from engine.device import DTYPES
from quant.base import PackedWeight
from quant.kernels import choose_kernel
from quant.kernels.launch import recorded_launches
from quant.kernels.skinny_triton import MAX_ROWS
from scripts.kernels_aot import CARDS

ROWS, TOY_ROWS = (1, 2, 3, 4, 8, 16, 32, 64, 128), (1, 3)
MAX_COPIES = 24
"""Weights that are read one after the other, so that none is in the cache when its turn comes again."""


@dataclasses.dataclass(frozen=True, slots=True)
class Matrix:
    """One of a layer's matrices, or the head."""

    name: str
    num_outputs: int
    num_inputs: int
    form_names: Sequence[str]


def matrices(*, is_toy: bool) -> list[Matrix]:
    forms = ["dense", "int8", "int4 in 128"]
    if is_toy:
        return [Matrix("small", 32, 128, forms)]
    names = "qkv o gate+up down".split()
    layers = [Matrix(name, *sizes, forms) for name, sizes in zip(names, QWEN2_7B.layer_matrices, strict=True)]
    return [*layers, Matrix("head", QWEN2_7B.vocabulary, QWEN2_7B.hidden, ["dense", "int8"])]


def run(settings: Settings, report: Report) -> None:
    torch.manual_seed(settings.seed)
    if not settings.is_interpreted:
        _compile_candidates(settings)  # before this process uses the card: its children could not use it then
    inputs = Inputs.of(settings)
    ceilings = read_ceilings(settings, inputs.device)
    entries: list[dict[str, Any]] = []
    for matrix in matrices(is_toy=settings.is_toy):
        _time_library(inputs, matrix, ceilings, report)
        for form_name in matrix.form_names:
            entries.append(_time_form(inputs, matrix, form_name, ceilings, report))
            report.fact(tuning=entries)
    time_attention(inputs, ceilings, report)
    time_adapters(inputs, ceilings, report)


def _compile_candidates(settings: Settings) -> None:
    """Compile every tile that will be timed on all cores, which one after the other would take minutes."""
    card = CARDS[card_name(settings)]
    with FakeTensorMode(allow_non_fake_inputs=True), recorded_launches() as launches:
        generator = torch.Generator()
        for matrix in matrices(is_toy=settings.is_toy):
            for form_name in matrix.form_names:
                form = FORMS[form_name]
                packed = _weight(matrix, form, card.dtype, generator)
                for tile in candidates(form, matrix.num_outputs, matrix.num_inputs, is_toy=settings.is_toy):
                    product = product_with(packed, form, tile)
                    for rows in ROWS:
                        if rows <= MAX_ROWS:
                            product(torch.empty(rows, matrix.num_inputs, dtype=card.dtype))
    distinct = list(dict.fromkeys(launches))
    num_failed = sum(result.resources is None for result in compile_all(distinct, card))
    print(f"{len(distinct)} kernels compiled, {num_failed} could not be", flush=True)


def _weight(matrix: Matrix, form: Form, dtype: torch.dtype, generator: torch.Generator) -> PackedWeight:
    packed = random_weight(form, matrix.num_outputs, matrix.num_inputs, dtype, generator)
    is_head = matrix.name == "head"
    return dataclasses.replace(packed, out_dtype=torch.float32) if is_head else packed


def _copies(inputs: Inputs, matrix: Matrix, form: Form, ceilings: Ceilings) -> list[PackedWeight]:
    """Weights that together are three times what the cache holds."""
    dtype = DTYPES[inputs.device.half_dtype]
    first = _weight(matrix, form, dtype, inputs.generator)
    count = 1 if inputs.is_toy else max(2, min(MAX_COPIES, -(-3 * ceilings.cache_bytes // weight_bytes(first))))
    return [first, *(_weight(matrix, form, dtype, inputs.generator) for _ in range(count - 1))]


def weight_bytes(packed: PackedWeight) -> int:
    """Bytes of all tensors of the weight."""
    tensors = (getattr(packed, field.name) for field in dataclasses.fields(packed))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def _time_library(inputs: Inputs, matrix: Matrix, ceilings: Ceilings, report: Report) -> None:
    """The product by torch's own library."""
    weights = _copies(inputs, matrix, FORMS["dense"], ceilings)
    products = [functools.partial(_library_product, packed) for packed in weights]
    rows = TOY_ROWS if inputs.is_toy else ROWS
    seconds = {count: _seconds(inputs, products, matrix.num_inputs, count, weights[0]) for count in rows}
    _report_row(report, matrix, "torch's library, dense", weights[0], seconds, ceilings)


def _library_product(packed: PackedWeight, x: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, packed.weight.T)


def _time_form(inputs: Inputs, matrix: Matrix, form_name: str, ceilings: Ceilings, report: Report) -> dict[str, Any]:
    """The form's times with its best tile; returns what the tuning data says of it."""
    form = FORMS[form_name]
    weights = _copies(inputs, matrix, form, ceilings)
    size = matrix.num_inputs
    tuned_rows = TUNED_ROWS[:1] if inputs.is_toy else TUNED_ROWS
    tried = {}
    for tile in candidates(form, matrix.num_outputs, size, is_toy=inputs.is_toy):
        products = [product_with(packed, form, tile) for packed in weights]
        try:
            tried[tile] = [_seconds(inputs, products, size, rows, weights[0]) for rows in tuned_rows]
        except Exception as error:  # a tile that the card has no room for is no fault, unless it is the default
            print(f"{matrix.name} {form_name} {tile}: {error}", flush=True)
    report.check(f"{matrix.name}, {form_name}: tiles run", [] if tried else ["no tile ran"])
    if not tried:
        raise RuntimeError(f"no tile of {matrix.name}, {form_name} ran")
    best = best_tile(tried)
    few = [product_with(packed, form, best) for packed in weights]
    many: list[Product] = [choose_kernel("triton", packed) for packed in weights]
    seconds = {
        rows: _seconds(inputs, few if rows <= MAX_ROWS else many, size, rows, weights[0])
        for rows in (TOY_ROWS if inputs.is_toy else ROWS)
    }
    _report_row(report, matrix, form_name, weights[0], seconds, ceilings, tile=_tile_text(best))
    return tuning_entry(form, matrix.num_outputs, size, best, inputs.device.architecture)


def _tile_text(tile: Any) -> str:
    return " ".join(f"{name.split('_')[-1]}={value}" for name, value in dataclasses.asdict(tile).items())


def _seconds(inputs: Inputs, products: Sequence[Product], num_inputs: int, rows: int, packed: PackedWeight) -> float:
    dtype = DTYPES[inputs.device.half_dtype]
    x = inputs.normal(rows, num_inputs, dtype=dtype)
    return call_seconds(inputs.device, [functools.partial(product, x) for product in products])


def _report_row(
    report: Report,
    matrix: Matrix,
    kernel: str,
    packed: PackedWeight,
    seconds: dict[int, float],
    ceilings: Ceilings,
    **columns: Any,
) -> None:
    """Each time's floor over it: 1 is as fast as the card can be."""
    moved, weights = weight_bytes(packed), matrix.num_outputs * matrix.num_inputs
    parts = {}
    for rows, time_s in seconds.items():
        num_bytes = moved + 2 * rows * (matrix.num_inputs + matrix.num_outputs)
        parts[f"{rows}"] = round(ceilings.floor_s(num_bytes, 2 * rows * weights) / time_s, 3)
    first = next(iter(seconds))
    report.row(
        "Matrices: floor over time, by rows",
        matrix=matrix.name,
        kernel=kernel,
        **{f"us at {first}": round(seconds[first] * 1e6, 1)},
        **parts,
        **columns,
    )
