"""Models cut for several ranks give the logits of one rank, in every layout and for the numbers of every Qwen2."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from _pytest.mark import ParameterSet
from safetensors.torch import load_file, save_file

from engine.attention.cpu import BLOCK_SIZE
from engine.build import build_model, choose_quantization, make_model
from engine.checkpoint.files import read_model_config
from engine.checkpoint.loader import load_weights
from engine.checkpoint.weights import open_weights
from engine.link.errors import StartError
from engine.runner import ModelRunner
from parallel.state import ParallelState
from quant import awq, gptq
from quant.config import resolve_quantization
from quant.dense import DenseMethod
from quant.kernels.bfloat16_cpu import Bfloat16Cpu
from quant.kernels.integer_cpu import FOUND
from quant.packing import pack_words
from quant.rounding import RoundedMatrix
from tests.contract.harness import KERNELS, make_sequence, run_step
from tests.contract.test_quantized_checkpoints import FOLDERS
from tests.diagonal import diagonal
from tests.tiny_model import CONFIG
from tests.unit.parallel.threads import run_ranks

HIDDEN = 256
VOCAB_SIZE = 523
"""A size that divides by none of the units."""
SIZES = (2, 3, 4, 7, 8)
PROMPT_LENGTHS = (5, 18, 11)

Tensors = dict[str, torch.Tensor]
FolderOf = Callable[[str, str], Path]


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen2's numbers of heads and groups."""

    num_heads: int
    num_kv_heads: int
    num_groups: int
    """Groups of intermediate features."""
    group_size: int = 64
    head_dim: int = 64
    is_tied: bool = False

    @property
    def intermediate_size(self) -> int:
        return self.num_groups * self.group_size


