"""Stored quantised weights -> dense float32 arrays: slow, plain numpy, and nothing of the project's `quant` package.

    PYTHONPATH=. python tests/oracles/dequantize.py FOLDER [word|field|unmasked]

Reads the folders that AutoGPTQ, gptqmodel, AutoAWQ, AutoRound, llmcompressor and transformers write, and GGUF files
(shapes and packing: tests/oracles/checkpoints/README.md). Names on the way out are those of a plain Hugging Face Qwen2
checkpoint.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Zeros = Literal["word", "field", "unmasked"]
"""How the stored z - 1 of the first GPTQ format ("v1") becomes z; they differ only where some true z was 0.

word      add 1 to every field of the 32-bit word at once, carrying from field to field: gptqmodel's reading of 2, 4
          and 8 bits; its 3 bits, where fields cross from word to word, it reads as `field`.
field     (field + 1) modulo 2**bits: AutoGPTQ's torch path for 2, 4 and 8 bits without act-order.
unmasked  field + 1, up to 2**bits: AutoGPTQ's torch path with act-order, and for 3 bits.
"""

DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.uint32,
    "BF16": np.uint16,
    "I8": np.int8,
    "F8_E4M3": np.uint8,
}
SCALES = ("weight_scale", "weight_scale_inv")
LAYER_MODULES = [
    *(f"self_attn.{name}" for name in "q_proj k_proj v_proj o_proj q_norm k_norm".split()),
    *(f"mlp.{name}" for name in "gate shared_expert_gate gate_proj up_proj down_proj".split()),
    *(f"mlp.{kind}.{name}" for kind in ("experts", "shared_expert") for name in "gate_proj up_proj down_proj".split()),
    "input_layernorm",
    "post_attention_layernorm",
]
AWQ_FIELD_OF_CHANNEL = (0, 4, 1, 5, 2, 6, 3, 7)


def dequantize(folder: Path, *, zeros: Zeros = "word") -> dict[str, Floats]:
    """Every tensor of the model in float32; a tied model has no lm_head.weight."""
    for path in folder.glob("*.gguf"):
        return gguf_weights(path)
    config = json.loads((folder / "config.json").read_text())
    quantization = quantization_config(folder, config)
    stored = read_tensors(folder)
    dense: dict[str, Floats] = {}
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        if kind == "qweight" and is_gptq(quantization):
            dense[f"{module}.weight"] = gptq_weight(stored, module, is_v1(quantization), zeros)
        elif kind == "qweight":
            dense[f"{module}.weight"] = awq_weight(stored, module)
        elif kind == "weight_packed":
            dense[f"{module}.weight"] = compressed_weight(stored, module)
        elif kind == "weight" and any(f"{module}.{scale}" in stored for scale in SCALES):
            dense[name] = scaled_weight(stored, module, block_size(quantization, module, tensor.shape))
        elif kind == "bias" and not module.endswith(("q_proj", "k_proj", "v_proj")):
            assert not tensor.any(), f"{name}: Qwen2 has no such bias, and this one is not zero"  # AutoGPTQ's
        elif kind in ("weight", "bias"):
            dense[name] = tensor.astype(np.float32)
    if config["tie_word_embeddings"] and "lm_head.weight" in dense:  # AutoGPTQ stores a copy
        assert np.array_equal(dense.pop("lm_head.weight"), dense["model.embed_tokens.weight"])
    return dense


def quantization_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    inside: dict[str, Any] | None = config.get("quantization_config")
    return inside or json.loads((folder / "quantize_config.json").read_text())


def is_gptq(quantization: dict[str, Any]) -> bool:
    """Whether packed tensors are GPTQ's; AutoRound packs either way, and says which."""
    return quantization["quant_method"] == "gptq" or "awq" not in quantization.get("packing_format", "awq")


def is_v1(quantization: dict[str, Any]) -> bool:
    """Whether a GPTQ checkpoint stores z - 1: AutoGPTQ 0.7.1 doesn't name its format, and it is this one."""
    if "packing_format" in quantization:  # AutoRound's
        return quantization["packing_format"] == "auto_round:auto_gptq"
    return (quantization.get("checkpoint_format") or quantization.get("format") or "gptq") == "gptq"


