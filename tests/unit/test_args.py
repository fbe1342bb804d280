"""The command line and its variables: values, refusals, exit codes and their exact words."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import server.launcher.sharding
from engine.link.config import EngineConfig
from engine.link.suggestions import suggestion
from quant.config import FORMATS, ON_LOAD
from server.config import ServerConfig
from server.launcher.args import LauncherArgs, parse_args
from server.launcher.errors import ArgumentError
from server.launcher.flag import BOOLEAN, COUNT, FACTOR, FRACTION, NUMBER, PORT, POSITIVE, Effect, Flag, Variable
from server.launcher.flags import QUANTIZE, QUANTIZE_STAND_INS, SECTIONS, VARIABLES, every_flag
from server.launcher.host import can_use_gpus
from server.launcher.lora_adapters import FIX as ADAPTER_FIX
from server.launcher.parser import USAGE
from server.launcher.sharding import Sharding

FLAGS = tuple(every_flag())
ENGINE_DEFAULTS = EngineConfig(
    model_path="",
    dtype="auto",
    memory_fraction=1.0,
    is_prefix_caching=True,
    max_draft_tokens=0,
    watermark_gamma=0.5,
    watermark_delta=2.0,
    shard_timeout_s=15,
    log_level="info",
    is_json_output=False,
)
SERVER_DEFAULTS = ServerConfig(
    model_id="m",
    model_path="",
    listen_fd=-1,
    engine_fd=-1,
    max_concurrent_requests=128,
    max_best_of=2,
    max_stop_sequences=4,
    max_top_n_tokens=5,
    max_logit_bias=1024,
    max_client_batch_size=None,
    validation_workers=2,
    payload_limit=2_000_000,
    has_prompt_logprobs=False,
    is_grammar_disabled=False,
    api_key=None,
    cors_allow_origin=(),
    is_strict_tgi=False,
    graceful_termination_timeout_s=90,
    compute_type="cpu",
    build_sha=None,
    docker_label=None,
    log_level="info",
    is_json_output=False,
    otlp_endpoint=None,
    otlp_service_name="text-generation-inference.router",
)
DEFAULTS = LauncherArgs(
    model_id="m",
    revision=None,
    huggingface_hub_cache=None,
    hostname="0.0.0.0",
    port=3000,
    shard_timeout_s=15,
    graceful_termination_timeout_s=90,
    omp_num_threads=None,
    is_runtime_logged=False,
    is_json_output=False,
    log_level="info",
    sharding=Sharding(),
    engine={},
    server={},
    echo="",
    warnings=(),
)
Configurations = tuple[LauncherArgs, EngineConfig, ServerConfig]
PARTS: dict[str, type[Any]] = {"launcher": LauncherArgs, "engine": EngineConfig, "server": ServerConfig}
FIELDS = {part: {field.name for field in dataclasses.fields(config)} for part, config in PARTS.items()}


def configurations(args: LauncherArgs) -> Configurations:
    """The fields of the three processes, less the echo and the warnings."""
    engine = EngineConfig(**args.engine, model_path="")
    server = ServerConfig(**args.server, model_path="", listen_fd=-1, engine_fd=-1)
    return dataclasses.replace(args, engine={}, server={}, echo="", warnings=()), engine, server


def defaults(changes: Mapping[str, Any]) -> Configurations:
    """The fields that they get by default, with each of `changes` wherever there is such a field."""
    assert changes.keys() <= set().union(*FIELDS.values())
    launcher, engine, server = (
        {name: changes[name] for name in changes.keys() & FIELDS[part]} for part in ("launcher", "engine", "server")
    )
    return (
        dataclasses.replace(DEFAULTS, **launcher),
        dataclasses.replace(ENGINE_DEFAULTS, **engine),
        dataclasses.replace(SERVER_DEFAULTS, **server),
    )


def parse(line: str, **environ: str) -> LauncherArgs:
    return parse_args(["--model-id", "m", *shlex.split(line)], environ)


def outcome(argv: list[str], environ: dict[str, str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and first line on standard error, as the launcher has them; 0 and nothing for what it would serve."""
    try:
        parse_args(argv, environ)
    except ArgumentError as error:
        return 1, f"Error: {error}"
    except SystemExit as exit:
        return int(exit.code or 0), (capsys.readouterr().err.splitlines() or [""])[0]
    return 0, ""


