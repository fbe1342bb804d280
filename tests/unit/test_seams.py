"""Every extension point takes a stranger: one module that is written here, and one row of a table.

The stranger is put into the real thing and used. What it touched is compared with the table in CONTRIBUTING.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.link.config import EngineConfig
from engine.link.messages import GenerationRequest

ROOT = Path(__file__).parents[2]
PROMPT = [72, 101, 108, 108, 111]


class Plug:
    """Plugs one thing in, until the test ends, and counts the files that a contributor would have touched."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._monkeypatch = monkeypatch
        self.files: set[str] = set()
        self.tables: set[str] = set()

    def module(self, name: str, source: str) -> Any:
        """Write a module of this name, and import it."""
        (self._folder / f"{name}.py").write_text("from __future__ import annotations\n" + textwrap.dedent(source))
        importlib.invalidate_caches()
        self.files.add(name)
        return importlib.import_module(name)

    def row(self, table: str, key: str, entry: Any) -> None:
        """Add a row to a table, written "module:TABLE"."""
        holder, name = self._touch(table)
        self._monkeypatch.setitem(getattr(holder, name), key, entry)

    def first_row(self, table: str, key: str, entry: Any) -> None:
        """Add a row in front of all others."""
        holder, name = self._touch(table)
        self._monkeypatch.setattr(holder, name, {key: entry, **getattr(holder, name)})

    def last(self, table: str, entry: Any) -> None:
        """Add a row to a table that is a tuple."""
        holder, name = self._touch(table)
        self._monkeypatch.setattr(holder, name, (*getattr(holder, name), entry))

    def replace(self, table: str, value: Any) -> None:
        """Put the class that has one field more in place of the class that is the table."""
        holder, name = self._touch(table)
        self._monkeypatch.setattr(holder, name, value)

    def _touch(self, table: str) -> tuple[Any, str]:
        module, name = table.split(":")
        self.files.add(module)
        self.tables.add(name)
        return importlib.import_module(module), name

    def costs(self, thing: str) -> None:
        """Assert that CONTRIBUTING.md tells of these files and tables."""
        num_files, words = documented_costs()[thing]
        assert len(self.files) == num_files, f"{thing}: {sorted(self.files)}"
        assert not [table for table in self.tables if f"`{table}`" not in words], f"{thing}: {words}"


def documented_costs() -> dict[str, tuple[int, str]]:
    """Thing -> number of files, and the words that say which."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("\n## Adding things\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    return {thing: (int(count), words) for thing, count, words in rows[2:]}


@pytest.fixture
def plug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plug]:
    monkeypatch.syspath_prepend(tmp_path)
    plug = Plug(tmp_path, monkeypatch)
    yield plug
    for name in plug.files:
        if (tmp_path / f"{name}.py").exists():
            del sys.modules[name]


ANEW = ("server.", "tests.unit.server.")


@pytest.fixture
def modules_put_back() -> Iterator[None]:
    """What the test imports anew is forgotten afterwards, also by the packages whose attributes the modules are."""
    before = {name: module for name, module in sys.modules.items() if name.startswith(ANEW)}
    yield
    for name in [name for name in sys.modules if name.startswith(ANEW)]:
        del sys.modules[name]
    sys.modules.update(before)
    for name, module in before.items():
        package, _, attribute = name.rpartition(".")
        setattr(sys.modules[package], attribute, module)


def test_every_row_of_the_table_has_a_test() -> None:
    tested = set(re.findall(r'plug\.costs\("([^"]+)"\)', Path(__file__).read_text()))
    assert tested == set(documented_costs())


# ---- the engine ----


def reference_device(**changes: Any) -> Any:
    """The processor with the reference implementations, which compile nothing."""
    from engine.device import find_cpu

    names = dict.fromkeys("attention ops matrices sampler masks".split(), "torch")
    return dataclasses.replace(find_cpu(0), **{**names, **changes})


def generate(folder: Path, device: Any = None, num_tokens: int = 12) -> list[int]:
    """Greedy ids by an engine that starts as the server's does; `device` is the only one of the machine."""
    import engine.device
    from engine.start import start_engine

    with pytest.MonkeyPatch.context() as monkeypatch:
        if device is not None:
            monkeypatch.setattr(engine.device, "find_only", lambda local_rank: device, raising=False)
            monkeypatch.setattr(engine.device, "DEVICES", {"only": "engine.device:find_only"})
        core, _ = start_engine(EngineConfig(model_path=str(folder), dtype="float32", max_batch_total_tokens=512))
    core.take(GenerationRequest(request_id="r", prompt_token_ids=PROMPT, max_new_tokens=num_tokens))
    events = []
    while core.scheduler.has_work:
        events += core.step()
    assert events[-1].is_terminal and events[-1].error is None
    return [token_id for event in events for token_id in event.token_ids]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A tiny dense model, and what it says by the reference implementations."""
    from tests.tiny_model import write_tiny_qwen2

    folder = tmp_path_factory.mktemp("dense")
    write_tiny_qwen2(folder)
    return folder, generate(folder, reference_device())


def write_variant(source: Path, folder: Path, tensors: dict[str, Any], **changes: Any) -> Path:
    """The model of `source` with other tensors, and with changes in config.json."""
    from safetensors.torch import save_file

    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


FAMILY = """
    from engine.layers.rope import make_rotary
    from engine.models.blocks import DecoderForCausalLM
    from engine.models.config import check_sizes, read_decoder_config


    class StrangerForCausalLM(DecoderForCausalLM):
        def __init__(self, config, context):
            check_sizes(config)
            windows = [None] * config["num_hidden_layers"]
            decoder = read_decoder_config(config, has_qkv_bias=False, windows=windows)
            super().__init__(decoder, make_rotary(config, decoder.head_dim, context.device), context)
