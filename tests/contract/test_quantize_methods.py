"""What `text-generation-server quantize` writes, by every method: whole, right in every number, served as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import engine.quantize.quantize
from engine.checkpoint.files import read_model_config, read_quantization_config
from engine.checkpoint.weights import open_weights
from engine.link.config import EngineConfig
from engine.link.errors import StartError
from engine.quantize.checkpoint import CheckpointWriter
from engine.quantize.options import QuantizeOptions
from engine.quantize.quantize import quantize
from engine.start import start_engine
from quant.config import resolve_quantization
from quant.dense import DenseMethod
from quant.packing import widen
from tests.contract.harness import make_requests, oracle_greedy, oracle_logits, random_ids, run_requests
from tests.contract.oracles import WRITTEN
from tests.oracles.dequantize import dequantize
from tests.tiny_model import QWEN3, write_tiny_qwen2

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "LICENSE"  # 11 kB, and a token is a byte
SMALL: dict[str, Any] = {"dataset": str(TEXT), "num_samples": 32, "sample_tokens": 64, "perplexity_tokens": 0}
NO_DATA: dict[str, Any] = {"perplexity_tokens": 0}
NEAR_TIE = 1e-4
NUM_LETTERS = 90
"""Letters of the alphabet, which begins with "!", token 0."""

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gptq": ({**SMALL, "group_size": 32}, {}),
    "gptq-act-order": ({**SMALL, "group_size": 16, "is_act_order": True}, {"is_tied": False}),
    "gptq-channel": ({**SMALL, "group_size": -1}, {"dtype": torch.bfloat16}),
    "gptq-2bit": ({**SMALL, "bits": 2, "group_size": 16}, {}),
    "gptq-3bit": ({**SMALL, "bits": 3, "group_size": 32, "is_act_order": True}, {"num_shards": 2}),
    "gptq-8bit": ({**SMALL, "bits": 8, "group_size": 32}, {"dtype": torch.float16}),
    "awq": ({**SMALL, "group_size": 32}, {"dtype": torch.bfloat16}),
    "awq-o-scaled": ({**SMALL, "group_size": 16}, {"num_key_value_heads": 4, "is_tied": False}),
    "awq-channel": ({**SMALL, "group_size": -1}, {}),
    "int8": ({**NO_DATA, "bits": 8, "group_size": -1}, {"dtype": torch.bfloat16}),
    "int4": ({**NO_DATA, "group_size": 32}, {}),
    "gptq-qwen3": ({**SMALL, "group_size": 32}, QWEN3),
    "awq-qwen3": ({**SMALL, "group_size": 32}, QWEN3),
}
"""Name, of which the first word is the method -> options, and what the model is like."""


@pytest.fixture(scope="module", params=[*CASES])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """The case's name, the model, and what was made of it."""
    options, model = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_qwen2(folder / "model", **model)
    quantize(options_for(folder / "model", folder / "out", request.param.split("-")[0], **options))
    return request.param, folder / "model", folder / "out"


def options_for(source: Path, output: Path, method: str, **options: Any) -> QuantizeOptions:
    return QuantizeOptions(model_id=str(source), output_dir=str(output), method=method, **options)


