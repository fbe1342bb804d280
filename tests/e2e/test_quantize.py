"""`text-generation-server quantize` as a process: output, exit codes, one-line refusals, signals; its folder served."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from engine import cli
from engine.link.errors import StartError
from tests.diagonal import long_but
from tests.e2e.launched import launched
from tests.tiny_model import write_tiny_qwen2

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "LICENSE"
TIMEOUT_S = 120
SMALL = ("--groupsize", "32", "--sample-tokens", "64", "--perplexity-tokens", "512")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_qwen2(folder)
    return folder


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "engine.cli", "quantize", *map(str, args)]


def run(*args: object, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environ}
    return subprocess.run(
        command(*args), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def test_it_quantizes_and_the_launcher_serves_the_folder(model_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    result = run(model_dir, output, "--dataset", TEXT, *SMALL)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [str(output)]
    assert f"Perplexity on the last 512 tokens of {TEXT}: " in result.stderr
    with launched(str(output), tmp_path) as server:
        assert "gptq, 4 bits, groups of 32" in server.log
        body = {"inputs": "Licensed under", "parameters": {"max_new_tokens": 8}}
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=TIMEOUT_S)
        assert answer.status_code == 200, answer.text


def test_the_log_in_json_and_without_effect(model_dir: Path, tmp_path: Path) -> None:
    result = run(model_dir, tmp_path / "out", "--method", "int8", "--json-output", "--trust-remote-code")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert lines[0]["message"].startswith("--trust-remote-code has no effect")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "--method gptq needs text to calibrate with: give --dataset FILE (text, or JSON lines), or take"),
        (["--method", "awq"], "--method awq needs text to calibrate with: give --dataset FILE"),
        (["--method", "awq", "--bits", "8"], "--method awq has 4 bits, not 8: change --bits or leave it out"),
        (["--bits", "5"], "--method gptq has 2 or 3 or 4 or 8 bits, not 5"),
        (["--groupsize", "0"], "--groupsize 0 is no size of a group: give -1 (one group), 32, 64 or 128"),
        (["--percdamp", "nan"], "--percdamp nan is not a share: give a number above 0 and below 1, like 0.01"),
        (["--method", "int8", "--act-order"], "--act-order is for --method gptq, not int8: leave it out"),
        (["--num-samples", "0", "--dataset", "x"], "--num-samples 0 is too few: give 1 or more"),
        (["--sample-tokens", "1", "--dataset", "x"], "--sample-tokens 1 is too few: give 16 or more"),
        (["--perplexity-tokens", "-1", "--dataset", "x"], "--perplexity-tokens -1 is too few: give 0 or more"),
        (["--perplexity-tokens", "1", "--dataset", "x"], "--perplexity-tokens 1 leaves nothing to predict"),
        (["--dataset", "{}/none.txt", "--groupsize", "32"], "none.txt is not there: give the path of a text file"),
        (["--dataset", str(TEXT)], "--groupsize 128 does not divide the 64 inputs of self_attn.q_proj: give 32 or"),
        (["--method", "int8", "--upload-to-model-id", "not an id"], "is not the id of a model on the Hub"),
        (["--method", "int8", "--upload-to-model-id", "me/mine"], "needs a network, and HF_HUB_OFFLINE is set"),
        (
            ["--method", "int8", "--revision", "v1"],
            "--revision is for models of the Hub: leave it out for a local folder",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_refusal_is_one_sentence(args: Sequence[str], sentence: str, model_dir: Path, tmp_path: Path) -> None:
    """What the command raises. A process would load torch for each of them."""
    arguments = [model_dir, tmp_path / "out", *(arg.replace("{}", str(tmp_path)) for arg in args)]
    parsed = cli.build_parser({}).parse_args(["quantize", *map(str, arguments)])
    with pytest.raises(StartError) as refusal:
        parsed.run(parsed)
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--bits", "5"], "--method gptq has 2 or 3 or 4 or 8 bits, not 5"),
        (["--dataset", "/none.txt", "--groupsize", "32"], "none.txt is not there: give the path of a text file"),
    ],
    ids=["before the model is read", "after it"],
)
def test_a_refusal_ends_the_process(args: Sequence[str], sentence: str, model_dir: Path, tmp_path: Path) -> None:
    result = run(model_dir, tmp_path / "out", *args)
    assert result.returncode == 1, result.stderr
    errors = [line for line in result.stderr.splitlines() if "ERROR" in line]
    assert len(errors) == 1 and sentence in errors[0], result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_upload_without_a_token(model_dir: Path, tmp_path: Path) -> None:
    environ = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "", "HF_HOME": str(tmp_path / "home")}
    result = run(model_dir, tmp_path / "out", "--method", "int8", "--upload-to-model-id", "me/mine", **environ)
    assert result.returncode == 1
    assert "--upload-to-model-id needs a token that may write: set HF_TOKEN" in result.stderr


def test_help_teaches_and_usage_errors_exit_with_2(model_dir: Path) -> None:
    result = run("--help")
    assert result.returncode == 0
    for text in ("--percdamp SHARE", "(default: 0.01)", "text-generation-server quantize ./my-model ./my-awq"):
        assert text in result.stdout
    for args in (["--method", "magic"], ["--bits", "four"], ["--datasett", "x"]):
        assert run(model_dir, "out", *args).returncode == 2
    assert run(model_dir).returncode == 2


@pytest.mark.parametrize("end", long_but([signal.SIGTERM, signal.SIGINT], signal.SIGTERM))
def test_a_signal_ends_it_and_leaves_nothing(end: signal.Signals, model_dir: Path, tmp_path: Path) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT.read_text() * 200)
    args = command(model_dir, output, "--dataset", text, "--groupsize", 32, "--num-samples", 2000)
    with subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + TIMEOUT_S
        while not output.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.5)
        process.send_signal(end)
        _, log = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130, log
    assert "Traceback" not in log
    assert not output.exists()