"""


def test_a_family_without_biases_says_what_qwen2_says_with_biases_of_zero(
    plug: Plug, dense: tuple[Path, list[int]], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    plug.module("stranger_family", FAMILY)
    plug.row("engine.models:MODELS", "stranger", "stranger_family:StrangerForCausalLM")
    tensors = load_file(dense[0] / "model.safetensors")
    zeros = {name: tensor * 0 if name.endswith(".bias") else tensor for name, tensor in tensors.items()}
    without = {name: tensor for name, tensor in tensors.items() if not name.endswith(".bias")}
    qwen2 = write_variant(dense[0], tmp_path / "qwen2", zeros)
    stranger = write_variant(dense[0], tmp_path / "stranger", without, model_type="stranger")
    assert generate(stranger, reference_device()) == generate(qwen2, reference_device())
    plug.costs("model family")


FORMAT = """
    import torch

    from quant.base import PackedWeight, ParamSpec
    from quant.rounding import round_to_nearest


    class RowScaled:
        def param_specs(self, in_features, out_features, has_bias):
            return {
                "codes": ParamSpec((out_features, in_features), output_dim=0, input_dim=1, is_integer=True),
                "row_scale": ParamSpec((out_features,), output_dim=0, input_dim=None),
                "bias": ParamSpec((out_features,), output_dim=0, input_dim=None, is_optional=not has_bias),
            }

        def is_copied(self, name, checkpoint_dtype):
            return True

        def decides_order(self, name):
            return False

        def has_unordered_groups(self, name, tensor):
            return False

        def pack(self, params, shard=None):
            weight = params["codes"].float() * params["row_scale"].float().unsqueeze(1)
            bias = params.get("bias")
            return PackedWeight("dense", weight, None if bias is None else bias.float())


    class RowScaledFormat:
        MARKER = "codes"
        description = "row-scaled"

        def __init__(self, settings):
            self.settings = settings

        @staticmethod
        def is_recognized(settings):
            return False

        def size_factor(self, *, is_exact):
            return 1.0

        def method_for(self, module):
            return RowScaled()


    class RowScaledOutput:
        IS_SYMMETRIC = True
        SETTINGS_FILE = None

        def stored_tensors(self, matrix):
            codes = (matrix.q.to(torch.int32) - matrix.zero_points).to(torch.int32)
            return {"codes": codes, "row_scale": matrix.scales.squeeze(1).contiguous()}

        def quantization_config(self, options):
            return {"quant_method": "row-scaled"}


    class RowScaledQuantizer:
        output = RowScaledOutput()

        def __init__(self, options, stages):
            self.stages = stages

        def on_inputs(self, layer, modules, inputs):
            raise AssertionError

        def finish(self, layer):
            names = [name for names in self.stages.MATRICES for name in names]
            return {
                name: round_to_nearest(layer[f"{name}.weight"], bits=8, group_size=-1, is_symmetric=True)
                for name in names
            }
