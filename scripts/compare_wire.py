"""Compares what two checkouts say to the outside, byte for byte, and exits with 1 where they differ.

    python scripts/compare_wire.py OLD NEW [--model FOLDER] [--only SETUP ...]

Both serve the same model in the same setups, one after the other on the same port, and get the same recorded
requests. Compared are the answers (status line, headers, body or events), the names in /metrics, /openapi.json, the
help of the commands, the lines of the log, and the files that `quantize` writes. Only what no two runs share is masked:
ids, times, and in logs the place in the code. OLD and NEW are folders; the Python that runs this runs both.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
MAX_DIFF_LINES = 30
MAX_DIFF_CHARACTERS = 300
TEXT = "The history of science is the study of the development of knowledge, from the ancient world to the present. "

Report = dict[str, str]
"""What was looked at, and the masked text that was seen there."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One recorded request. `body` is sent as JSON, or as it is if it is bytes."""

    method: str
    path: str
    body: Any = None
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Setup:
    """One way to start the server, and the requests it gets."""

    name: str
    flags: tuple[str, ...]
    calls: tuple[Call, ...]
    method: str | None = None
    """Serve what `quantize` wrote with these flags of METHODS, in place of the model itself."""


def native(path: str = "/generate", inputs: str = "The capital of France is", **parameters: Any) -> Call:
    return Call("POST", path, {"inputs": inputs, "parameters": {"max_new_tokens": 6, **parameters}})


def stream(**parameters: Any) -> Call:
    return native("/generate_stream", **parameters)


def chat(**fields: Any) -> Call:
    messages = [{"role": "user", "content": "Say hello to the weather of Paris."}]
    return Call("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 8, "temperature": 0.0} | fields)


def completion(**fields: Any) -> Call:
    return Call("POST", "/v1/completions", {"prompt": "One, two, three,", "max_tokens": 6, "temperature": 0.0} | fields)


CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "description": "Tells the weather", "parameters": CITY}
WEATHER = {"type": "function", "function": FUNCTION}
BIAS = {"260": -100.0, "42": 5}

SAMPLED: dict[str, Any] = {
    "do_sample": True,
    "seed": 7,
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 0.9,
    "typical_p": 0.95,
}
PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "logit_bias": BIAS,
}