@pytest.mark.parametrize(
    ("line", "environ", "changes"),
    [
        ("", {}, {}),
        ("--revision refs/pr/1", {}, {"revision": "refs/pr/1"}),
        ("", {"REVISION": "v1"}, {"revision": "v1"}),
        ("--dtype float32", {}, {"dtype": "float32"}),
        ("--dtype float16", {"DTYPE": "bfloat16"}, {"dtype": "float16"}),
        ("--device cpu", {}, {"device": "cpu"}),
        ("--device auto", {"DEVICE": "cuda"}, {}),
        ("", {"DEVICE": "cuda"}, {"device": "cuda"}),
        ("", {"DTYPE": "bfloat16"}, {"dtype": "bfloat16"}),
        ("--rope-scaling yarn --rope-factor 4", {}, {"rope_scaling": "yarn", "rope_factor": 4.0}),
        ("--rope-factor 2.5", {}, {"rope_factor": 2.5}),
        ("--watermark-gamma 0.25", {"WATERMARK_DELTA": "-1.5"}, {"watermark_gamma": 0.25, "watermark_delta": -1.5}),
        ("--quantize gptq", {}, {"quantize": "gptq"}),
        ("--quantize awq --dtype float16", {}, {"quantize": "awq", "dtype": "float16"}),
        ("--quantize eetq --quantize-head none", {}, {"quantize": "eetq", "quantize_head": "none"}),
        ("", {"QUANTIZE": "int4", "QUANTIZE_HEAD": "int4"}, {"quantize": "int4", "quantize_head": "int4"}),
        ("", {"ROPE_SCALING": "dynamic", "ROPE_FACTOR": "2"}, {"rope_scaling": "dynamic", "rope_factor": 2.0}),
        ("--hostname ::", {}, {"hostname": "::"}),
        ("", {"HOSTNAME": "10.0.0.1"}, {"hostname": "10.0.0.1"}),
        ("--port 8080", {}, {"port": 8080}),
        ("-p 8080", {}, {"port": 8080}),
        ("--port=8080", {"PORT": "80"}, {"port": 8080}),
        ("", {"PORT": "80"}, {"port": 80}),
        ("", {"PORT": ""}, {}),
        ("", {"PORT": "tcp://10.96.0.1:9090", "PROMETHEUS_PORT": "tcp://10.96.0.1:9090"}, {}),
        ("--port 80", {"PORT": "udp://[fd00::1]:53", "MASTER_PORT": "tcp://10.96.0.1:443"}, {"port": 80}),
        ("--port 0", {}, {"port": 0}),
        ("--max-concurrent-requests 7", {}, {"max_concurrent_requests": 7}),
        ("", {"MAX_CONCURRENT_REQUESTS": "7"}, {"max_concurrent_requests": 7}),
        ("--max-input-tokens 100", {}, {"max_input_tokens": 100}),
        ("--max-input-length 100", {}, {"max_input_tokens": 100}),
        ("", {"MAX_INPUT_LENGTH": "100"}, {"max_input_tokens": 100}),
        ("--max-total-tokens 100", {}, {"max_total_tokens": 100}),
        (
            "--max-input-tokens 99 --max-total-tokens 100",
            {},
            {"max_input_tokens": 99, "max_total_tokens": 100},
        ),
        ("--max-best-of 3", {}, {"max_best_of": 3}),
        ("", {"MAX_BEST_OF": "1"}, {"max_best_of": 1}),
        ("--max-stop-sequences 0", {}, {"max_stop_sequences": 0}),
        ("", {"MAX_STOP_SEQUENCES": "9"}, {"max_stop_sequences": 9}),
        ("--max-top-n-tokens 20", {}, {"max_top_n_tokens": 20}),
        ("--max-logit-bias 300", {}, {"max_logit_bias": 300}),
        ("--generation-config none", {}, {"generation_config": "none"}),
        ("", {"GENERATION_CONFIG": "vllm"}, {"generation_config": "vllm"}),
        ("", {"MAX_TOP_N_TOKENS": "0"}, {"max_top_n_tokens": 0}),
        ("--max-client-batch-size 8", {}, {"max_client_batch_size": 8}),
        ("--served-model-name gpt-4o", {}, {"served_model_names": ("gpt-4o",)}),
        ("--served-model-name a,b/c", {"SERVED_MODEL_NAME": "x"}, {"served_model_names": ("a", "b/c")}),
        ("", {"SERVED_MODEL_NAME": "a, b"}, {"served_model_names": ("a", "b")}),
        ("", {"MAX_CLIENT_BATCH_SIZE": "8"}, {"max_client_batch_size": 8}),
        ("--payload-limit 100", {}, {"payload_limit": 100}),
        ("", {"PAYLOAD_LIMIT": "100"}, {"payload_limit": 100}),
        ("--validation-workers 4", {}, {"validation_workers": 4}),
        ("", {"VALIDATION_WORKERS": "1"}, {"validation_workers": 1}),
        ("--tokenizer-config-path /t.json", {}, {"tokenizer_config_path": "/t.json"}),
        ("", {"TOKENIZER_CONFIG_PATH": "/t.json"}, {"tokenizer_config_path": "/t.json"}),
        ("--disable-grammar-support", {}, {"is_grammar_disabled": True}),
        ("", {"DISABLE_GRAMMAR_SUPPORT": "1"}, {"is_grammar_disabled": True}),
        ("", {"DISABLE_GRAMMAR_SUPPORT": "false"}, {}),
        ("--enable-prefill-logprobs", {}, {"has_prompt_logprobs": True}),
        ("--max-batch-prefill-tokens 64", {}, {"max_batch_prefill_tokens": 64}),
        ("", {"MAX_BATCH_PREFILL_TOKENS": "64"}, {"max_batch_prefill_tokens": 64}),
        ("--max-batch-total-tokens 99", {}, {"max_batch_total_tokens": 99}),
        ("", {"MAX_BATCH_TOTAL_TOKENS": "99"}, {"max_batch_total_tokens": 99}),
        (
            "--max-total-tokens 99 --max-batch-total-tokens 99 --max-batch-prefill-tokens 99",
            {},
            {"max_total_tokens": 99, "max_batch_total_tokens": 99, "max_batch_prefill_tokens": 99},
        ),
        ("--max-batch-size 3", {}, {"max_batch_size": 3}),
        ("", {"MAX_BATCH_SIZE": "3"}, {"max_batch_size": 3}),
        ("--target-inter-token-latency 0.1", {}, {"target_inter_token_latency_s": 0.1}),
        ("", {"TARGET_INTER_TOKEN_LATENCY": "0"}, {"target_inter_token_latency_s": 0.0}),
        ("--cuda-memory-fraction 0.5", {}, {"memory_fraction": 0.5}),
        ("", {"CUDA_MEMORY_FRACTION": "0.5"}, {"memory_fraction": 0.5}),
        ("--huggingface-hub-cache /data", {}, {"huggingface_hub_cache": "/data"}),
        ("", {"HUGGINGFACE_HUB_CACHE": "/data"}, {"huggingface_hub_cache": "/data"}),
        ("--api-key k", {}, {"api_key": "k"}),
        ("", {"API_KEY": "k"}, {"api_key": "k"}),
        ("--cors-allow-origin http://a", {}, {"cors_allow_origin": ("http://a",)}),
        (
            "--cors-allow-origin http://a --cors-allow-origin http://b",
            {"CORS_ALLOW_ORIGIN": "http://c"},
            {"cors_allow_origin": ("http://a", "http://b")},
        ),
        ("", {"CORS_ALLOW_ORIGIN": "http://c"}, {"cors_allow_origin": ("http://c",)}),
        ("--graceful-termination-timeout 0", {}, {"graceful_termination_timeout_s": 0}),
        ("-g 5", {}, {"graceful_termination_timeout_s": 5}),
        ("", {"GRACEFUL_TERMINATION_TIMEOUT": "5"}, {"graceful_termination_timeout_s": 5}),
        ("--strict-tgi", {}, {"is_strict_tgi": True}),
        ("", {"STRICT_TGI": "true"}, {"is_strict_tgi": True}),
        ("--json-output", {}, {"is_json_output": True}),
        ("", {"JSON_OUTPUT": "True"}, {"is_json_output": True}),
        ("--otlp-endpoint http://c:4317", {}, {"otlp_endpoint": "http://c:4317"}),
        ("", {"OTLP_SERVICE_NAME": "tgi"}, {"otlp_service_name": "tgi"}),
        ("--json-output", {"JSON_OUTPUT": "0"}, {"is_json_output": True}),
        ("--env", {}, {"is_runtime_logged": True}),
        ("-e", {}, {"is_runtime_logged": True}),
        ("", {"ENV": "prod"}, {}),
        ("", {"PREFIX_CACHING": "0"}, {"is_prefix_caching": False}),
        ("", {"PREFIX_CACHING": "False"}, {"is_prefix_caching": False}),
        ("", {"PREFIX_CACHING": "1"}, {}),
        ("", {"TGI_WIGGLE_ROOM": "0.5"}, {"kv_memory_share": 0.5}),
        ("", {"LOG_LEVEL": "WARN"}, {"log_level": "WARN"}),
        ("", {"LOG_LEVEL": "text_generation_router=debug,warn"}, {"log_level": "text_generation_router=debug,warn"}),
        ("", {"OMP_NUM_THREADS": "4"}, {"omp_num_threads": 4}),
        ("", {"OMP_NUM_THREADS": "4,2"}, {"omp_num_threads": 4}),
        ("", {"COMPUTE_TYPE": "cpu+x"}, {"compute_type": "cpu+x"}),
        ("", {"GIT_SHA": "0f3a", "DOCKER_LABEL": "sha-0f3a"}, {"build_sha": "0f3a", "docker_label": "sha-0f3a"}),
        ("", {"GIT_SHA": "", "DOCKER_LABEL": ""}, {}),
        ("--num-shard 1 --sharded false --speculate 0 --usage-stats off", {}, {}),
        ("--cuda-graphs 0", {}, {"graph_sizes": (0,)}),
        ("--cuda-graphs 1,2,4", {"CUDA_GRAPHS": "8"}, {"graph_sizes": (1, 2, 4)}),
        ("", {"CUDA_GRAPHS": "8,1"}, {"graph_sizes": (8, 1)}),
        ("--disable-overlap", {}, {"is_overlap_disabled": True}),
        ("", {"DISABLE_OVERLAP": "true"}, {"is_overlap_disabled": True}),
        ("--sharded 0", {"NUM_SHARD": "1"}, {}),
        ("", {"TRUST_REMOTE_CODE": "false", "NGROK": "0", "PREFILL_CHUNKING": "true"}, {}),
        ("--speculate 2", {}, {"max_draft_tokens": 2}),
        ("--speculative-decoding 2", {}, {"max_draft_tokens": 2}),
        ("--speculative-decoding 2 --speculate 2", {}, {"max_draft_tokens": 2}),
        ("", {"SPECULATE": "3"}, {"max_draft_tokens": 3}),
        ("--speculate 0", {"SPECULATE": "3"}, {}),
        ("--shard-timeout 3", {}, {"shard_timeout_s": 3}),
        ("", {"SHARD_TIMEOUT": "3"}, {"shard_timeout_s": 3}),
        ("", {"UNRELATED": "x", "PATH": "/bin"}, {}),
    ],
)
def test_values(line: str, environ: dict[str, str], changes: dict[str, Any]) -> None:
    args = parse(line, **environ)
    assert configurations(args) == defaults(changes)