SHAPES = {
    "0.5B": Shape(14, 2, 38, group_size=128, is_tied=True),  # seven heads are three groups and a half
    "1.5B": Shape(12, 2, 70, is_tied=True),
    "7B": Shape(28, 4, 148),
    "72B": Shape(64, 8, 231),
}
FEW_SHAPES = ["0.5B", "7B"]
"""Few heads and many of them, tied and not; the slow tests have the other shapes.

A layout has one of them in float32 and the other as it is stored.
"""
PAIRS_OF_SIZES = {"3 and 8": (3, 8), "2 and 7": (2, 7), "3 and 4": (3, 4)}
FEW_SIZES = (3, 8)
"""Heads and groups divide by neither, and eight are more than there are KV heads; the slow tests have all sizes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """How the matrices of a checkpoint are stored and run."""

    stored: Callable[[int, int, int, torch.Generator], Tensors]
    """Outputs, inputs, group size -> tensors of one matrix, without a bias."""
    config: Callable[[int], dict[str, Any] | None] = lambda group_size: None
    """Group size -> quantization_config."""
    dtype: torch.dtype = torch.float16
    quantize: str | None = None
    has_unordered_groups: bool = False
    """Whether the inputs of a group are scattered over the matrix."""
    is_rounding: bool = True
    """Whether its kernels round activations, unless all is float32."""


def dense(dtype: torch.dtype, quantize: str | None = None) -> Layout:
    def stored(num_outputs: int, num_inputs: int, group_size: int, generator: torch.Generator) -> Tensors:
        weight = torch.randn(num_outputs, num_inputs, generator=generator).div_(num_inputs**0.5)
        return {"weight": weight.to(dtype)}

    return Layout(stored, dtype=dtype, quantize=quantize, is_rounding=quantize is not None)


def random_matrix(
    bits: int,
    num_outputs: int,
    num_inputs: int,
    group_size: int,
    generator: torch.Generator,
    *,
    is_symmetric: bool = False,
    has_unordered_groups: bool = False,
) -> RoundedMatrix:
    """Random stored tensors whose weights are as large as those of a dense model."""
    half, groups = 1 << (bits - 1), (num_outputs, num_inputs // group_size)
    spread = 0 if is_symmetric else half // 4
    zero_points = torch.randint(half - spread, half + spread + 1, groups, generator=generator)
    scales = torch.rand(groups, generator=generator).add_(0.5).div_(half * num_inputs**0.5 / 3**0.5)
    q = torch.randint(0, 2 * half, (num_outputs, num_inputs), generator=generator, dtype=torch.uint8)
    order = torch.randperm(num_inputs, generator=generator) if has_unordered_groups else torch.arange(num_inputs)
    return RoundedMatrix(bits, q, scales.to(torch.float16), zero_points.to(torch.int32), order // group_size)


def gptq_layout(bits: int, *, has_unordered_groups: bool = False) -> Layout:
    def stored(num_outputs: int, num_inputs: int, group_size: int, generator: torch.Generator) -> Tensors:
        matrix = random_matrix(
            bits, num_outputs, num_inputs, group_size, generator, has_unordered_groups=has_unordered_groups
        )
        return gptq.stored_tensors(matrix)

    def config(group_size: int) -> dict[str, Any]:
        return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": has_unordered_groups}

    return Layout(stored, config, has_unordered_groups=has_unordered_groups)


def awq_layout() -> Layout:
    def stored(num_outputs: int, num_inputs: int, group_size: int, generator: torch.Generator) -> Tensors:
        return awq.stored_tensors(random_matrix(4, num_outputs, num_inputs, group_size, generator))

    def config(group_size: int) -> dict[str, Any]:
        return {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm"}

    return Layout(stored, config)


def compressed_tensors_layout(*, is_symmetric: bool) -> Layout:
    def stored(num_outputs: int, num_inputs: int, group_size: int, generator: torch.Generator) -> Tensors:
        matrix = random_matrix(4, num_outputs, num_inputs, group_size, generator, is_symmetric=is_symmetric)
        tensors = {
            "weight_packed": pack_words(matrix.q, 4, dim=1),
            "weight_scale": matrix.scales,
            "weight_shape": torch.tensor([num_outputs, num_inputs]),
        }
        if not is_symmetric:
            tensors["weight_zero_point"] = pack_words(matrix.zero_points, 4, dim=0)
        return tensors

    def config(group_size: int) -> dict[str, Any]:
        weights = {
            "num_bits": 4,
            "type": "int",
            "strategy": "group",
            "group_size": group_size,
            "symmetric": is_symmetric,
        }
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}

    return Layout(stored, config)


def fp8_layout() -> Layout:
    """Blocks of the group size in both directions, as Qwen's own FP8 checkpoints have them."""

    def stored(num_outputs: int, num_inputs: int, group_size: int, generator: torch.Generator) -> Tensors:
        weight = torch.randn(num_outputs, num_inputs, generator=generator)
        blocks = -(-num_outputs // group_size), -(-num_inputs // group_size)
        scales = torch.rand(blocks, generator=generator).add_(0.5).div_(16 * num_inputs**0.5)
        return {"weight": weight.mul_(16).to(torch.float8_e4m3fn), "weight_scale_inv": scales.to(torch.bfloat16)}

    def config(group_size: int) -> dict[str, Any]:
        block = [group_size, group_size]
        return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}

    return Layout(stored, config, dtype=torch.bfloat16, is_rounding=False)


def w8a8_layout() -> Layout:
    """Integers with a scale for each output, as llm-compressor's W8A8 has them."""

    def stored(num_outputs: int, num_inputs: int, group_size: int, generator: torch.Generator) -> Tensors:
        weight = torch.randint(-127, 128, (num_outputs, num_inputs), generator=generator, dtype=torch.int8)
        scales = torch.rand((num_outputs, 1), generator=generator).add_(0.5).div_(128 * num_inputs**0.5 / 3**0.5)
        return {"weight": weight, "weight_scale": scales.to(torch.bfloat16)}

    def config(group_size: int) -> dict[str, Any]:
        integers = {"num_bits": 8, "type": "int", "group_size": None, "block_structure": None, "symmetric": True}
        weights, inputs = {**integers, "strategy": "channel"}, {**integers, "strategy": "token", "dynamic": True}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
        return {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups}

    return Layout(stored, config, dtype=torch.bfloat16)