GENERATING = (
    native(details=True),
    native(details=True, decoder_input_details=True, top_n_tokens=3),
    native(stop=[" the", "."], details=True, max_new_tokens=12, return_full_text=True),
    native(inputs=TEXT * 4, truncate=9, details=True, decoder_input_details=True),
    native(watermark=True, details=True),
    native(**SAMPLED, details=True),
    native(**PENALTIES, details=True),
    native(min_p=0.1, temperature=0.7, seed=3, ignore_eos=True),
    native(best_of=2, top_k=1, do_sample=True, details=True),
    native(grammar={"type": "regex", "value": "[0-9]{3}"}, details=True),
    native(grammar={"type": "json", "value": CITY}, max_new_tokens=24),
    native("/", details=True),
    Call("POST", "/", {"inputs": "Once upon", "stream": True, "parameters": {"max_new_tokens": 4}}),
    stream(details=True, top_n_tokens=2),
    stream(**SAMPLED, return_full_text=True),
    stream(stop=["a"], max_new_tokens=12, details=True),
    chat(),
    chat(stream=True, stream_options={"include_usage": True}),
    chat(logprobs=True, top_logprobs=2, seed=5, temperature=0.7),
    chat(stream=True, logprobs=True, top_logprobs=1, stop=["."]),
    chat(n=2, seed=8, temperature=1.0),
    chat(tools=[WEATHER], tool_choice="required", max_tokens=48),
    chat(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "get_weather"}}, stream=True),
    chat(tools=[WEATHER], tool_choice="none"),
    chat(response_format={"type": "json_object", "value": CITY}, max_tokens=24),
    chat(response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": CITY}}, max_tokens=24),
    completion(),
    completion(stream=True, n=2, seed=8, temperature=1.0, stream_options={"include_usage": True}),
    completion(prompt=["Red and", "Blue or"], echo=True, logprobs=2),
    completion(prompt=[260, 270, 281], frequency_penalty=1.0, temperature=0.5, seed=9, suffix=None),
    Call("POST", "/invocations", {"inputs": "Sage", "parameters": {"max_new_tokens": 3}}),
    dataclasses.replace(chat(stream=True, max_tokens=4), path="/invocations"),
    Call("POST", "/vertex", {"instances": [{"inputs": "Vertex", "parameters": {"max_new_tokens": 3, "seed": 2}}]}),
)
REFUSED = (
    native(temperature=0.0),
    native(top_p=1.5, top_k=0),
    native(typical_p=0.0),
    native(repetition_penalty=-1.0),
    native(max_new_tokens=0),
    native(max_new_tokens=2000),
    native(inputs=""),
    native(inputs=TEXT * 40),
    native(stop=["a"] * 5),
    native(top_n_tokens=9, best_of=3, do_sample=True),
    native(truncate=100_000),
    native(grammar={"type": "regex", "value": "("}),
    stream(best_of=2, do_sample=True),
    stream(frequency_penalty=3.0),
    native(presence_penalty=-3.0, min_p=2.0),
    native(adapter_id="x", do_sample=None),
    chat(n=0),
    chat(top_logprobs=50, logprobs=True),
    chat(messages=[{"role": "user"}], stream=True),
    chat(stream=True, temperature=-1.0),
    chat(tools=[WEATHER], tool_choice="get_time"),
    completion(prompt=[]),
    completion(prompt=["a"] * 5, max_tokens=None),
)
OTHER = (
    Call("POST", "/tokenize", {"inputs": "Hello, wörld 🙂"}),
    Call("POST", "/detokenize", {"tokens": [19556, 28, 905]}),
    Call("POST", "/chat_tokenize", {"messages": [{"role": "user", "content": "Hi"}]}),
    Call("GET", "/info"),
    Call("GET", "/v1/models"),
    Call("GET", "/v1/models/nobody"),
    Call("HEAD", "/health"),
    Call("GET", "/ping"),
    Call("GET", "/docs"),
    Call("GET", "/docs/"),
    Call("GET", "/openapi.json"),
    Call("GET", "/nowhere"),
    Call("PUT", "/generate"),
    Call("OPTIONS", "/generate", headers=(("origin", "http://a.example"), ("access-control-request-method", "POST"))),
    Call("POST", "/generate", b'{"inputs": '),
    Call("POST", "/generate", {"input": "wrong name"}),
    Call("POST", "/generate", b'{"inputs": "x"}', "text/plain"),
    Call("POST", "/generate", json.dumps({"inputs": "x" * 40_000}).encode()),
    Call("POST", "/v1/chat/completions", b"[]"),
    Call("POST", "/vertex", {"instances": [{"what": 1}]}),
)
SOME = (GENERATING[0], GENERATING[1], GENERATING[6], GENERATING[13], chat(stream=True), completion(logprobs=1))
FLAGS = tuple("--dtype float32 --max-total-tokens 512 --max-batch-total-tokens 4096 --payload-limit 30000".split())
OPTIONS = "--json-output --env --api-key secret --cors-allow-origin http://a --disable-grammar-support".split()
KEY = (("authorization", "Bearer secret"),)

SETUPS = (
    Setup("default", FLAGS, GENERATING + REFUSED + OTHER),
    Setup("strict", (*FLAGS, "--strict-tgi"), GENERATING + REFUSED + OTHER),
    Setup(
        "json log, key, no grammars",
        (*FLAGS, *OPTIONS),
        (GENERATING[0], Call("GET", "/info"), Call("GET", "/info", headers=KEY), Call("GET", "/health"))
        + tuple(dataclasses.replace(call, headers=KEY) for call in (*SOME, GENERATING[9])),
    ),
    Setup("speculate", (*FLAGS, "--speculate", "4"), SOME + (native(inputs="a b c a b c a b", max_new_tokens=24),)),
    Setup("two shards", (*FLAGS, "--num-shard", "2"), SOME),
    Setup("int8 on load", (*FLAGS[2:], "--quantize", "int8"), SOME),
    Setup("gptq", FLAGS[2:], SOME, method="gptq"),
    Setup("gptq, two shards", (*FLAGS[2:], "--num-shard", "2"), SOME[:2], method="gptq"),
    Setup("awq", FLAGS[2:], SOME[:2], method="int4"),
)
COMMANDS = """\
server.launcher --help
server.launcher --version
server.launcher --speculate 99
server.launcher --model-id /nowhere --nnodes x
server.launcher --model-id /nowhere
engine.cli --help
engine.cli quantize --help
engine.cli download-weights --help
""".splitlines()
METHODS = {
    "gptq": "--act-order --groupsize 64 --num-samples 1 --sample-tokens 32 --perplexity-tokens 64".split(),
    "int8": "--method int8".split(),
    "int4": "--method int4".split(),
}