def read_tensors(folder: Path) -> dict[str, Array]:
    """Every tensor of every *.safetensors: int32 as uint32, and bfloat16 as float32."""
    tensors: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            tensor = np.frombuffer(data[8 + size + begin : 8 + size + end], DTYPES[entry["dtype"]])
            if entry["dtype"] == "BF16":
                tensor = (tensor.astype(np.uint32) << 16).view(np.float32)
            elif entry["dtype"] == "F8_E4M3":
                tensor = E4M3[tensor]
            tensors[name] = tensor.reshape(entry["shape"])
    return tensors


def unpack(words: Array, bits: int) -> Array:
    """[..., W] uint32 -> [..., W * 32 / bits]: the words of a row are one stream of bits, the lowest first.

    Of 3-bit values 32 fill 3 words, and two of them lie across a border. unpack([[0x321]], 4) is [[1, 2, 3, 0, ...]].
    """
    stream = np.unpackbits(np.ascontiguousarray(words).astype("<u4").view(np.uint8), axis=-1, bitorder="little")
    fields = stream.reshape(*words.shape[:-1], -1, bits).astype(np.int64)
    unpacked: Array = fields @ (1 << np.arange(bits))
    return unpacked


def gptq_weight(stored: dict[str, Array], module: str, is_first_format: bool, zeros: Zeros) -> Floats:
    """weight[n, k] = scales[g, n] * (q[k, n] - z[g, n]) with g = g_idx[k]; packed along k, the zero points along n."""
    qweight, num_groups = stored[f"{module}.qweight"], len(stored[f"{module}.scales"])
    bits = 32 * stored[f"{module}.qzeros"].shape[1] // stored[f"{module}.scales"].shape[1]
    num_inputs = 32 * qweight.shape[0] // bits
    in_order = np.arange(num_inputs) // -(-num_inputs // num_groups)  # AutoRound's
    group_of = stored.get(f"{module}.g_idx", in_order)
    values = unpack(qweight.T, bits)  # [N, K]
    zero_points = gptq_zero_points(stored[f"{module}.qzeros"], bits, is_first_format, zeros)  # [G, N]
    scales = stored[f"{module}.scales"].astype(np.float32)
    weight = np.empty(values.shape, np.float32)
    for k, group in enumerate(group_of):
        weight[:, k] = scales[group] * (values[:, k] - zero_points[group]).astype(np.float32)
    return weight


def gptq_zero_points(qzeros: Array, bits: int, is_first_format: bool, zeros: Zeros) -> Array:
    if not is_first_format:
        return unpack(qzeros, bits)
    if zeros == "word" and bits != 3:
        ones = sum(1 << shift for shift in range(0, 32, bits))  # 0x11111111 for 4 bits
        return unpack(qzeros + np.uint32(ones), bits)  # wraps
    plus_one: Array = unpack(qzeros, bits) + 1
    return plus_one if zeros == "unmasked" else plus_one % 2**bits


def awq_weight(stored: dict[str, Array], module: str) -> Floats:
    """weight[n, k] = scales[g, n] * (q[k, n] - z[g, n]) with g = k // group_size; both packed along n, interleaved."""
    values = awq_unpack(stored[f"{module}.qweight"])  # [K, N]
    zero_points = awq_unpack(stored[f"{module}.qzeros"])  # [G, N]
    scales = stored[f"{module}.scales"].astype(np.float32)
    group_size = values.shape[0] // scales.shape[0]
    weight = np.empty(values.shape[::-1], np.float32)
    for k in range(values.shape[0]):
        group = k // group_size
        weight[:, k] = scales[group] * (values[k] - zero_points[group]).astype(np.float32)
    return weight


def awq_unpack(words: Array) -> Array:
    """[R, N/8] -> [R, N], channel 8c + o out of its field of word c."""
    fields = unpack(words, 4).reshape(words.shape[0], -1, 8)
    return fields[:, :, list(AWQ_FIELD_OF_CHANNEL)].reshape(words.shape[0], -1)