"""
SETTINGS = {"quant_method": "row-scaled"}


def test_a_format_is_read(plug: Plug, dense: tuple[Path, list[int]], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    plug.module("stranger_format", FORMAT)
    plug.row("quant.config:FORMATS", "row-scaled", "stranger_format:RowScaledFormat")
    stored = load_file(dense[0] / "model.safetensors")
    plain = dict(stored)
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        weight = stored.pop(name)
        scale = weight.abs().amax(dim=1) / 127
        codes = (weight / scale.unsqueeze(1)).round().to(torch.int32)
        module = name.removesuffix(".weight")
        stored |= {f"{module}.codes": codes, f"{module}.row_scale": scale}
        plain[name] = codes.float() * scale.unsqueeze(1)
    quantized = write_variant(dense[0], tmp_path / "quantized", stored, quantization_config=SETTINGS)
    rounded = write_variant(dense[0], tmp_path / "rounded", plain)
    assert generate(quantized, reference_device()) == generate(rounded, reference_device())
    plug.costs("format, read")


def test_a_format_is_written_by_the_command(
    plug: Plug, dense: tuple[Path, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import engine.quantize.quantize
    from engine.cli import build_parser
    from engine.quantize.methods import Method
    from engine.quantize.options import read_options
    from quant.config import FORMATS

    plug.module("stranger_format", FORMAT)
    method = Method(quantizer="stranger_format:RowScaledQuantizer", help="a scale a row", bits=(8,), group_size=-1)
    plug.row("engine.quantize.methods:METHODS", "row-scaled", method)
    monkeypatch.setattr(engine.quantize.quantize, "detect_device", reference_device)
    output = tmp_path / "written"
    args = build_parser({}).parse_args(["quantize", "--method", "row-scaled", str(dense[0]), str(output)])
    assert engine.quantize.quantize.quantize(read_options(args)) == output
    plug.costs("format, written")
    # It is read back by the other row of the format.
    monkeypatch.setitem(FORMATS, "row-scaled", "stranger_format:RowScaledFormat")
    assert len(generate(output, reference_device())) == 12


def test_an_attention_backend_with_blocks_of_its_own(plug: Plug, dense: tuple[Path, list[int]]) -> None:
    module = plug.module(
        "stranger_attention",
        """
        from engine.attention.torch import TorchAttention

        used_sizes = []


        class StrangerAttention(TorchAttention):
            block_sizes = (32,)

            def forward(self, *arguments):
                used_sizes.append(self.block_size)
                return super().forward(*arguments)
        """,
    )
    plug.row("engine.attention:ATTENTION_BACKENDS", "stranger", "stranger_attention:StrangerAttention")
    assert generate(dense[0], reference_device(attention="stranger")) == dense[1]
    assert set(module.used_sizes) == {32}
    plug.costs("attention backend")


def test_an_ops_backend(plug: Plug, dense: tuple[Path, list[int]]) -> None:
    module = plug.module(
        "stranger_ops",
        """
        import torch

        from engine.layers.torch import TorchOps

        called = []


        class StrangerOps(TorchOps):
            def silu_and_mul(self, gate_up):
                called.append("silu_and_mul")
                gate, up = gate_up.chunk(2, dim=-1)
                return gate * torch.sigmoid(gate) * up
        """,
    )
    plug.row("engine.layers:OPS", "stranger", "stranger_ops:StrangerOps")
    assert generate(dense[0], reference_device(ops="stranger")) == dense[1]
    assert module.called
    plug.costs("ops backend")


def test_a_matrix_backend(plug: Plug, dense: tuple[Path, list[int]]) -> None:
    module = plug.module(
        "stranger_matrix",
        """
        shapes = []


        class StrangerDense:
            rounding = None
            row_counts = ()

            @staticmethod
            def why_not(packed):
                return []

            def __init__(self, packed):
                self.packed = packed

            def __call__(self, x):
                shapes.append(self.packed.weight.shape)
                product = x @ self.packed.weight.to(x.dtype).T
                return product if self.packed.bias is None else product + self.packed.bias
        """,
    )
    plug.row("quant.kernels:MATRICES", "stranger", {"dense": ["stranger_matrix:StrangerDense"]})
    assert generate(dense[0], reference_device(matrices="stranger")) == dense[1]
    assert len(set(module.shapes)) > 3
    plug.costs("matrix backend")


def test_a_sampler_backend(plug: Plug, dense: tuple[Path, list[int]]) -> None:
    plug.module(
        "stranger_sampler",
        """
        from engine.scheduling.batch import SampledBatch


        def sample(logits, params, positions, raw=None):
            rows = len(params)
            return SampledBatch([7] * rows, [-1.0] * rows, [True] * rows, [[]] * rows, [[]] * rows)
        """,
    )
    plug.row("engine.sampling.sampler:SAMPLERS", "stranger", "stranger_sampler:sample")
    assert generate(dense[0], reference_device(sampler="stranger")) == [7] * 12
    plug.costs("sampler backend")


def test_a_device(plug: Plug, dense: tuple[Path, list[int]]) -> None:
    module = plug.module(
        "stranger_device",
        """
        import torch

        from engine.device import Device

        ranks = []


        def find(local_rank):
            ranks.append(local_rank)
            return Device(
                torch_device=torch.device("cpu"),
                attention="torch",
                ops="torch",
                matrices="torch",
                sampler="torch",
                masks="torch",
                penalties="torch",
                collectives="gloo",
                computes_in_float32=False,
                is_memory_shared=False,
                free_memory_bytes=lambda: 1 << 30,
            )
        """,
    )
    plug.first_row("engine.device:DEVICES", "stranger", "stranger_device:find")
    assert generate(dense[0]) == dense[1]
    assert module.ranks == [0]
    plug.costs("device")


# ---- the server ----


@contextlib.asynccontextmanager
async def serving(folder: Path, engine: Any, **config: Any) -> Any:
    """A client of an application that is made as the HTTP process makes it."""
    from server.app import create_app
    from server.text.tokenizer import TextTokenizer
    from tests.unit.server.harness import client_of, make_config, write_model_folder

    folder.mkdir()
    write_model_folder(folder)
    app = create_app(engine, make_config(**config), TextTokenizer.from_folder(str(folder), 1))
    async with client_of(app) as client:
        yield client


async def test_a_route_is_answered_guarded_and_described(plug: Plug, tmp_path: Path) -> None:
    from tests.unit.server.harness import FakeEngine

    module = plug.module(
        "stranger_route",
        """
        import msgspec
        from fastapi import Request, Response

        from server.answers.json import json_answer
        from server.operation import Area, Operation

        area = Area()


        class Greeting(msgspec.Struct):
            text: str


        @area.serve(Operation(method="GET", path="/greeting", summary="A greeting", answers=(Greeting,)))
        async def greeting(request: Request) -> Response:
            return json_answer(Greeting("hello"))
        """,
    )
    plug.last("server.app:AREAS", module.area)
    async with serving(tmp_path / "model", FakeEngine(), api_key="secret") as client:
        refused = await client.get("/greeting")
        answer = await client.get("/greeting", headers={"authorization": "Bearer secret"})
        document = (await client.get("/openapi.json")).json()
    assert (refused.status_code, answer.json()) == (401, {"text": "hello"})
    assert document["paths"]["/greeting"]["get"]["summary"] == "A greeting"
    assert "Greeting" in document["components"]["schemas"]
    plug.costs("route")


def test_a_flag_fills_its_field(plug: Plug) -> None:
    from server.launcher.args import parse_args
    from server.launcher.flag import TEXT, Flag
    from server.launcher.flags import SECTIONS
    from server.launcher.parser import build_parser

    config = plug.module(
        "stranger_config",
        """
        import dataclasses

        from server.config import ServerConfig


        @dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
        class StrangerConfig(ServerConfig):
            greeting: str = "hello"
        """,
    )
    section = "Serving and security"
    flag = Flag(name="greeting", fills="server.greeting", help="A word of welcome", value=TEXT)
    plug.row("server.launcher.flags:SECTIONS", section, (*SECTIONS[section], flag))
    needed: dict[str, Any] = {"model_path": "", "listen_fd": -1, "engine_fd": -1}
    for argv, environ, greeting in (
        (["--greeting", "hi"], {}, "hi"),
        ([], {"GREETING": "hey"}, "hey"),
        ([], {}, "hello"),
    ):
        args = parse_args(["--model-id", "m", *argv], environ)
        assert config.StrangerConfig(**needed, **args.server).greeting == greeting
    assert "A word of welcome" in build_parser().format_help()
    plug.costs("flag")


async def test_a_sampling_parameter_from_the_wire_to_the_tokens(
    plug: Plug, modules_put_back: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parameter is top-a: a token stays if its probability is at least top_a times the square of the best one's."""
    import torch

    import server.requests.sampling

    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "stranger_parameter.py").write_text(textwrap.dedent(TOP_A))
    stranger = importlib.import_module("stranger_parameter")
    monkeypatch.delitem(sys.modules, "stranger_parameter")
    plug.replace("server.requests.sampling:Parameters", stranger.Parameters)
    monkeypatch.setattr(
        server.requests.sampling, "ROWS", server.requests.sampling.rows_of(server.requests.sampling.Parameters)
    )
    plug.replace("engine.link.messages:SamplingParams", stranger.SamplingParams)
    plug.last("engine.sampling.sampler_torch:FILTERS", stranger.FILTER)
    plug.files.add("engine.sampling.sampler_cpu")  # its kernel, which has no table: a row there and the loop itself

    # Everything that reads the rows when it is imported is imported anew.
    kept = ("server", "server.requests", "server.requests.sampling", "server.requests.rows", "server.requests.serde")
    for name in [name for name in sys.modules if name.startswith(ANEW)]:
        if name not in (*kept, "server.requests.values", "server.config", "server.errors"):
            del sys.modules[name]
    from tests.unit.server.harness import FakeEngine, one_by_one

    fake = FakeEngine()
    fake.script.events = one_by_one([1, 2])
    async with serving(tmp_path / "model", fake) as client:
        native = {"inputs": "a", "parameters": {"top_a": 0.5, "seed": 1, "max_new_tokens": 2}}
        chat = {"messages": [{"role": "user", "content": "a"}], "top_a": 0.5, "seed": 1, "max_tokens": 2}
        assert (await client.post("/generate", json=native)).status_code == 200
        assert (await client.post("/v1/chat/completions", json=chat)).status_code == 200
        native["parameters"]["top_a"] = 2.0  # type: ignore[index]
        refused = await client.post("/generate", json=native)
        document = (await client.get("/openapi.json")).json()
    assert refused.json()["error"] == "Input validation error: `top_a` must be >= 0.0 and <= 1.0"
    schema = document["components"]["schemas"]["GenerateParameters"]["properties"]["top_a"]
    assert {"maximum": 1, "minimum": 0}.items() <= schema["anyOf"][0].items()

    from engine.sampling.sampler_torch import filter_logits

    params = [request.sampling for request in fake.requests]
    assert [param.top_a for param in params] == [0.5, 0.5]
    logits = torch.tensor([[0.7, 0.29, 0.01]]).log()
    assert filter_logits(logits, params[:1]).isfinite().tolist() == [[True, True, False]]
    plug.costs("sampling parameter")