MASKED_HEADERS = (
    "date x-compute-time x-total-time x-validation-time x-queue-time x-inference-time x-time-per-token "
    "x-request-id".split()
)
RARE_METRIC = "tgi_batch_concat"
"""The beginning of names that are there once a request has joined another one, which is a matter of time."""
BODY_MASKS = (
    (r'"id":"(chatcmpl|cmpl|call)[-_][0-9a-zA-Z]+"', r'"id":"\1-ID"'),
    (r'"created":\d+', '"created":TIME'),
    (r'"seed":\d{6,}', '"seed":DRAWN'),
)
LOG_MASKS = (
    (r"\breq_[0-9a-f]{32}\b", "req_ID"),
    (r"^\S+Z ", "TIME "),
    (r'"(timestamp|target|filename)": "[^"]*"', r'"\1": MASKED'),
    (r'"line_number": \d+', '"line_number": MASKED'),
    (r"\d+(\.\d+)?(e-?\d+)? ?(s|ms|µs|\\u00b5s|GB|MB|GiB|MiB|%)\b", "NUMBER"),
    (r"Some\(\d{6,}\)", "Some(DRAWN)"),
    (r"^.*(Loading weights: |Quantising: |Waiting for shard to be ready).*\n", ""),
    (r"Quantised in \S+", "Quantised"),
)


def mask(text: str, masks: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in masks:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text


class Checkout:
    """One of the two folders: runs its commands and its server, and reports what they say."""

    def __init__(self, folder: Path, model: Path, work: Path, port: int) -> None:
        self._folder, self._model, self._work, self._port = folder, model, work, port
        environ = {"PYTHONPATH": str(folder), "COLUMNS": "100", "LOG_COLORIZE": "0", "HF_HUB_OFFLINE": "1"}
        self._environ = {**os.environ, **environ}
        self.report: Report = {}

    def run_commands(self) -> None:
        for command in COMMANDS:
            done = self._run(*command.split())
            self.report[f"python -m {command}"] = self._masked_log(
                f"exit {done.returncode}\n{done.stdout}{done.stderr}"
            )

    def write_quantized(self, method: str) -> None:
        dataset, output = self._work / "dataset.txt", self._work / method
        dataset.write_text("\n".join(f"{number}. {TEXT}" for number in range(20)))
        flags = [*METHODS[method], *(["--dataset", str(dataset)] if method == "gptq" else [])]
        done = self._run("engine.cli", "quantize", str(self._model), str(output), *flags)
        sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.name}" for path in sorted(output.glob("*"))]
        log = self._masked_log(f"exit {done.returncode}\n{done.stdout}{done.stderr}")
        self.report[f"quantize {method}"] = "\n".join([log, *sums])

    def _run(self, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", module, *arguments]
        return subprocess.run(
            command, cwd=self._folder, env=self._environ, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )

    def serve(self, setup: Setup) -> None:
        log_path = self._work / "log"
        model = self._work / setup.method if setup.method else self._model
        with self._server(setup, model, log_path) as client:
            for number, call in enumerate(setup.calls):
                body = call.body if isinstance(call.body, bytes) else json.dumps(call.body, ensure_ascii=False)
                name = f"{setup.name}, {number}: {call.method} {call.path} {str(body)[:200]}"
                self.report[name] = answer(client, call)
            lines = client.get("/metrics", headers=dict(KEY)).text.splitlines()
            names = [line.rpartition(" ")[0] for line in lines if line and RARE_METRIC not in line]
            self.report[f"{setup.name}: names in /metrics"] = "\n".join(names)
        lines = sorted(self._masked_log(log_path.read_text()).splitlines())
        self.report[f"{setup.name}: log"] = "\n".join(lines)

    @contextlib.contextmanager
    def _server(self, setup: Setup, model: Path, log_path: Path) -> Iterator[httpx.Client]:
        address = ["--hostname", "127.0.0.1", "--port", str(self._port)]
        command = [sys.executable, "-P", "-m", "server.launcher", "--model-id", str(model), *address, *setup.flags]
        with log_path.open("wb") as log:
            process = subprocess.Popen(command, cwd=self._folder, env=self._environ, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while "Connected" not in log_path.read_text():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{self._folder} does not start ({setup.name}):\n{log_path.read_text()}")
                time.sleep(0.05)
            with httpx.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=120) as client:
                yield client
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_TIMEOUT_S)

    def _masked_log(self, text: str) -> str:
        return mask(text.replace(str(self._folder), "FOLDER"), LOG_MASKS)