@pytest.mark.parametrize("name", ["PORT", "PROMETHEUS_PORT", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["tcp://10.96.0.1:9090", "udp://10.96.0.1:53", "tcp://[fd00::1]:80"])
def test_a_service_of_kubernetes_is_no_port(name: str, value: str) -> None:
    (warning,) = parse("", **{name: value}).warnings
    assert warning.startswith(f"the variable {name} is ignored: {value} is what Kubernetes says of a service")


@pytest.mark.parametrize("value", ["tcp:", "http://10.96.0.1:9090", "80 tcp://10.96.0.1:9090", "x"])
def test_other_texts_in_place_of_a_port_are_usage_errors(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = outcome(["--model-id", "m"], {"PROMETHEUS_PORT": value}, capsys)
    assert (code, message) == (2, f"error: variable PROMETHEUS_PORT: invalid port value: {value!r}")


def test_the_model_may_come_from_the_environment() -> None:
    assert parse_args([], {"MODEL_ID": "from/variable"}).model_id == "from/variable"


TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29400",
}
"""What torchrun gives the second of two processes on one host."""
BROKEN_TORCHRUN = "RANK must be < WORLD_SIZE and MASTER_PORT set, as torchrun does: unset RANK, or fix that"
DEVICES = {"CUDA_VISIBLE_DEVICES": "0,1,2"}


@pytest.fixture(autouse=True)
def torch_is_built_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Visible devices count, whatever torch the tests run with."""
    monkeypatch.setattr(server.launcher.sharding, "can_use_gpus", lambda: True)


def on_one_host(size: int, **changes: Any) -> Sharding:
    return Sharding(size=size, ranks=tuple(range(size)), local_size=size, **changes)


@pytest.mark.parametrize(
    ("line", "environ", "sharding"),
    [
        # TGI's six rows, each with and without devices where that makes a difference; what it refuses is further down.
        ("", {}, Sharding()),
        ("", DEVICES, on_one_host(3)),
        ("--num-shard 2", {}, on_one_host(2)),
        ("--num-shard 2", DEVICES, on_one_host(2)),
        ("--sharded true", DEVICES, on_one_host(3)),
        ("--sharded true --num-shard 2", {}, on_one_host(2)),
        ("--sharded false", DEVICES, Sharding()),
        ("--sharded false --num-shard 2", {}, on_one_host(2)),
        ("", {"SHARDED": "true", "NUM_SHARD": "2"}, on_one_host(2)),
        ("--num-shard 2", {"NUM_SHARD": "4"}, on_one_host(2)),
        # What counts as a visible device.
        ("", {"CUDA_VISIBLE_DEVICES": "GPU-8f6"}, Sharding()),
        ("", {"CUDA_VISIBLE_DEVICES": "0,1", "NVIDIA_VISIBLE_DEVICES": "0,1,2"}, on_one_host(2)),
        ("", {"NVIDIA_VISIBLE_DEVICES": "0,1,2", "ZE_AFFINITY_MASK": "0"}, on_one_host(3)),
        ("", {"ZE_AFFINITY_MASK": "0,1"}, on_one_host(2)),
        ("", {"CUDA_VISIBLE_DEVICES": ""}, Sharding()),
        # Where they meet.
        ("--num-shard 2 --master-port 29501", {}, on_one_host(2, port=29501)),
        ("--num-shard 2 --master-addr ::1 --master-port 0", {}, on_one_host(2, address="::1")),
        ("--num-shard 2", {"MASTER_ADDR": "h", "MASTER_PORT": "7"}, on_one_host(2, address="h", port=7)),
        # Several hosts: the same command but for --node-rank.
        (
            "--num-shard 4 --nnodes 2 --master-addr h",
            {},
            Sharding(size=4, num_hosts=2, ranks=(0, 1), local_size=2, address="h", port=29500),
        ),
        (
            "--num-shard 4 --nnodes 2 --node-rank 1 --master-addr h --master-port 7",
            {},
            Sharding(size=4, num_hosts=2, ranks=(2, 3), local_size=2, address="h", port=7),
        ),
        (
            "",
            {"NUM_SHARD": "3", "NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "h"},
            Sharding(size=3, num_hosts=3, ranks=(2,), local_size=1, address="h", port=29500),
        ),
        (
            "--num-shard 2 --nnodes 1 --node-rank 0",
            {},
            on_one_host(2),
        ),
        # torchrun's variables: this launcher is one rank.
        (
            "",
            TORCHRUN,
            Sharding(
                size=2,
                ranks=(1,),
                first_local_rank=1,
                local_size=2,
                address="10.0.0.1",
                port=29400,
                is_torchrun=True,
            ),
        ),
        (
            "--num-shard 4",
            {**TORCHRUN, "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"},
            Sharding(size=4, num_hosts=2, ranks=(2,), local_size=2, address="10.0.0.1", port=29400, is_torchrun=True),
        ),
        (
            "--sharded false",
            {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1"},
            Sharding(port=1, is_torchrun=True),
        ),
        ("--sharded true", TORCHRUN, parse_args(["--model-id", "m"], TORCHRUN).sharding),
        ("", {"RANK": "1"}, Sharding()),
        ("--num-shard 2", {"WORLD_SIZE": "4", "LOCAL_RANK": "1"}, on_one_host(2)),
    ],
)
def test_shards(line: str, environ: dict[str, str], sharding: Sharding) -> None:
    args = parse(line, **environ)
    assert configurations(args) == defaults({"sharding": sharding})


@pytest.mark.parametrize("line", ["", "--device cuda"])
def test_a_build_of_torch_for_gpus_counts_them(line: str) -> None:
    assert parse(line, **DEVICES).sharding == on_one_host(3)


@pytest.mark.parametrize(
    ("line", "is_gpu_build"), [("", False), ("--device cuda", False), ("--device cpu", True), ("--device cpu", False)]
)
def test_gpus_that_nothing_would_use_do_not_count(
    line: str, is_gpu_build: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image for the processor on a host with GPUs has one shard."""
    monkeypatch.setattr(server.launcher.sharding, "can_use_gpus", lambda: is_gpu_build)
    assert parse(line, **DEVICES).sharding == Sharding()
    assert parse(f"{line} --num-shard 2", **DEVICES).sharding == on_one_host(2)


@pytest.mark.parametrize(
    ("versions", "is_gpu_build"),
    [
        ("cuda: Optional[str] = None\nhip = None", False),
        ("cuda: Optional[str] = '12.8'\nhip = None", True),
        ("cuda = None\nhip = '6.4'", True),
    ],
)
def test_the_build_of_torch_is_read_without_loading_it(
    versions: str, is_gpu_build: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "torch"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('loaded')")
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.syspath_prepend(tmp_path)
    assert not can_use_gpus(), "there is no version.py"
    (folder / "version.py").write_text(f"from typing import Optional\n{versions}")
    assert can_use_gpus() == is_gpu_build
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not can_use_gpus()


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"])
@pytest.mark.parametrize("text", ["all", "void"])
def test_all_devices_are_counted(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.launcher.sharding, "_num_nvidia_devices", lambda: 4)
    assert parse("", **{name: text}).sharding == on_one_host(4)


MISSING_MODEL = "--model-id is missing: give a folder or a Hub id, e.g. --model-id Qwen/Qwen2.5-0.5B-Instruct"
DTYPES = "(choose from auto, float32, bfloat16, float16)"


@pytest.mark.parametrize(
    ("line", "environ", "message"),
    [
        ("--no-such-flag", {}, "unrecognized arguments: --no-such-flag"),
        ("--num_shard 1", {}, "unrecognized arguments: --num_shard 1 (did you mean --num-shard?)"),
        ("--max-total 5", {}, "unrecognized arguments: --max-total 5 (did you mean --max-total-tokens?)"),
        ("--Port 5", {}, "unrecognized arguments: --Port 5 (did you mean --port?)"),
        ("-x", {}, "unrecognized arguments: -x"),
        ("--max-model-len 5", {}, "unrecognized arguments: --max-model-len 5"),
        ("--hostnam x --prot=3", {}, "unrecognized arguments: --hostnam x --prot=3 (did you mean --hostname, --port?)"),
        ("stray", {}, "unrecognized arguments: stray"),
        ("--port", {}, "argument --port/-p: expected one argument"),
        ("--port x", {}, "argument --port/-p: invalid port value: 'x'"),
        ("--port 65536", {}, "argument --port/-p: invalid port value: '65536'"),
        ("--port -1", {}, "argument --port/-p: invalid port value: '-1'"),
        ("-p 1.5", {}, "argument --port/-p: invalid port value: '1.5'"),
        ("--port 1 --port 2", {}, "argument --port/-p: given more than once"),
        ("--port 1 -p 1", {}, "argument --port/-p: given more than once"),
        ("--json-output --json-output", {}, "argument --json-output: given more than once"),
        ("--json-output=true", {}, "argument --json-output: ignored explicit argument 'true'"),
        ("--json-output true", {}, "unrecognized arguments: true"),
        ("--max-total-tokens 0", {}, "argument --max-total-tokens: invalid positive integer value: '0'"),
        ("--max-input-tokens 1.5", {}, "argument --max-input-tokens: invalid positive integer value: '1.5'"),
        ("--max-input-tokens ''", {}, "argument --max-input-tokens: invalid positive integer value: ''"),
        ("--max-best-of 0", {}, "argument --max-best-of: invalid positive integer value: '0'"),
        ("--max-stop-sequences -1", {}, "argument --max-stop-sequences: invalid count value: '-1'"),
        ("--payload-limit 2MB", {}, "argument --payload-limit: invalid positive integer value: '2MB'"),
        ("--sharded yes", {}, "argument --sharded: invalid boolean value: 'yes'"),
        ("--num-shard two", {}, "argument --num-shard: invalid count value: 'two'"),
        ("--speculate 33", {}, "argument --speculate: invalid draft length value: '33'"),
        ("--speculate -1", {}, "argument --speculate: invalid draft length value: '-1'"),
        ("--nnodes 0", {}, "argument --nnodes: invalid positive integer value: '0'"),
        ("--node-rank -1", {}, "argument --node-rank: invalid count value: '-1'"),
        ("--master-port 65536", {}, "argument --master-port: invalid port value: '65536'"),
        ("--shard-timeout 0", {}, "argument --shard-timeout: invalid positive integer value: '0'"),
        ("", {"SHARD_TIMEOUT": "soon"}, "variable SHARD_TIMEOUT: invalid positive integer value: 'soon'"),
        ("", {**TORCHRUN, "RANK": "one"}, "variable RANK: invalid count value: 'one'"),
        ("", {**TORCHRUN, "WORLD_SIZE": "0"}, "variable WORLD_SIZE: invalid positive integer value: '0'"),
        ("--cuda-graphs 1,x", {}, "argument --cuda-graphs: invalid list of integers value: '1,x'"),
        ("--cuda-memory-fraction 0", {}, "argument --cuda-memory-fraction: invalid fraction value: '0'"),
        ("--cuda-memory-fraction 1.1", {}, "argument --cuda-memory-fraction: invalid fraction value: '1.1'"),
        ("--cuda-memory-fraction nan", {}, "argument --cuda-memory-fraction: invalid fraction value: 'nan'"),
        ("--rope-factor 0.5", {}, "argument --rope-factor: invalid factor value: '0.5'"),
        ("--rope-factor inf", {}, "argument --rope-factor: invalid factor value: 'inf'"),
        (
            "--rope-scaling su",
            {},
            "argument --rope-scaling: invalid choice: 'su' (choose from default, linear, dynamic, llama3, yarn)",
        ),
        ("--dtype int8", {}, f"argument --dtype: invalid choice: 'int8' {DTYPES}"),
        (
            "--kv-cache-dtype fp8",
            {},
            "argument --kv-cache-dtype: invalid choice: 'fp8' (keys and values are kept in 16 bits (float32 with "
            "--dtype float32), start without it)",
        ),
        ("--usage-stats maybe", {}, "argument --usage-stats: invalid choice: 'maybe' (choose from on, off, no-stack)"),
        (
            "--quantize q4",
            {},
            "argument --quantize: invalid choice: 'q4' (choose from auto-round, awq, compressed-tensors, eetq, fp8, "
            "gguf, gptq, int4, int8, bitsandbytes, bitsandbytes-fp4, bitsandbytes-nf4)",
        ),
        (
            "-g soon",
            {},
            "argument --graceful-termination-timeout/-g: invalid seconds value: 'soon'",
        ),
        ("--api-key ''", {}, "argument --api-key: invalid key value: ***"),
        ("--api-key ' k '", {}, "argument --api-key: invalid key value: ***"),
        (
            "--max-total-tokens 99999999999999999999",
            {},
            "argument --max-total-tokens: invalid positive integer value: '99999999999999999999'",
        ),
        ("", {"API_KEY": "k\n"}, "variable API_KEY: invalid key value: ***"),
        ("", {"COMPUTE_TYPE": "日本"}, "variable COMPUTE_TYPE: invalid header text value: '日本'"),
        ("--waiting-served-ratio x", {}, "argument --waiting-served-ratio: invalid number value: 'x'"),
        ("", {"PORT": "x"}, "variable PORT: invalid port value: 'x'"),
        ("", {"MAX_TOTAL_TOKENS": "x"}, "variable MAX_TOTAL_TOKENS: invalid positive integer value: 'x'"),
        ("", {"JSON_OUTPUT": "yes"}, "variable JSON_OUTPUT: invalid boolean value: 'yes'"),
        ("", {"TRUST_REMOTE_CODE": "2"}, "variable TRUST_REMOTE_CODE: invalid boolean value: '2'"),
        ("", {"OMP_NUM_THREADS": "0"}, "variable OMP_NUM_THREADS: invalid thread count value: '0'"),
        ("", {"PREFIX_CACHING": "maybe"}, "variable PREFIX_CACHING: invalid boolean value: 'maybe'"),
        ("", {"TGI_WIGGLE_ROOM": "2"}, "variable TGI_WIGGLE_ROOM: invalid fraction value: '2'"),
        ("", {"LOG_LEVEL": "loud"}, "variable LOG_LEVEL: invalid log filter value: 'loud'"),
        ("", {"LOG_LEVEL": "server=loud"}, "variable LOG_LEVEL: invalid log filter value: 'server=loud'"),
        ("", {"DTYPE": "int8"}, f"variable DTYPE: invalid choice: 'int8' {DTYPES}"),
    ],
)
def test_usage_errors(line: str, environ: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(line, **environ)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n\nUsage: {USAGE}\n\nFor more information, try '--help'.\n"


def misspellings(word: str) -> list[str]:
    """A letter left out, two letters swapped, and a hyphen left out or written as a low line."""
    middle = len(word) // 2
    start, first, second, rest = word[:middle], word[middle], word[middle + 1], word[middle + 2 :]
    spellings = [f"{start}{second}{rest}", f"{start}{second}{first}{rest}"]
    spellings += [word.replace("-", ""), word.replace("-", "_")]
    return [spelling for spelling in spellings if spelling != word]


def test_a_misspelt_flag_names_the_one_that_was_meant() -> None:
    names = [f"--{flag.name}" for flag in FLAGS]
    for flag in FLAGS:
        for spelling in {f"--{spelling}" for spelling in misspellings(flag.name)} - {*names}:
            assert suggestion([spelling], names) == f" (did you mean --{flag.name}?)", spelling


def test_a_misspelt_choice_names_the_one_that_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in [flag for flag in FLAGS if flag.choices and flag.effect is Effect.SERVED]:
        for choice in flag.served_choices:
            # One letter in short words is as near to several others.
            for spelling in [f"{choice}x", choice.upper(), *(misspellings(choice)[:1] if len(choice) > 6 else [])]:
                message = outcome([f"--{flag.name}", spelling], {}, capsys)
                near = set(difflib.get_close_matches(spelling.lower(), flag.served_choices, 3, 0.7))
                assert message[0] == 2
                assert f"(did you mean {choice}?)" in message[1] or len(near) > 1, message


def test_a_refused_choice_is_never_offered(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in [flag for flag in FLAGS if flag.choices]:
        refused = flag.choices if flag.effect is Effect.REFUSED else flag.refused_choices
        for spelling in ["nope", *(f"{choice}x" for choice in refused or ())]:
            code, message = outcome([f"--{flag.name}", spelling], {}, capsys)
            offers = message.partition(repr(spelling))[2]
            assert code == 2 and not any(re.search(rf"\b{choice}\b", offers) for choice in refused or ()), message


@pytest.mark.parametrize(("argv", "environ"), [([], {}), (["--port", "80"], {}), ([], {"MODEL_ID": ""})])
def test_a_missing_model_is_a_usage_error_with_an_example(
    argv: list[str], environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(argv, environ, capsys) == (2, f"error: {MISSING_MODEL}")


QUANTIZE_WE_HAVE = (
    "is not supported: serve a checkpoint in another format; "
    "auto-round, awq, compressed-tensors, eetq, fp8, gguf, gptq, int4, int8 are supported"
)
NO_TUNNEL = "is not supported: put a reverse proxy in front of the server"


@pytest.mark.parametrize(
    ("line", "environ", "message"),
    [
        ("--quantize exl2", {}, f"--quantize exl2 {QUANTIZE_WE_HAVE}"),
        ("--quantize bitsandbytes-nf4 --strict-tgi", {}, f"--quantize bitsandbytes-nf4 {QUANTIZE_WE_HAVE}"),
        ("--strict-tgi", {"QUANTIZE": "bitsandbytes"}, f"the variable QUANTIZE bitsandbytes {QUANTIZE_WE_HAVE}"),
        ("", {"QUANTIZE": "marlin"}, f"the variable QUANTIZE marlin {QUANTIZE_WE_HAVE}"),
        (
            "--quantize awq --dtype float16 --strict-tgi",
            {},
            "Only 1 can be set between dtype and quantize, as they both decide how goes the final model.",
        ),
        ("--num-shard 0", {}, "`num_shard` cannot be < 1"),
        (
            "--num-shard 64",
            {},
            "--num-shard means 64 shards on this host, more than the 8 that a processor serves here",
        ),
        ("--num-shard 4", DEVICES, "--num-shard means 4 shards on this host, more than the 3 GPUs that can be seen"),
        ("--sharded true --num-shard 1", {}, "`sharded` is true but `num_shard` <= 1"),
        ("--sharded true", {"NUM_SHARD": "1"}, "`sharded` is true but `num_shard` <= 1"),
        ("--sharded true", {}, "`sharded` is true but only found 0 CUDA devices"),
        ("--sharded true", {"CUDA_VISIBLE_DEVICES": "0"}, "`sharded` is true but only found 1 CUDA devices"),
        ("--sharded true", {"ZE_AFFINITY_MASK": "0"}, "`sharded` is true but only found 1 CUDA devices"),
        ("--node-rank 1", {}, "--node-rank 1 must be < --nnodes 1: hosts are counted from 0"),
        (
            "--num-shard 4 --nnodes 2 --master-addr h",
            {"NODE_RANK": "2"},
            "--node-rank 2 must be < --nnodes 2: hosts are counted from 0",
        ),
        ("--nnodes 2 --master-addr h", {}, "--num-shard 1 can't be spread evenly over --nnodes 2"),
        ("--num-shard 3 --nnodes 2 --master-addr h", {}, "--num-shard 3 can't be spread evenly over --nnodes 2"),
        (
            "--nnodes 2 --master-addr h",
            {"CUDA_VISIBLE_DEVICES": "0,1,2"},
            "--num-shard 3 can't be spread evenly over --nnodes 2",
        ),
        (
            "--num-shard 2 --nnodes 2",
            {},
            "--nnodes needs --master-addr: an address of the first host that the others can reach",
        ),
        ("--num-shard 3", TORCHRUN, "--num-shard 3, but torchrun starts 2: leave --num-shard out"),
        ("--nnodes 1", TORCHRUN, "torchrun says which hosts there are: leave --nnodes out"),
        ("--node-rank 0", TORCHRUN, "torchrun says which hosts there are: leave --node-rank out"),
        ("", {**TORCHRUN, "RANK": "2"}, BROKEN_TORCHRUN),
        ("", {**TORCHRUN, "MASTER_PORT": ""}, BROKEN_TORCHRUN),
        (
            "--speculate 2 --speculative-decoding 3",
            {},
            "--speculate 2 and --speculative-decoding 3: give one of them",
        ),
        (
            "--kv-cache-dtype fp8_e5m2",
            {},
            "--kv-cache-dtype is not supported: keys and values are kept in 16 bits (float32 with --dtype float32), "
            "start without it",
        ),
        ("--lora-adapters a@b,c@d@e", {}, f"Invalid LoRA adapter format: c@d@e: {ADAPTER_FIX}"),
        ("--lora-adapters a=b=c", {}, f"Invalid LoRA adapter format: a=b=c: {ADAPTER_FIX}"),
        ("--lora-adapters a,,b", {}, f"Invalid LoRA adapter format: : {ADAPTER_FIX}"),
        ("--lora-adapters a=x,a=y", {}, "--lora-adapters a: that name is taken, give the adapter another, NAME=y"),
        (
            "--served-model-name a,b --lora-adapters b",
            {},
            "--lora-adapters b: that name is taken, give the adapter another, NAME=b",
        ),
        ("--ngrok", {}, "`ngrok-authtoken` must be set when using ngrok tunneling"),
        ("--ngrok --ngrok-authtoken t", {}, "`ngrok-edge` must be set when using ngrok tunneling"),
        ("--ngrok --ngrok-authtoken t --ngrok-edge e", {}, f"--ngrok {NO_TUNNEL}"),
        ("--validation-workers 0", {}, "`validation_workers` must be > 0"),
        ("", {"VALIDATION_WORKERS": "0"}, "`validation_workers` must be > 0"),
        ("--max-batch-size 0", {}, "`max_batch_size` must be > 0"),
        (
            "--max-input-tokens 5 --max-input-length 6",
            {},
            "Both `max_input_tokens` (5) and `max_input_length` (6) are set. Please define only "
            "`max_input_tokens` as `max_input_length is deprecated for naming consistency.",
        ),
        (
            "--max-input-tokens 5",
            {"MAX_INPUT_LENGTH": "5"},
            "Both `max_input_tokens` (5) and `max_input_length` (5) are set. Please define only "
            "`max_input_tokens` as `max_input_length is deprecated for naming consistency.",
        ),
        ("--max-input-tokens 5 --max-total-tokens 5", {}, "`max_input_tokens`(5) must be < `max_total_tokens`(5)"),
        ("--max-input-length 6", {"MAX_TOTAL_TOKENS": "5"}, "`max_input_tokens`(6) must be < `max_total_tokens`(5)"),
        (
            "--max-total-tokens 101 --max-batch-total-tokens 100",
            {},
            "`max_total_tokens` must be <= `max_batch_total_tokens`. Given: 101 and 100",
        ),
        (
            "--max-batch-prefill-tokens 101 --max-batch-total-tokens 100",
            {},
            "`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. Given: 101 and 100",
        ),
    ],
)
def test_what_cannot_be_served(
    line: str, environ: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model-id", "m", *shlex.split(line)]
    assert outcome(argv, environ, capsys) == (1, f'Error: ArgumentValidation("{message}")')


@pytest.mark.parametrize(
    ("line", "environ", "warnings"),
    [
        ("--trust-remote-code", {}, ["--trust-remote-code has no effect: no code of a repository is ever run"]),
        ("", {"TRUST_REMOTE_CODE": "1"}, ["the variable TRUST_REMOTE_CODE has no effect"]),
        ("--disable-custom-kernels", {}, ["--disable-custom-kernels has no effect"]),
        ("--usage-stats on", {}, ["--usage-stats has no effect: nothing is ever reported"]),
        ("--usage-stats no-stack", {}, ["--usage-stats has no effect"]),
        ("--weights-cache-override /w", {}, ["--weights-cache-override has no effect: give that folder"]),
        ("--shard-uds-path /tmp/x", {}, ["--shard-uds-path has no effect"]),
        ("--prometheus-port 9000", {}, ["--prometheus-port has no effect: metrics are at /metrics"]),
        (
            "--waiting-served-ratio 0.3 --max-waiting-tokens 20",
            {},
            ["--waiting-served-ratio has no effect", "--max-waiting-tokens has no effect"],
        ),
        ("--ngrok-edge e", {}, ["--ngrok-edge has no effect: no tunnel is opened"]),
        ("", {"NGROK_AUTHTOKEN": "t"}, ["the variable NGROK_AUTHTOKEN has no effect"]),
        ("", {"ATTENTION": "paged"}, ["the variable ATTENTION has no effect"]),
        ("", {"PREFILL_CHUNKING": "0"}, ["the variable PREFILL_CHUNKING has no effect"]),
        ("", {"USE_FLASH_ATTENTION": "false"}, ["the variable USE_FLASH_ATTENTION has no effect"]),
    ],
)
def test_what_has_no_effect_is_accepted_and_told_once(line: str, environ: dict[str, str], warnings: list[str]) -> None:
    args = parse(line, **environ)
    assert configurations(args) == defaults({})
    assert len(args.warnings) == len(warnings)
    for warning, start in zip(args.warnings, warnings, strict=True):
        assert warning.startswith(start)


NEEDED = {
    "sharded": ["--num-shard", "7"],
    "nnodes": ["--num-shard", "7", "--master-addr", "h"],
    "node-rank": ["--num-shard", "8", "--nnodes", "8", "--master-addr", "h"],
}
"""Flags that must be given beside another one."""
SAMPLES = {POSITIVE: "7", COUNT: "7", PORT: "7", NUMBER: "0.7", FRACTION: "0.7", FACTOR: "7", BOOLEAN: "true"}


@pytest.mark.parametrize("flag", FLAGS, ids=[flag.name for flag in FLAGS])
def test_every_flag_and_its_twin_do_the_same(flag: Flag, capsys: pytest.CaptureFixture[str]) -> None:
    text = flag.choices[-1] if flag.choices else SAMPLES.get(flag.value, "7")
    line = f"--{flag.name}" if flag.is_switch else f"--{flag.name} {text}"
    others = [] if flag.name == "model-id" else ["--model-id", "m", *NEEDED.get(flag.name, [])]
    by_flag = outcome([*others, *line.split()], {}, capsys)
    if not flag.has_variable:
        return
    environ = {flag.variable: "true" if flag.is_switch else text}
    by_variable = outcome(others, environ, capsys)
    assert by_flag[0] == by_variable[0]
    assert by_flag[1].replace(f"--{flag.name}", "X", 1) == by_variable[1].replace(f"the variable {flag.variable}", "X")
    assert by_flag[0] == (1 if flag.effect is Effect.REFUSED or text in flag.refused_choices else 0)
    if flag.effect is Effect.SERVED and by_flag[0] == 0:
        values = [parse_args([*others, *line.split()], {}), parse_args(others, environ)]
        by_flag_args, by_variable_args = (dataclasses.replace(args, echo="") for args in values)
        assert by_flag_args == by_variable_args


def test_every_flag_of_tgi_is_known() -> None:
    """The table has the flags of TGI 3.3.6's launcher, and ours."""
    tgi = """model-id revision validation-workers sharded num-shard quantize speculate dtype kv-cache-dtype
        trust-remote-code max-concurrent-requests max-best-of max-stop-sequences max-top-n-tokens max-input-tokens
        max-input-length max-total-tokens waiting-served-ratio max-batch-prefill-tokens max-batch-total-tokens
        max-waiting-tokens max-batch-size cuda-graphs hostname port prometheus-port shard-uds-path master-addr
        master-port huggingface-hub-cache weights-cache-override disable-custom-kernels cuda-memory-fraction
        rope-scaling rope-factor json-output otlp-endpoint otlp-service-name cors-allow-origin api-key watermark-gamma
        watermark-delta ngrok ngrok-authtoken ngrok-edge tokenizer-config-path disable-grammar-support env
        max-client-batch-size lora-adapters usage-stats payload-limit enable-prefill-logprobs
        graceful-termination-timeout"""
    ours = """device disable-overlap disable-ui strict-tgi quantize-head nnodes node-rank shard-secret shard-timeout
        served-model-name speculative-decoding max-logit-bias generation-config
        max-loras max-lora-rank allow-runtime-lora-updating reasoning-parser target-inter-token-latency"""
    assert sorted(flag.name for flag in FLAGS) == sorted([*tgi.split(), *ours.split()])


def test_a_flag_is_a_row_and_the_field_it_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Flag(name="mood", fills="server.mood engine.mood", help="How the server feels", default="calm")
    monkeypatch.setitem(SECTIONS, "Feelings", (row,))
    assert parse("").server["mood"] == parse("").engine["mood"] == "calm"
    for args in (parse("--mood merry"), parse("", MOOD="merry")):
        assert args.server["mood"] == args.engine["mood"] == "merry"
    with pytest.raises(SystemExit):
        parse("--help")
    assert "How the server feels (default: calm) [env: MOOD]" in re.sub(r"\s+", " ", capsys.readouterr().out)


DERIVED = {
    "launcher": "sharding engine server echo warnings".split(),
    "engine": "model_path adapter_path lora_adapters num_threads socket_fd listen_fd may_share_memory".split(),
    "server": "lora_adapters model_path model_sha listen_fd is_listening_early engine_fd engine_silence_s "
    "is_rendering_here ready_line".split(),
}
"""Fields that no single flag fills."""


def test_every_field_is_filled_by_a_row_and_every_row_that_is_served_fills_one() -> None:
    rows = (*FLAGS, *VARIABLES)
    for part, fields in FIELDS.items():
        filled = {field for row in rows for field in row.fields_of(part)}
        assert filled | set(DERIVED[part]) == fields and filled.isdisjoint(DERIVED[part])
    for row in rows:
        is_served = row.is_ours if isinstance(row, Variable) else row.effect is Effect.SERVED
        assert bool(row.fills) == is_served, row.name
        assert {target.partition(".")[0] for target in row.fills.split()} <= {*FIELDS, "sharding"}


def test_the_table_is_honest() -> None:
    for flag in FLAGS:
        assert bool(flag.reason) == (flag.effect is not Effect.SERVED or bool(flag.refused_choices)), flag.name
        assert not (flag.choices and flag.default) or flag.default in flag.choices


@pytest.mark.parametrize(
    ("name", "stand_in"), [("bitsandbytes", "int8"), ("bitsandbytes-nf4", "int4"), ("bitsandbytes-fp4", "int4")]
)
def test_bitsandbytes_is_served_as_what_is_nearest_with_one_warning(name: str, stand_in: str) -> None:
    for args, source in (
        (parse(f"--quantize {name}"), "--quantize"),
        (parse("", QUANTIZE=name), "the variable QUANTIZE"),
    ):
        assert args.engine["quantize"] == stand_in
        assert args.warnings == (f"{source} {name} is not there and is served as {stand_in}",)
        assert f"{source} = '{name}'" in args.echo


def test_quantizations_are_those_of_the_engine() -> None:
    """A checkpoint in one of FORMATS loads without the flag, which may repeat its name; ON_LOAD needs the flag."""
    assert set(QUANTIZE) == {*FORMATS, *ON_LOAD}
    assert set(QUANTIZE_STAND_INS.values()) <= set(ON_LOAD)


def test_the_echo_says_what_was_given_and_how_but_no_secret() -> None:
    args = parse("--api-key s3cret --port 80", DTYPE="float32")
    assert args.echo == "--model-id = 'm', --port = 80, --api-key = ***, the variable DTYPE = 'float32'"


def test_help_tells_every_flag_its_variable_and_its_effect(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"], {})
    assert caught.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out).replace("- ", "-")
    for flag in FLAGS:
        assert f"--{flag.name}" in text
        assert not flag.has_variable or f"[env: {flag.variable}]" in text
    assert "text-generation-launcher --model-id" in text and "(refused: " in text and "(no effect: " in text


@pytest.mark.parametrize(
    ("line", "code", "error"),
    [
        ("--model-id m --num-shard 0", 1, 'Error: ArgumentValidation("`num_shard` cannot be < 1")'),
        ("--model-id m --port x", 2, "error: argument --port/-p: invalid port value: 'x'"),
        ("--model-id m --no-such-flag", 2, "error: unrecognized arguments: --no-such-flag"),
        ("", 2, f"error: {MISSING_MODEL}"),
        ("--help", 0, ""),
        ("--version", 0, ""),
        ("-V", 0, ""),
    ],
)
def test_exit_codes_of_the_launcher(line: str, code: int, error: str) -> None:
    environ = {"PATH": os.environ["PATH"]}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "server.launcher", *line.split()]
    run = subprocess.run(command, env=environ, cwd=root, capture_output=True, text=True, timeout=60)
    assert run.returncode == code
    assert (run.stderr.splitlines() or [""])[0] == error