TOP_A = """
    import dataclasses

    import msgspec
    import torch

    import engine.link.messages
    import server.requests.sampling
    from engine.sampling.sampler_torch import Filter
    from server.requests.rows import IN_ALL_OF_OURS, Bounds, Refusal, Row, parameter
    from server.requests.serde import F32

    ROW = Row(
        F32,
        IN_ALL_OF_OURS,
        bounds=Bounds(min=0, max=1),
        refusal=Refusal(10, "`top_a` must be >= 0.0 and <= 1.0"),
        engine_field="top_a",
        is_for_drawing=True,
        is_filter=True,
    )
    Parameters = dataclasses.make_dataclass(
        "Parameters",
        [("top_a", float, parameter(ROW))],
        bases=(server.requests.sampling.Parameters,),
        frozen=True,
        kw_only=True,
    )
    SamplingParams = msgspec.defstruct(
        "SamplingParams",
        [("top_a", float, 0.0)],
        bases=(engine.link.messages.SamplingParams,),
        frozen=True,
        kw_only=True,
    )


    def keep(logits, values):
        probabilities = logits.softmax(dim=-1)
        bounds = torch.tensor(values).unsqueeze(1) * probabilities.amax(dim=-1, keepdim=True) ** 2
        return logits.masked_fill(probabilities < bounds, -torch.inf)


    FILTER = Filter(lambda params: params.top_a or None, keep)
"""