def answer(client: httpx.Client, call: Call) -> str:
    """Status, headers in their order and spelling, and the body as it came."""
    content = call.body
    if content is not None and not isinstance(content, bytes):
        content = json.dumps(content, ensure_ascii=False).encode()
    headers = dict(call.headers) | ({"content-type": call.content_type} if content is not None else {})
    response = client.request(call.method, call.path, content=content, headers=headers)
    lines = [f"{response.http_version} {response.status_code} {response.reason_phrase}"]
    for name, value in response.headers.raw:
        is_masked = name.decode().lower() in MASKED_HEADERS
        lines.append(f"{name.decode()}: {'MASKED' if is_masked else value.decode()}")
    body = mask(response.content.decode(), BODY_MASKS)
    if body != response.content.decode():
        # an id's or a seed's digits count in the length
        lines = [re.sub(r"^content-length: .*", "content-length: MASKED", line) for line in lines]
    if '"index":1' in body:
        # the choices of one stream come in the order in which their tokens are found
        body = "\n".join(sorted(body.splitlines()))
    return "\n".join([*lines, "", body])


def print_differences(old: Report, new: Report) -> int:
    """Prints each difference, in pieces that end at commas and lines, and returns their number."""
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    for name in names:
        print(f"=== {name}")
        before, after = (re.split(r"(?<=,)|\n", report.get(name, "")) for report in (old, new))
        diff = list(difflib.unified_diff(before, after, "old", "new", lineterm="", n=1))
        for line in diff[:MAX_DIFF_LINES]:
            print(line[:MAX_DIFF_CHARACTERS])
        print("..." if len(diff) > MAX_DIFF_LINES else "")
    return len(names)


def observe(folder: Path, model: Path, work: Path, port: int, setups: Sequence[Setup]) -> Report:
    """`work` is a folder for what is written; its name shows in answers and logs."""
    work.mkdir()
    checkout = Checkout(folder.resolve(), model.resolve(), work, port)
    methods = METHODS if len(setups) == len(SETUPS) else {setup.method for setup in setups if setup.method}
    steps = [("commands", checkout.run_commands)]
    steps += [(f"quantize {method}", functools.partial(checkout.write_quantized, method)) for method in methods]
    steps += [(setup.name, functools.partial(checkout.serve, setup)) for setup in setups]
    for name, step in steps:
        started = time.monotonic()
        step()
        print(f"{folder}: {name}, {time.monotonic() - started:.0f} s", flush=True)
    shutil.rmtree(work)
    return checkout.report


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares what two checkouts say to the outside, byte for byte.")
    parser.add_argument("old", type=Path, help="folder of a checkout")
    parser.add_argument("new", type=Path, help="folder of another one")
    parser.add_argument("--model", type=Path, help="folder of a dense model (default: the small demo model)")
    parser.add_argument("--only", nargs="+", metavar="SETUP", choices=[setup.name for setup in SETUPS], default=[])
    args = parser.parse_args()
    model = args.model or demo_model()
    setups = [setup for setup in SETUPS if not args.only or setup.name in args.only]
    port = free_port()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary, "work")
        old, new = (observe(folder, model, work, port, setups) for folder in (args.old, args.new))
    num_differences = print_differences(old, new)
    print(f"{num_differences} of {len(old)} observations differ")
    sys.exit(1 if num_differences else 0)


def free_port() -> int:
    """The same port for both, because the log names it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def demo_model() -> Path:
    script = Path(__file__).with_name("demo_model.py")
    done = subprocess.run([sys.executable, str(script), "--small"], check=True, stdout=subprocess.PIPE, text=True)
    return Path(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