def compressed_weight(stored: dict[str, Array], module: str) -> Floats:
    """weight[n, k] = scale[n, g] * (q[n, k] - z[n, g]); packed along k, the zero points along n."""
    packed, scales = stored[f"{module}.weight_packed"], stored[f"{module}.weight_scale"].astype(np.float32)
    rows, columns = (int(size) for size in stored[f"{module}.weight_shape"])
    bits = 32 * packed.shape[1] // columns
    values = unpack(packed, bits)[:, :columns]
    if f"{module}.weight_zero_point" in stored:
        zero_points = unpack(stored[f"{module}.weight_zero_point"].T, bits).T[:rows]  # [N, G]
    else:
        zero_points = np.full(scales.shape, 2 ** (bits - 1))
    group_size = columns // scales.shape[1]
    weight = np.empty((rows, columns), np.float32)
    for k in range(columns):
        group = k // group_size
        weight[:, k] = scales[:, group] * (values[:, k] - zero_points[:, group]).astype(np.float32)
    return weight


def gguf_weights(path: Path) -> dict[str, Floats]:
    """Every tensor of a GGUF file, dequantised by the package `gguf`, which llama.cpp's authors write.

    A matrix of all experts is that of each, in their order.
    """
    import gguf
    from gguf.quants import dequantize as dequantize_blocks

    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    num_layers = reader.fields[f"{architecture}.block_count"].contents()
    maps = [
        gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, name.upper()), num_layers)
        for name in (architecture.removesuffix("moe"), architecture)  # a layer may be without experts
    ]
    layers = [f"model.layers.{index}.{module}" for index in range(num_layers) for module in LAYER_MODULES]
    modules = ("model.embed_tokens", "model.norm", "lm_head", *layers)
    ours = {names.get_name(name): name for names in maps for name in modules}
    weights: dict[str, Floats] = {}
    for tensor in reader.tensors:
        module, _, leaf = tensor.name.rpartition(".")
        shape = [int(size) for size in reversed(tensor.shape)]
        values = dequantize_blocks(tensor.data, tensor.tensor_type).astype(np.float32)
        name = f"{ours[module]}.{leaf}"
        if "shared_expert_gate" in name:
            shape = [1, shape[-1]]
        values = values.reshape(shape)
        if ".experts." in name:
            weights |= {name.replace("experts", f"experts.{index}"): matrix for index, matrix in enumerate(values)}
        else:
            weights[name] = values
    return weights


def e4m3_values() -> Floats:
    """The number behind each byte: a sign, four bits of exponent (bias 7), three of mantissa."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    values = np.where(byte < 128, 1, -1) * np.where(byte & 127 == 127, np.nan, size)
    return values.astype(np.float32)


E4M3 = e4m3_values()


def block_size(quantization: dict[str, Any], module: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Outputs and inputs of a matrix that share a scale."""
    block = quantization.get("weight_block_size")
    for group in quantization.get("config_groups", {}).values():  # the stored checkpoints have one
        weights = group["weights"]
        block = {
            "tensor": shape,
            "channel": (1, shape[1]),
            "group": (1, weights["group_size"]),
            "block": weights["block_structure"],
        }[weights["strategy"]]
    return tuple(block or shape)  # type: ignore[return-value]


def scaled_weight(stored: dict[str, Array], module: str, block: tuple[int, int]) -> Floats:
    """weight[n, k] = scale[n // block[0], k // block[1]] * (q[n, k] - z), in 8-bit floats or integers."""
    values = stored[f"{module}.weight"].astype(np.float32)
    scales = next(stored[f"{module}.{name}"] for name in SCALES if f"{module}.{name}" in stored).astype(np.float32)
    zero_points = stored.get(f"{module}.weight_zero_point", np.zeros(scales.shape)).astype(np.float32)
    grid = [-(-size // of_block) for size, of_block in zip(values.shape, block, strict=True)]
    scales, zero_points = scales.reshape(grid), zero_points.reshape(grid)
    weight = np.empty(values.shape, np.float32)
    for n in range(values.shape[0]):
        for k in range(values.shape[1]):
            place = n // block[0], k // block[1]
            weight[n, k] = scales[place] * (values[n, k] - zero_points[place])
    return weight


def main() -> None:
    zeros: Any = sys.argv[2] if len(sys.argv) > 2 else "word"
    for name, tensor in sorted(dequantize(Path(sys.argv[1]), zeros=zeros).items()):
        print(f"{name:60} {list(tensor.shape)!s:14} mean {tensor.mean():+.6f} std {tensor.std():.6f}")


if __name__ == "__main__":
    main()