LAYOUTS = {
    "float32": dense(torch.float32),
    "bfloat16": dense(torch.bfloat16),
    "int8 on load": dense(torch.bfloat16, "int8"),
    "int4 on load": dense(torch.bfloat16, "int4"),
    "gptq 4 bits": gptq_layout(4),
    "gptq 4 bits, scattered": gptq_layout(4, has_unordered_groups=True),
    "gptq 3 bits": gptq_layout(3),
    "gptq 8 bits": gptq_layout(8),
    "awq": awq_layout(),
    "compressed-tensors": compressed_tensors_layout(is_symmetric=False),
    "compressed-tensors, symmetric": compressed_tensors_layout(is_symmetric=True),
    "fp8": fp8_layout(),
    "w8a8": w8a8_layout(),
}
QUANTIZED = [name for name in LAYOUTS if name not in ("float32", "bfloat16")]


def write_model(folder: Path, shape: Shape, layout: Layout) -> None:
    """One layer. Matrices of quantised checkpoints have biases where Qwen2 has none, as AutoGPTQ writes them."""
    quantization = layout.config(shape.group_size)
    config = {
        **CONFIG,
        "hidden_size": HIDDEN,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "num_hidden_layers": 1,
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": shape.is_tied,
        "torch_dtype": str(layout.dtype).removeprefix("torch."),
        **({"quantization_config": quantization} if quantization else {}),
    }
    generator = torch.Generator().manual_seed(0)

    def vector(size: int, mean: float) -> torch.Tensor:
        return torch.randn(size, generator=generator).mul_(0.3).add_(mean).to(layout.dtype)

    def table() -> torch.Tensor:
        return torch.randn(VOCAB_SIZE, HIDDEN, generator=generator).div_(HIDDEN**0.5).to(layout.dtype)

    tensors = {"model.embed_tokens.weight": table(), "model.norm.weight": vector(HIDDEN, 1)}
    if not shape.is_tied:
        tensors["lm_head.weight"] = table()
    prefix = "model.layers.0"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}.{norm}.weight"] = vector(HIDDEN, 1)
    heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    for name, num_outputs, num_inputs in (
        ("self_attn.q_proj", heads, HIDDEN),
        ("self_attn.k_proj", kv_heads, HIDDEN),
        ("self_attn.v_proj", kv_heads, HIDDEN),
        ("self_attn.o_proj", HIDDEN, heads),
        ("mlp.gate_proj", shape.intermediate_size, HIDDEN),
        ("mlp.up_proj", shape.intermediate_size, HIDDEN),
        ("mlp.down_proj", HIDDEN, shape.intermediate_size),
    ):
        matrix = layout.stored(num_outputs, num_inputs, shape.group_size, generator)
        if name[-6:] in ("q_proj", "k_proj", "v_proj") or (quantization and num_outputs == HIDDEN):
            matrix["bias"] = vector(num_outputs, 0)
        tensors |= {f"{prefix}.{name}.{leaf}": tensor.contiguous() for leaf, tensor in matrix.items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    """Shape and layout -> the model's folder, which is written once."""
    root = tmp_path_factory.mktemp("sharded")

    def write(shape: str, layout: str) -> Path:
        folder = root / f"{shape} {layout}"
        if not folder.exists():
            write_model(folder, SHAPES[shape], LAYOUTS[layout])
        return folder

    return write


def make_runner(
    folder: Path, dtype: torch.dtype, quantize: str | None, parallel: ParallelState, *, is_bfloat16: bool = False
) -> ModelRunner:
    config = read_model_config(folder)
    quantization = choose_quantization(config, folder, dtype, KERNELS, quantize, None, is_bfloat16=is_bfloat16)
    runner = ModelRunner(build_model(config, folder, dtype, KERNELS, quantization, parallel), KERNELS)
    runner.allocate(16, KERNELS.kv_dtype(dtype), num_positions=16 * BLOCK_SIZE)
    return runner


def run_batches(runner: ModelRunner, vocab_size: int) -> torch.Tensor:
    """Logits of batches of one, two and three prompts of different lengths: the prompts in one step, then two more."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for batch_size in (1, 2, 3):
        ids = [torch.randint(vocab_size, (size + 2,), generator=generator).tolist() for size in PROMPT_LENGTHS]
        sequences = [
            make_sequence(ids[number][:size], [3 * number, 3 * number + 1])
            for number, size in enumerate(PROMPT_LENGTHS[:batch_size])
        ]
        rows.append(run_step(runner, sequences, [len(sequence.token_ids) for sequence in sequences]))
        for step in range(2):
            for sequence, all_ids, size in zip(sequences, ids, PROMPT_LENGTHS, strict=False):
                sequence.token_ids.append(all_ids[size + step])
            rows.append(run_step(runner, sequences, [1] * batch_size))
    return torch.cat(rows)


def logits_of(
    folder: Path,
    dtype: torch.dtype,
    quantize: str | None,
    size: int,
    vocab_size: int = VOCAB_SIZE,
    *,
    is_bfloat16: bool = False,
) -> torch.Tensor:
    """The logits that rank 0 of `size` ranks computes. The others have no rows."""

    def run(parallel: ParallelState) -> torch.Tensor:
        numba.set_num_threads(1)
        return run_batches(make_runner(folder, dtype, quantize, parallel, is_bfloat16=is_bfloat16), vocab_size)

    first, *others = run_ranks(size, run)
    assert first.shape == (3 * (1 + 2 + 3), vocab_size)
    assert all(rows.shape == (0, vocab_size) for rows in others)
    return first


def distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, over the spread of the logits."""
    return ((logits - expected).abs().max() / (expected.max() - expected.min())).item()


@pytest.mark.parametrize(("layout", "shape", "sizes"), diagonal([*LAYOUTS], FEW_SHAPES, PAIRS_OF_SIZES))
def test_float32(layout: str, shape: str, sizes: tuple[int, ...], folder_of: FolderOf) -> None:
    check_float32(folder_of(shape, layout), layout, sizes)


def check_float32(folder: Path, layout: str, sizes: tuple[int, ...]) -> None:
    """In float32 so many ranks give the logits of one rank."""
    quantize = LAYOUTS[layout].quantize
    whole = logits_of(folder, torch.float32, quantize, 1)
    for size in sizes:
        logits = logits_of(folder, torch.float32, quantize, size)
        if LAYOUTS[layout].has_unordered_groups:
            assert torch.equal(logits, whole), "all inputs are gathered, and each output is the sum of one rank"
        assert distance(logits, whole) < 3e-6


@pytest.mark.parametrize(("layout", "shape"), diagonal(["bfloat16", *QUANTIZED], FEW_SHAPES))
def test_as_stored(layout: str, shape: str, folder_of: FolderOf) -> None:
    check_as_stored(folder_of(shape, layout), layout, FEW_SIZES)


def check_as_stored(folder: Path, layout: str, sizes: tuple[int, ...]) -> None:
    """In the dtype of the checkpoint so many ranks give the logits of one rank, or its bits."""
    quantize, dtype = LAYOUTS[layout].quantize, LAYOUTS[layout].dtype
    whole = logits_of(folder, dtype, quantize, 1)
    for size in sizes:
        logits = logits_of(folder, dtype, quantize, size)
        if LAYOUTS[layout].is_rounding and FOUND is not None:
            assert torch.equal(logits, whole), "where activations are rounded all inputs are gathered"
        assert distance(logits, whole) < 3e-6


@pytest.mark.skipif(Bfloat16Cpu.rounding is None, reason="the processor has no AVX-512")
@pytest.mark.parametrize("shape", SHAPES)
def test_rounded_to_bfloat16(shape: str, folder_of: FolderOf) -> None:
    folder = folder_of(shape, "bfloat16")
    whole = logits_of(folder, torch.bfloat16, None, 1, is_bfloat16=True)
    assert distance(logits_of(folder, torch.bfloat16, None, 1), whole) > 1e-5, "something is rounded"
    for size in SIZES:
        assert torch.equal(logits_of(folder, torch.bfloat16, None, size, is_bfloat16=True), whole)


BIASED = ["gptq 4 bits", "gptq 4 bits, scattered", "gptq 8 bits", "awq", "compressed-tensors"]


@pytest.mark.parametrize("layout", BIASED)
def test_the_biases_of_matrices_whose_inputs_are_cut_matter(layout: str, folder_of: FolderOf, tmp_path: Path) -> None:
    folder = folder_of("0.5B", layout)
    tensors = load_file(folder / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        bias = tensors[f"model.layers.0.{name}.bias"]
        assert bias.count_nonzero() > 0.9 * HIDDEN
        bias.zero_()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with_bias, without = (logits_of(path, torch.float32, None, 1) for path in (folder, tmp_path))
    assert distance(with_bias, without) > 0.01, "so a bias that is added twice, or never, shows in the tests above"


def is_within_words(folder: Path) -> bool:
    """Whether heads of these tiny models end within the words that their outputs are packed in."""
    return "3bit" in folder.name or "w3" in folder.name


def cuts() -> list[ParameterSet]:
    """Each checkpoint for 2 or 3 ranks; those with experts, each of which is some kernels more to compile, are long."""
    folders = {folder.name: folder for folder in FOLDERS if not is_within_words(folder)}
    dense = {name: folder for name, folder in folders.items() if "moe" not in name}
    sparse = [folder for name, folder in folders.items() if name not in dense]
    marked = [pytest.param(folder, size, marks=pytest.mark.long) for folder in sparse for size in (2, 3)]
    return [*diagonal(dense, [2, 3]), *marked]


@pytest.mark.parametrize(("folder", "size"), cuts())
def test_checkpoints_that_the_real_tools_wrote(folder: Path, size: int) -> None:
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    whole = logits_of(folder, torch.float32, None, 1, vocab_size)
    assert distance(logits_of(folder, torch.float32, None, size, vocab_size), whole) < 3e-6
    whole = logits_of(folder, torch.float16, None, 1, vocab_size)
    logits = logits_of(folder, torch.float16, None, size, vocab_size)
    if FOUND is None:  # nothing is rounded
        assert distance(logits, whole) < 1e-3
    else:
        assert torch.equal(logits, whole)


@pytest.mark.parametrize("folder", [*filter(is_within_words, FOLDERS)], ids=lambda folder: folder.name)
def test_heads_that_end_within_a_word_are_refused(folder: Path) -> None:
    sizes = "1 or 2" if folder.name.startswith("llmcompressor") else "1"  # that one packs weights along the inputs only
    message = "the model can't be cut for 4 shards: 64 quantised features can't be cut at .* within a word: start with"
    with pytest.raises(StartError, match=f"{message} --num-shard {sizes}$"):
        make_runner(folder, torch.float32, None, ParallelState(3, 4))


def make_tiny(size: int, rank: int = 0, **changes: Any) -> None:
    config = {**CONFIG, "tie_word_embeddings": True, **changes}
    dense_method = DenseMethod(torch.float32, computes_in_float32=True)
    names = [f"model.layers.{layer}.self_attn.{name}_proj.qweight" for layer in range(2) for name in "qkvo"]
    stored = config.get("quantization_config")
    quantization = resolve_quantization(
        None, None, stored, names if stored else (), dense_method, matrices="cpu", is_exact=True
    )
    make_model(config, quantization, torch.float32, KERNELS, ParallelState(rank, size))


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (
            5,
            {},
            "the model can't be cut for 5 shards: 4 heads in 2 groups of 2 are too few for 5 shards: the largest count "
            "is 4: start with --num-shard 1 or 2 or 3 or 4",
        ),
        (
            8,
            {"num_attention_heads": 8, "intermediate_size": 24},
            "the model can't be cut for 8 shards: 24 can't be split over 8 shards in units of 64 or 32 or 16 or 8: "
            "start with --num-shard 1 or 2 or 3",
        ),
        (
            4,
            {"vocab_size": 3},
            "the model can't be cut for 4 shards: 3 in units of 1 are too few for 4 shards: start with --num-shard 1 "
            "or 2 or 3",
        ),
        (
            2,
            {"num_key_value_heads": 3},
            "the model can't be cut for 2 shards: 4 heads don't divide into 3 groups: correct config.json",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_with_what_can(size: int, changes: dict[str, Any], message: str) -> None:
    for rank in range(size):
        with pytest.raises(StartError) as error:
            make_tiny(size, rank, **changes)
        assert str(error.value) == message


def test_the_counts_that_are_offered_can_be_cut_for_every_rank() -> None:
    """Over 3 ranks the first has two heads and ends with a word, the second has one and does not."""
    quantization = {"quant_method": "gptq", "bits": 3, "group_size": 32}
    with pytest.raises(StartError, match="within a word: start with --num-shard 1 or 2$"):
        make_tiny(4, num_key_value_heads=4, quantization_config=quantization)
    make_tiny(3, num_key_value_heads=4, quantization_config=quantization)
    with pytest.raises(StartError, match="for 3 shards: .* within a word"):
        make_tiny(3, 1, num_key_value_heads=4, quantization_config=quantization)


def test_an_intermediate_size_of_any_number_is_no_matter_for_one_rank() -> None:
    make_tiny(1, intermediate_size=20)


def test_int4_on_load_where_shares_end_within_a_group(tmp_path: Path) -> None:
    """Heads of 32 and groups of 64: a rank with one head has groups of 32, which lose no more."""
    layout = LAYOUTS["int4 on load"]
    write_model(tmp_path, Shape(6, 2, 6, head_dim=32), layout)
    exact = logits_of(tmp_path, torch.float32, None, 1)
    whole = logits_of(tmp_path, torch.float32, "int4", 1)
    for size in (2, 3, 4, 6):
        logits = logits_of(tmp_path, torch.float32, "int4", size)
        assert (logits - exact).norm() < 1.05 * (whole - exact).norm()


def bytes_read(folder: Path, size: int) -> list[dict[str, int]]:
    """For each rank, how much of which tensor it takes in."""

    def run(parallel: ParallelState) -> dict[str, int]:
        config = read_model_config(folder)
        quantization = choose_quantization(config, folder, torch.float32, KERNELS, None, None)
        model = make_model(config, quantization, torch.float32, KERNELS, parallel)
        counts: dict[str, int] = {}
        layers = model.checkpoint_layers()
        prefixes = {(id(layer), part): prefix for prefix, (layer, part) in layers.items()}
        for layer in {id(layer): layer for layer, _ in layers.values()}.values():

            def load(
                name: str, part: int, tensor: torch.Tensor, layer: Any = layer, original: Any = layer.load
            ) -> None:
                counts[f"{prefixes[id(layer), part]}.{name}"] = tensor.nbytes
                original(name, part, tensor)

            layer.load = load  # type: ignore[method-assign]
        load_weights(model, folder, open_weights(folder), KERNELS.torch_device, size)
        return counts

    return run_ranks(size, run)


@pytest.mark.parametrize("layout", ["bfloat16", "gptq 4 bits", "gptq 4 bits, scattered", "awq", "compressed-tensors"])
def test_each_rank_reads_its_share(layout: str, folder_of: FolderOf) -> None:
    folder, size = folder_of("72B", layout), 8
    stored = {name: tensor.nbytes for name, tensor in load_file(folder / "model.safetensors").items()}
    counts = bytes_read(folder, size)
    assert all(rank.keys() == stored.keys() for rank in counts)
    for name, whole in stored.items():
        is_for_all = "norm" in name or name.endswith(("g_idx", "weight_shape"))
        is_summed_bias = name.endswith(("o_proj.bias", "down_proj.bias")) and not LAYOUTS[layout].has_unordered_groups
        copies = size if is_for_all or is_summed_bias else 1
        assert sum(rank[name] for rank in counts) == copies * whole, name
    assert max(sum(rank.values()) for rank in counts) < 1.2 * sum(stored.values()) / size


def test_kv_heads_are_read_by_each_rank_that_needs_them(folder_of: FolderOf) -> None:
    folder = folder_of("0.5B", "gptq 4 bits")
    stored = {name: tensor.nbytes for name, tensor in load_file(folder / "model.safetensors").items()}
    counts = bytes_read(folder, 3)  # two ranks have the first KV head, one the second
    for projection in ("k_proj", "v_proj"):
        for leaf in ("qweight", "qzeros", "scales", "bias"):
            name = f"model.layers.0.self_attn.{projection}.{leaf}"
            assert [2 * rank[name] for rank in counts] == [stored[name]] * 3
    name = "model.layers.0.self_attn.o_proj.scales"  # of 7 groups: heads 0 to 3, 4 to 6, 7 to 13
    assert [7 * rank[name] for rank in counts] == [2 * stored[name], 2 * stored[name], 4 * stored[name]]
