"""The command line and its environment twins: values, refusals, exit codes and their exact words."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.args import FLAGS, REFUSED_FLAGS, ArgumentError, LauncherArgs, RefusedFlag, is_ip_address, parse_args

DEFAULTS = LauncherArgs(
    model_id="m",
    revision=None,
    dtype="auto",
    hostname="0.0.0.0",
    port=3000,
    max_concurrent_requests=128,
    max_input_tokens=None,
    max_total_tokens=None,
    max_batch_prefill_tokens=None,
    max_batch_total_tokens=None,
    huggingface_hub_cache=None,
    is_prefix_caching=True,
    log_level="info",
    num_threads=None,
    compute_type=None,
)


def parse(line: str, **environ: str) -> LauncherArgs:
    return parse_args(["--model-id", "m", *line.split()], environ)


@pytest.mark.parametrize(
    ("line", "environ", "changes"),
    [
        ("", {}, {}),
        ("--model-id other/model", {}, {"model_id": "other/model"}),
        ("", {"MODEL_ID": "ignored"}, {}),
        ("--revision refs/pr/1", {}, {"revision": "refs/pr/1"}),
        ("", {"REVISION": "v1"}, {"revision": "v1"}),
        ("--dtype float32", {}, {"dtype": "float32"}),
        ("--dtype=bfloat16", {}, {"dtype": "bfloat16"}),
        ("", {"DTYPE": "float16"}, {"dtype": "float16"}),
        ("--dtype auto", {"DTYPE": "float16"}, {"dtype": "auto"}),
        ("--hostname ::1", {"HOSTNAME": "3f2a"}, {"hostname": "::1"}),
        ("", {"HOSTNAME": "3f2a"}, {"hostname": "3f2a"}),
        ("--port 0", {}, {"port": 0}),
        ("--port 65535", {"PORT": "1"}, {"port": 65535}),
        ("", {"PORT": "8080"}, {"port": 8080}),
        ("--max-concurrent-requests 1", {}, {"max_concurrent_requests": 1}),
        ("--max-input-tokens 7", {}, {"max_input_tokens": 7}),
        ("--max-input-length 7", {}, {"max_input_tokens": 7}),
        ("", {"MAX_INPUT_LENGTH": "7"}, {"max_input_tokens": 7}),
        ("--max-total-tokens 8", {"MAX_TOTAL_TOKENS": "9"}, {"max_total_tokens": 8}),
        ("--max-input-tokens 7 --max-total-tokens 8", {}, {"max_input_tokens": 7, "max_total_tokens": 8}),
        ("--max-batch-prefill-tokens 3", {}, {"max_batch_prefill_tokens": 3}),
        ("--max-batch-total-tokens 99", {}, {"max_batch_total_tokens": 99}),
        (
            "--max-total-tokens 99 --max-batch-total-tokens 99 --max-batch-prefill-tokens 99",
            {},
            {"max_total_tokens": 99, "max_batch_total_tokens": 99, "max_batch_prefill_tokens": 99},
        ),
        ("--huggingface-hub-cache /data", {}, {"huggingface_hub_cache": "/data"}),
        ("", {"HUGGINGFACE_HUB_CACHE": "/data"}, {"huggingface_hub_cache": "/data"}),
        ("", {"PREFIX_CACHING": "0"}, {"is_prefix_caching": False}),
        ("", {"PREFIX_CACHING": "False"}, {"is_prefix_caching": False}),
        ("", {"PREFIX_CACHING": "1"}, {}),
        ("", {"LOG_LEVEL": "WARN"}, {"log_level": "warning"}),
        ("", {"LOG_LEVEL": "trace"}, {"log_level": "debug"}),
        ("", {"OMP_NUM_THREADS": "4"}, {"num_threads": 4}),
        ("", {"COMPUTE_TYPE": "cpu+x"}, {"compute_type": "cpu+x"}),
        ("--num-shard 1 --sharded false --speculate 0 --usage-stats off", {}, {}),
        ("--validation-workers 2 --cuda-graphs 0 --cuda-memory-fraction 1.0", {}, {}),
        ("", {"TRUST_REMOTE_CODE": "false", "NUM_SHARD": "1", "NGROK": "0", "ENV": "prod"}, {}),
        ("", {"UNRELATED": "x", "PATH": "/bin"}, {}),
    ],
)
def test_values(line: str, environ: dict[str, str], changes: dict[str, Any]) -> None:
    assert parse(line, **environ) == dataclasses.replace(DEFAULTS, **changes)


def test_the_model_may_come_from_the_environment() -> None:
    assert parse_args([], {"MODEL_ID": "from/variable"}).model_id == "from/variable"


@pytest.mark.parametrize(
    ("line", "environ", "message"),
    [
        ("--no-such-flag", {}, "unrecognized arguments: --no-such-flag"),
        ("--max-total 5", {}, "unrecognized arguments: --max-total 5"),
        ("stray", {}, "unrecognized arguments: stray"),
        ("--port", {}, "argument --port: expected one argument"),
        ("--port x", {}, "argument --port: invalid port value: 'x'"),
        ("--port 65536", {}, "argument --port: invalid port value: '65536'"),
        ("--port -1", {}, "argument --port: invalid port value: '-1'"),
        ("--max-total-tokens 0", {}, "argument --max-total-tokens: invalid positive integer value: '0'"),
        ("--max-input-tokens 1.5", {}, "argument --max-input-tokens: invalid positive integer value: '1.5'"),
        ("", {"PORT": "x"}, "variable PORT: invalid port value: 'x'"),
        ("", {"MAX_TOTAL_TOKENS": "x"}, "variable MAX_TOTAL_TOKENS: invalid positive integer value: 'x'"),
        ("", {"OMP_NUM_THREADS": "0"}, "variable OMP_NUM_THREADS: invalid thread count value: '0'"),
        ("", {"PREFIX_CACHING": "maybe"}, "variable PREFIX_CACHING: give 1 or 0, not 'maybe'"),
        ("", {"LOG_LEVEL": "loud"}, "variable LOG_LEVEL: give debug, info, warn or error, not 'loud'"),
        (
            "",
            {"DTYPE": "int8"},
            "variable DTYPE: invalid choice: 'int8' (choose from auto, float32, bfloat16, float16)",
        ),
    ],
)
def test_usage_errors(line: str, environ: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(line, **environ)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n\nFor more information, try '--help'.\n"


def test_an_unknown_dtype_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--dtype int8")
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "argument --dtype: invalid choice: 'int8'" in error and "bfloat16" in error


def test_a_missing_model_is_a_usage_error_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args([], {})
    assert caught.value.code == 2
    assert "--model-id is missing: give a folder or a Hub id, e.g. --model-id Qwen/" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "environ", "message"),
    [
        ("--quantize gptq", {}, "--quantize is not supported yet: start without it"),
        ("--num-shard 2", {}, "--num-shard is not supported yet: start without it"),
        ("--speculate 2", {}, "--speculate is not supported yet: start without it"),
        ("--trust-remote-code", {}, "--trust-remote-code is not supported yet: start without it"),
        ("--env", {}, "--env is not supported yet: start without it"),
        ("", {"QUANTIZE": "awq"}, "the variable QUANTIZE is not supported yet: start without it"),
        ("--num-shard 1", {"SPECULATE": "3"}, "the variable SPECULATE is not supported yet: start without it"),
        ("", {"TRUST_REMOTE_CODE": "true"}, "the variable TRUST_REMOTE_CODE is not supported yet: start without it"),
        (
            "--max-input-tokens 5 --max-input-length 6",
            {},
            "Both `max_input_tokens` (5) and `max_input_length` (6) are set. Please define only "
            "`max_input_tokens` as `max_input_length is deprecated for naming consistency.",
        ),
        (
            "--max-input-tokens 5 --max-total-tokens 5",
            {},
            "`max_input_tokens`(5) must be < `max_total_tokens`(5)",
        ),
        (
            "--max-input-length 6",
            {"MAX_TOTAL_TOKENS": "5"},
            "`max_input_tokens`(6) must be < `max_total_tokens`(5)",
        ),
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
def test_what_cannot_be_served(line: str, environ: dict[str, str], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse(line, **environ)
    assert str(caught.value) == f'ArgumentValidation("{message}")'


@pytest.mark.parametrize("flag", REFUSED_FLAGS, ids=[flag.name for flag in REFUSED_FLAGS])
def test_every_flag_of_tgi_that_is_not_built_is_refused_by_name(flag: RefusedFlag) -> None:
    value = "" if flag.is_switch else "some-value"
    with pytest.raises(ArgumentError, match=f"--{flag.name} is not supported yet"):
        parse(f"--{flag.name} {value}")
    if flag.has_variable:
        with pytest.raises(ArgumentError, match=f"the variable {flag.variable} is not supported yet"):
            parse("", **{flag.variable: "true" if flag.is_switch else "some-value"})


def test_every_flag_of_tgi_is_known() -> None:
    """The names in TGI 3.3.6's `launcher/src/main.rs`; `--env` and the listener's included."""
    tgi = """model-id revision validation-workers sharded num-shard quantize speculate dtype kv-cache-dtype
        trust-remote-code max-concurrent-requests max-best-of max-stop-sequences max-top-n-tokens max-input-tokens
        max-input-length max-total-tokens waiting-served-ratio max-batch-prefill-tokens max-batch-total-tokens
        max-waiting-tokens max-batch-size cuda-graphs hostname port prometheus-port shard-uds-path master-addr
        master-port huggingface-hub-cache weights-cache-override disable-custom-kernels cuda-memory-fraction
        rope-scaling rope-factor json-output otlp-endpoint otlp-service-name cors-allow-origin api-key watermark-gamma
        watermark-delta ngrok ngrok-authtoken ngrok-edge tokenizer-config-path disable-grammar-support env
        max-client-batch-size lora-adapters usage-stats payload-limit enable-prefill-logprobs
        graceful-termination-timeout"""
    ours = [flag.name for flag in FLAGS] + [flag.name for flag in REFUSED_FLAGS]
    assert sorted(ours) == sorted(tgi.split())


def test_help_tells_every_flag_and_its_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"], {})
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in FLAGS:
        assert f"--{flag.name}" in text and flag.variable in text
    for refused in REFUSED_FLAGS:
        assert f"--{refused.name}" in " ".join(text.split())
    assert "PREFIX_CACHING" in text and "text-generation-launcher --model-id" in text


@pytest.mark.parametrize(
    ("hostname", "expected"),
    [("0.0.0.0", True), ("::", True), ("127.0.0.1", True), ("localhost", False), ("3f2a", False), ("", False)],
)
def test_what_is_an_ip_address(hostname: str, expected: bool) -> None:
    assert is_ip_address(hostname) is expected


@pytest.mark.parametrize(
    ("line", "code", "error"),
    [
        (
            "--model-id m --num-shard 2",
            1,
            'Error: ArgumentValidation("--num-shard is not supported yet: start without it")',
        ),
        ("--model-id m --port x", 2, "error: argument --port: invalid port value: 'x'"),
        ("--help", 0, ""),
    ],
)
def test_exit_codes_of_the_launcher(line: str, code: int, error: str) -> None:
    environ = {"PATH": os.environ["PATH"]}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "server.launcher", *line.split()]
    run = subprocess.run(command, env=environ, cwd=root, capture_output=True, text=True, timeout=60)
    assert run.returncode == code
    assert run.stderr.startswith(error)
    assert "Traceback" not in run.stderr