def write_dense(source: Path, folder: Path) -> None:
    """The quantised model's weights, dequantised independently, as a plain checkpoint."""
    config = read_model_config(source)
    del config["quantization_config"]
    write_tiny_qwen2(folder)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    weights = {name: torch.from_numpy(array.copy()) for name, array in dequantize(source).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_matrix_has_the_numbers_of_the_dequantization(folders: tuple[str, Path, Path]) -> None:
    _, source, output = folders
    tensors = load_file(output / "model.safetensors")
    stored = read_quantization_config(output, read_model_config(output))
    dense = DenseMethod(torch.float32, computes_in_float32=True)
    quantization = resolve_quantization(None, None, stored, tensors, dense, matrices="cpu", is_exact=True)
    expected = dequantize(output)
    assert expected.keys() == set(open_weights(source).names)
    modules = {name.rpartition(".")[0] for name in tensors if name.endswith(".qweight")}
    assert len(modules) == 14
    for module in modules:
        params = {name.rpartition(".")[2]: t for name, t in tensors.items() if name.rpartition(".")[0] == module}
        packed = quantization.method_for(module).pack(params)
        np.testing.assert_array_equal(widen(packed).numpy(), expected[f"{module}.weight"], err_msg=module)


def test_the_engine_serves_it_without_a_flag(folders: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, _, output = folders
    write_dense(output, tmp_path)
    core, _ = start_engine(EngineConfig(model_path=str(output), dtype="float32", max_batch_total_tokens=512))
    prompts = [random_ids(size, seed=size) for size in (3, 30)]
    outcome = run_requests(core, make_requests(prompts, max_new_tokens=16))
    for prompt, ids in zip(prompts, outcome.token_ids, strict=True):
        expected, smallest_gap = oracle_greedy(tmp_path, prompt, 16)
        assert smallest_gap > NEAR_TIE, "a near-tie decides nothing: take another prompt"
        assert ids == expected


def test_what_is_not_quantized_stays(folders: tuple[str, Path, Path]) -> None:
    name, source, output = folders
    reader, written = open_weights(source), load_file(output / "model.safetensors")
    is_awq = name.startswith("awq")
    for tensor_name, tensor in written.items():
        if tensor_name.endswith(("qweight", "qzeros", "g_idx")):
            assert tensor.dtype == torch.int32
            continue
        assert tensor.dtype == torch.float16
        is_scaled = is_awq and tensor_name.endswith(("layernorm.weight", "v_proj.bias"))
        if not tensor_name.endswith("scales") and not is_scaled:
            assert torch.equal(tensor, reader.read(tensor_name).to(torch.float16)), tensor_name


def test_files_and_configuration(folders: tuple[str, Path, Path]) -> None:
    name, source, output = folders
    options, _ = CASES[name]
    is_gptq = name.startswith(("gptq", "int8"))
    config, before = read_model_config(output), read_model_config(source)
    stored = config.pop("quantization_config")
    assert config == {**before, "torch_dtype": "float16"}
    assert stored["quant_method"] == WRITTEN[name.split("-")[0]]
    assert (stored["bits"], stored["group_size"]) == (options.get("bits", 4), options["group_size"])
    if is_gptq:
        assert (stored["sym"], stored["checkpoint_format"], stored["lm_head"]) == (True, "gptq", False)
        assert stored["desc_act"] == options.get("is_act_order", False)
        assert json.loads((output / "quantize_config.json").read_text()) == stored
    for copied in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (output / copied).read_bytes() == (source / copied).read_bytes()
    modes = {path.stat().st_mode for path in output.iterdir()}
    assert modes == {(source / "config.json").stat().st_mode}
    assert not [path for path in output.iterdir() if path.suffix == ".part"]


def distance(folder: Path, source: Path, tmp_path: Path) -> float:
    """Mean squared difference of the logits from the dense model's, on tokens in an order that was never seen."""
    write_dense(folder, tmp_path)
    token_ids = [token_id % NUM_LETTERS for token_id in random_ids(200, seed=99)]
    return float((oracle_logits(tmp_path, token_ids) - oracle_logits(source, token_ids)).square().mean())


def test_more_bits_and_data_lose_less(tmp_path: Path) -> None:
    source = tmp_path / "model"
    write_tiny_qwen2(source)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(chr(ord("!") + token_id % NUM_LETTERS) for token_id in random_ids(20_000, seed=5)))
    data = {**SMALL, "dataset": str(corpus), "group_size": 32}
    runs: dict[str, dict[str, Any]] = {f"gptq-{bits}": {**data, "bits": bits} for bits in (2, 3, 4, 8)}
    runs |= {"awq-4": data, "int4-4": {**NO_DATA, "group_size": 32}}
    lost = {}
    for name, options in runs.items():
        quantize(options_for(source, tmp_path / name, name.split("-")[0], **options))
        lost[name] = distance(tmp_path / name, source, tmp_path / f"{name}-dense")
    assert lost["gptq-8"] < lost["gptq-4"] < lost["gptq-3"] < lost["gptq-2"], lost
    assert lost["awq-4"] < lost["int4-4"], lost


def test_the_same_command_writes_the_same_bytes(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path / "model")
    for number in (1, 2):
        quantize(options_for(tmp_path / "model", tmp_path / f"out-{number}", "gptq", **{**SMALL, "group_size": 32}))
    first, second = ((tmp_path / f"out-{number}" / "model.safetensors").read_bytes() for number in (1, 2))
    assert first == second


def test_scoring_takes_no_threads_from_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine sets torch's threads to one and Numba's start sets them anew: what is left must not hang on that."""
    write_tiny_qwen2(tmp_path / "model")
    seen: list[int] = []
    write = engine.quantize.quantize._write_tensors
    monkeypatch.setattr(
        "engine.quantize.quantize._write_tensors", lambda *args: seen.append(torch.get_num_threads()) or write(*args)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        options = {**SMALL, "group_size": 32, "perplexity_tokens": 500}
        quantize(options_for(tmp_path / "model", tmp_path / "out", "gptq", **options))
        assert [*seen, torch.get_num_threads()] == [2, 2]
    finally:
        torch.set_num_threads(before)


def test_perplexity_before_and_after(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tiny_qwen2(tmp_path / "model")
    options = {**SMALL, "group_size": 32, "perplexity_tokens": 500}
    with caplog.at_level("INFO"):
        quantize(options_for(tmp_path / "model", tmp_path / "out", "awq", **options))
    (line,) = [line for line in caplog.messages if line.startswith("Perplexity")]
    assert line.startswith(f"Perplexity on the last 500 tokens of {TEXT}: ") and " before, " in line


def test_json_lines(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path / "model")
    dataset = tmp_path / "data.jsonl"
    dataset.write_text(
        "\n".join(json.dumps({"text": line, "id": 1}) for line in TEXT.read_text().splitlines()) + "\n\n"
    )
    options = {**SMALL, "dataset": str(dataset), "group_size": 32}
    assert quantize(options_for(tmp_path / "model", tmp_path / "out", "gptq", **options)) == tmp_path / "out"


def test_large_models_are_written_in_shards(tmp_path: Path) -> None:
    tensors = {f"tensor.{number}": torch.full((100,), number, dtype=torch.float16) for number in range(7)}
    with CheckpointWriter(tmp_path / "out", shard_bytes=450) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish(tmp_path, {"config.json": {}})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        *(f"model-{number:05}-of-00004.safetensors" for number in range(1, 5)),
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 200
    reader = open_weights(tmp_path / "out")
    assert sorted(reader.names) == sorted(index["weight_map"]) == sorted(tensors)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


TEXTS = "tokenizer.json chat_template.jinja additional_chat_templates/tool_use.jinja processor_config.json".split()


def test_all_chat_templates_go_with_the_weights(tmp_path: Path) -> None:
    source, output = tmp_path / "model", tmp_path / "out"
    (source / "additional_chat_templates").mkdir(parents=True)
    for name in (*TEXTS, "README.md", "additional_chat_templates/notes.txt"):
        (source / name).write_text(name)
    with CheckpointWriter(output) as writer:
        writer.finish(source, {"config.json": {}})
    written = {str(path.relative_to(output)): path.read_text() for path in output.rglob("*") if path.is_file()}
    assert {name: text for name, text in written.items() if name in TEXTS} == {name: name for name in TEXTS}
    assert written.keys() - {*TEXTS} == {"config.json", "model.safetensors"}


def test_a_failure_after_the_copies_leaves_nothing(tmp_path: Path) -> None:
    source, output = tmp_path / "model", tmp_path / "out"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "additional_chat_templates" / "rag.jinja").touch()
    with pytest.raises(TypeError), CheckpointWriter(output) as writer:
        writer.finish(source, {"config.json": {"not JSON": object()}})
    assert not output.exists()


def damaged(source: Path, **changes: Any) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))


def with_nan(source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, source / "model.safetensors")


def too_large_for_half(name: str) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        weights = load_file(source / "model.safetensors")
        weights[name][0] = 1e6
        save_file(weights, source / "model.safetensors")

    return change


def quantized_already(source: Path) -> None:
    damaged(source, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})


def a_file_in_the_way(source: Path) -> None:
    (source.parent / "out").mkdir()
    (source.parent / "out" / "notes.txt").write_text("mine")


def an_output_that_is_a_file(source: Path) -> None:
    (source.parent / "out").write_text("mine")


def longer_tokenizer(source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:60].clone()
    save_file(weights, source / "model.safetensors")
    damaged(source, vocab_size=60)


def as_is(source: Path) -> None:
    pass


def bad_dataset(name: str, content: bytes) -> Callable[[Path], None]:
    def write(source: Path) -> None:
        (source.parent / name).write_bytes(content)

    return write


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        (as_is, {"group_size": 48}, "--groupsize 48 does not divide the 64 inputs of self_attn.q_proj: give 32 or 16"),
        (as_is, {"group_size": 128}, "--groupsize 128 does not divide the 64 inputs"),
        (as_is, {"dataset": "{}/no.txt"}, "/no.txt is not there: give the path of a text file"),
        (as_is, {"dataset": "{}"}, "cannot be read (Is a directory): give a text file"),
        (as_is, {"num_samples": 300}, "tokens, too few: 300 samples of 64 and 0 to score are 19200; give a longer"),
        (as_is, {"sample_tokens": 1000, "num_samples": 2}, "--sample-tokens 1000 is more than the 512 positions"),
        (bad_dataset("a.txt", b"\xff\xfe\x00"), {"dataset": "{}/a.txt"}, "is not UTF-8 text: give plain text"),
        (bad_dataset("a.txt", b""), {"dataset": "{}/a.txt"}, "has 0 tokens, too few"),
        (bad_dataset("a.jsonl", b'{"text": "a"}\n{"content": 1}'), {"dataset": "{}/a.jsonl"}, "line 2 of"),
        (bad_dataset("a.jsonl", b"[1]\n"), {"dataset": "{}/a.jsonl"}, 'is not an object with a "text"'),
        (a_file_in_the_way, {}, "out is not empty: give a new OUTPUT_DIR, or remove what is in it"),
        (an_output_that_is_a_file, {}, "out cannot be used as output (File exists): give another OUTPUT_DIR"),
        (quantized_already, {}, "is quantised already: give the model that it was made from"),
        (with_nan, {}, "model.layers.1.mlp.up_proj.weight with NaN or infinite values"),
        (too_large_for_half("model.norm.weight"), {}, "tensor model.norm.weight does not fit in float16"),
        (too_large_for_half("model.layers.1.mlp.up_proj.weight"), {}, "mlp.up_proj.weight does not fit in float16"),
        (longer_tokenizer, {}, "tokenizer.json has more tokens than config.json's vocab_size"),
        (lambda source: damaged(source, model_type="llama"), {}, "model_type 'llama' is not supported"),
        (lambda source: damaged(source, intermediate_size=128), {}, "config.json and the weights do not belong"),
        (lambda source: damaged(source, num_hidden_layers=3), {}, "lacks the tensor model.layers.2"),
        (lambda source: (source / "tokenizer.json").write_text("{}"), {}, "tokenizer.json cannot be read"),
        (lambda source: (source / "tokenizer.json").unlink(), {}, "has no tokenizer.json"),
        (lambda source: (source / "config.json").unlink(), {}, "has weights but no config.json"),
    ],
)
def test_refusals(change: Any, options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    """One sentence, and nothing is left behind."""
    source = tmp_path / "model"
    write_tiny_qwen2(source)
    change(source)
    before = sorted(tmp_path.rglob("*"))
    options = {**SMALL, "group_size": 32, **options}
    options["dataset"] = options["dataset"].replace("{}", str(tmp_path))
    for method in ("gptq", "awq"):
        with pytest.raises(StartError) as refusal:
            quantize(options_for(source, tmp_path / "out", method, **options))
        assert sentence in str(refusal.value)
        assert sorted(tmp_path.rglob("*")) == before


def test_outputs_that_do_not_fill_words(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path / "model", hidden_size=48, num_attention_heads=4, num_key_value_heads=1)
    with pytest.raises(StartError, match=r"k_proj has 12 outputs and 48 inputs, which don't fill words of 32 bits"):
        quantize(options_for(tmp_path / "model", tmp_path / "out", "int4", **NO_DATA, group_size=16))


def test_memory_that_does_not_suffice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_qwen2(tmp_path / "model")
    monkeypatch.setattr("engine.quantize.quantize.host_free_bytes", lambda: 1_000_000)
    with pytest.raises(StartError, match=r"quantising needs about 0.0 GB of memory and 0.0 GB are free: give fewer"):
        quantize(options_for(tmp_path / "model", tmp_path / "out", "gptq", **SMALL, group_size=32))


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_qwen2(tmp_path / "model")

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.quantize.checkpoint.save_file", full)
    with pytest.raises(StartError, match=r"cannot be written \(.*No space left on device.*\): free space, or give"):
        quantize(options_for(tmp_path / "model", tmp_path / "out", "int8", **NO_DATA, bits=8, group_size=-1))
    assert not (tmp_path / "out").exists()


def test_a_whole_folder_stays_when_the_upload_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_qwen2(tmp_path / "model")

    def fail(folder: Path, model_id: str) -> None:
        raise StartError("the Hub is gone")

    monkeypatch.setattr("engine.quantize.quantize.check_may_upload", lambda model_id: None)
    monkeypatch.setattr("engine.quantize.quantize.upload_model", fail)
    options = {**NO_DATA, "bits": 8, "group_size": -1, "upload_to": "me/mine"}
    with pytest.raises(StartError, match="the Hub is gone"):
        quantize(options_for(tmp_path / "model", tmp_path / "out", "int8", **options))
    assert start_engine(EngineConfig(model_path=str(tmp_path / "out"), max_batch_total_tokens=512))
