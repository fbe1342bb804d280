"""`text-generation-server download-weights` as a command, against a Hub on loopback."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save_file

from tests.e2e.hub_stand_in import Failure, HubStandIn, hub_stand_in
from tests.e2e.launched import free_port, launched
from tests.tiny_model import write_tiny_qwen2

MODEL = "tiny/Qwen2"
TOKEN = "hf_secret"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
NEVER = {
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"code",
    "README.md": b"text",
    "training_args.safetensors": b"no weights",
    "onnx/config.json": b"{}",
    "onnx/additional_chat_templates/a.jinja": b"another model's",
    "additional_chat_templates/README.md": b"text",
}
"""Files that a repository may have and that are never fetched."""

OFFLINE = {"HF_HUB_OFFLINE": "1"}
COMMAND = ("-m", "engine.cli")
IMPATIENT = """
import os
from engine import cli
cli.prepare_environment(os.environ)
from engine.checkpoint import hub, retries
from engine.link import logs, progress
retries.FIRST_PAUSE_S = hub.PROGRESS_S = logs.PROGRESS_LINE_S = progress.TELL_S = 0.01
cli.main()
"""


@dataclasses.dataclass(frozen=True)
class Result:
    code: int
    folder: Path
    log: str

    def __post_init__(self) -> None:
        assert "Traceback" not in self.log
        assert TOKEN not in self.log


@dataclasses.dataclass(frozen=True)
class Downloads:
    """Runs the command; the cache stays from one run to the next."""

    environ: dict[str, str]

    def start(
        self, *args: str, environ: Mapping[str, str] | None = None, is_impatient: bool = False
    ) -> subprocess.Popen[str]:
        command = [sys.executable, *(("-c", IMPATIENT) if is_impatient else COMMAND), "download-weights", *args]
        pipe = subprocess.PIPE
        stdin = pipe if "--lifeline" in args else subprocess.DEVNULL
        environ = {**self.environ, **(environ or {})}
        return subprocess.Popen(command, stdin=stdin, stdout=pipe, stderr=pipe, text=True, env=environ)

    def run(self, *args: str, environ: Mapping[str, str] | None = None, is_impatient: bool = False) -> Result:
        with self.start(*args, environ=environ, is_impatient=is_impatient) as process:
            output, log = process.communicate(timeout=60)
        folder = output.splitlines()[-1] if output else "/nothing"
        return Result(process.returncode, Path(folder), log)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded-qwen2")
    write_tiny_qwen2(folder, num_shards=2)
    (folder / "additional_chat_templates").mkdir()
    for name in ("a", "tool_use"):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(name)
    return folder


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(model_dir: Path) -> Iterator[HubStandIn]:
    with hub_stand_in() as hub:
        hub.add(MODEL, model_dir).files.update(NEVER)
        yield hub


@pytest.fixture
def downloads(hub: HubStandIn, tmp_path: Path) -> Downloads:
    return Downloads(hub_environment(hub.url, tmp_path))


def hub_environment(url: str, tmp_path: Path) -> dict[str, str]:
    # Empty counts as unset; what the machine has set must not matter.
    empty = ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN", "HF_HUB_CACHE", "LOG_LEVEL")
    ours = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    return {**os.environ, **dict.fromkeys((*empty, "HUGGINGFACE_HUB_CACHE"), ""), **ours}


def test_a_model_is_fetched_once_and_then_without_a_network_call(
    hub: HubStandIn, downloads: Downloads, tmp_path: Path, model_dir: Path
) -> None:
    first = downloads.run(MODEL)
    assert first.code == 0, first.log
    assert first.folder == tmp_path / f"home/hub/models--tiny--Qwen2/snapshots/{hub.repositories[MODEL].commit}"
    assert files_of(first.folder) == files_of(model_dir)
    assert hub.fetched()[-2:] == SHARDS
    assert f"Download file: {SHARDS[0]}" in first.log
    assert f"Downloaded {first.folder / SHARDS[1]} in 0:00:00." in first.log
    assert "Download: [1/2] -- ETA: 0:00:00" in first.log
    hub.requests.clear()
    second = downloads.run(MODEL, "--no-auto-convert", "--no-merge-lora", "--no-trust-remote-code", "--no-json-output")
    assert (second.code, second.folder, hub.requests) == (0, first.folder, [])
    (line,) = second.log.splitlines()
    assert line.endswith("INFO download: Files are already present on the host. Skipping download.")


def test_server_errors_are_tried_again_and_json_lines_say_so(
    hub: HubStandIn, downloads: Downloads, tmp_path: Path
) -> None:
    hub.failures.append(Failure("/api/models/tiny/Qwen2", times=2, status=503))
    caches = {"HUGGINGFACE_HUB_CACHE": str(tmp_path / "tgi"), "HF_HUB_CACHE": str(tmp_path / "library")}
    result = downloads.run(MODEL, "--json-output", "--logger-level", "INFO", environ=caches, is_impatient=True)
    assert result.folder.is_relative_to(tmp_path / "tgi")
    lines = [json.loads(line) for line in result.log.splitlines()]
    assert [(line["level"], line["message"]) for line in lines[:2]] == [
        ("WARN", "The Hub answered HTTP 503: trying again in 0.01 s (try 2 of 5)"),
        ("WARN", "The Hub answered HTTP 503: trying again in 0.02 s (try 3 of 5)"),
    ]
    assert (lines[-1]["level"], lines[-1]["message"]) == ("INFO", "Download: [2/2] -- ETA: 0:00:00")
    assert lines[-1]["target"] == "engine.checkpoint.hub"


def test_a_revision_is_fetched_and_kept_apart(hub: HubStandIn, downloads: Downloads) -> None:
    hub.repositories[MODEL].revisions = ("main", "refs/pr/1")
    first = downloads.run(MODEL, "--revision", "refs/pr/1")
    hub.requests.clear()
    assert downloads.run(MODEL, "--revision", first.folder.name).folder == first.folder
    assert downloads.run(MODEL, "--revision", "refs/pr/1", environ=OFFLINE).folder == first.folder
    assert "tiny/Qwen2 is not in the cache" in downloads.run(MODEL, environ=OFFLINE).log  # main is something else
    assert hub.requests == []


@pytest.mark.parametrize("name", ["HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN"])
def test_the_token_is_sent_and_not_said(hub: HubStandIn, downloads: Downloads, name: str) -> None:
    hub.repositories[MODEL].token = TOKEN
    assert downloads.run(MODEL, "--logger-level", "debug", environ={name: TOKEN}).code == 0
    assert {request.authorization for request in hub.requests} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    ("args", "environ", "sentence"),
    [
        (["tiny/Nothing"], {}, "tiny/Nothing is not on 127.0.0.1"),
        (["tiny/private"], {"HF_TOKEN": f"{TOKEN}_wrong"}, "(HTTP 401): check that HF_TOKEN is a valid token"),
        (["tiny/private"], {"HF_TOKEN": f"{TOKEN}\x01"}, "holds a character that no token has"),
        (["tiny/gated"], {}, "is gated: accept its terms"),
        ([MODEL, "--revision", "v9"], {}, "tiny/Qwen2 has no revision 'v9': check --revision"),
        (["tiny/pickled", "--no-auto-convert"], {}, "has only pickled weights (.bin, .pt), which can run code"),
        ([MODEL, "--extension", ".bin"], {}, "--extension .bin is not supported"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_refusal_is_one_sentence(
    hub: HubStandIn, downloads: Downloads, args: list[str], environ: dict[str, str], sentence: str
) -> None:
    hub.add("tiny/private", config__json=b"{}").token = TOKEN
    hub.add("tiny/gated", config__json=b"{}", model__safetensors=b"").is_gated = True
    hub.add("tiny/pickled", config__json=b"{}", pytorch_model__bin=b"")
    result = downloads.run(*args, environ=environ)
    assert result.code == 1
    errors = [line for line in result.log.splitlines() if "ERROR" in line]
    assert len(errors) == 1 and sentence in errors[0], result.log
    assert not hub.fetched()


def test_only_what_is_missing_or_cut_off_is_fetched_again(
    hub: HubStandIn, downloads: Downloads, model_dir: Path
) -> None:
    folder = downloads.run(MODEL).folder
    (folder / SHARDS[0]).write_bytes((folder / SHARDS[0]).read_bytes()[:-100])
    (folder / "tokenizer.json").resolve().unlink()
    (folder / "tokenizer.json").unlink()
    hub.requests.clear()
    result = downloads.run(MODEL)
    assert (result.code, result.folder, hub.fetched()) == (0, folder, ["tokenizer.json", SHARDS[0]])
    assert (folder / SHARDS[0]).read_bytes() == (model_dir / SHARDS[0]).read_bytes()
    (folder / SHARDS[1]).resolve().unlink()
    hub.requests.clear()
    result = downloads.run(MODEL)
    assert (result.code, hub.fetched()) == (0, [SHARDS[1]])


def test_a_dead_hub_is_given_up_after_five_tries(downloads: Downloads, hub: HubStandIn) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    result = downloads.run(MODEL, is_impatient=True, environ={"HF_ENDPOINT": nobody})
    assert (result.code, result.log.count("trying again")) == (1, 4)
    assert "is not in the cache and 127.0.0.1" in result.log.splitlines()[-1]
    hub.failures.append(Failure("/api/models/tiny/Qwen2", times=5, status=500))
    result = downloads.run(MODEL, is_impatient=True)
    assert (result.code, len(hub.requests)) == (1, 5)
    assert "(HTTP 500): try again later" in result.log.splitlines()[-1]


def test_a_cut_connection_goes_on_where_it_was(hub: HubStandIn, downloads: Downloads) -> None:
    content = os.urandom(22 << 20)  # the library keeps what it has in pieces of 10 MiB
    hub.repositories[MODEL].files["more.txt"] = content
    hub.failures.append(Failure("more.txt"))
    result = downloads.run(MODEL, is_impatient=True)
    assert result.code == 0, result.log
    assert [request.byte_range for request in hub.requests if request.byte_range] == [f"bytes={10 << 20}-"]
    assert (result.folder / "more.txt").read_bytes() == content
    assert "more.txt: peer closed connection" in result.log and "Trying to resume download" in result.log
    assert "Download: more.txt: 91 % of 23.1MB" in result.log


@pytest.mark.parametrize("end", ["SIGTERM", "lifeline"])
def test_a_download_ends_at_once(hub: HubStandIn, downloads: Downloads, tmp_path: Path, end: str) -> None:
    hub.failures.append(Failure(SHARDS[0], hangs=True))
    with downloads.start(MODEL, *(["--lifeline"] if end == "lifeline" else [])) as process:
        assert hub.is_hanging.wait(20)
        if end == "lifeline":
            assert process.stdin is not None
            process.stdin.close()
        else:
            process.send_signal(signal.SIGTERM)
        assert process.wait(2) == (1 if end == "lifeline" else 130)
        assert process.stderr is not None and "Traceback" not in process.stderr.read()
    assert end == "lifeline" or not list(tmp_path.rglob("*.incomplete"))


def test_a_local_folder_is_checked_and_options_without_effect_say_so(
    hub: HubStandIn, downloads: Downloads, model_dir: Path
) -> None:
    result = downloads.run(str(model_dir), "--trust-remote-code", "--merge-lora", "--auto-convert")
    assert (result.code, result.folder, hub.requests) == (0, model_dir, [])
    assert [line.split(": ", 1)[1].split(":")[0] for line in result.log.splitlines()] == [
        "--trust-remote-code has no effect",
        "--merge-lora has no effect",
        "Files are already present on the host. Skipping download.",
    ]


@pytest.mark.parametrize(
    ("args", "environ", "code", "text"),
    [
        (["--help"], {}, 0, "text-generation-server download-weights Qwen/Qwen2.5-0.5B-Instruct"),
        ([], {}, 2, "the following arguments are required: MODEL_ID"),
        (["a/b", "--logger-level", "loud"], {}, 2, "'loud' is not a level: debug, info, warn or error"),
        (["a/b"], {"LOG_LEVEL": "loud"}, 2, "'loud' is not a level"),
        (["a/b", "--revisionn", "x"], {}, 2, "unrecognized arguments"),
    ],
)
def test_usage(downloads: Downloads, args: list[str], environ: dict[str, str], code: int, text: str) -> None:
    with downloads.start(*args, environ=environ) as process:
        output = "".join(process.communicate())
    assert process.returncode == code
    assert text in output


def test_the_launcher_serves_a_model_of_the_hub(hub: HubStandIn, tmp_path: Path) -> None:
    with launched(MODEL, tmp_path, environ=hub_environment(hub.url, tmp_path)) as server:
        info = httpx.get(f"{server.url}/info").json()
        assert (info["model_id"], info["model_sha"]) == (MODEL, hub.repositories[MODEL].commit)
        assert f"Download file: {SHARDS[0]}" in server.log


def test_an_adapter_is_fetched_with_its_model(hub: HubStandIn, downloads: Downloads, tmp_path: Path) -> None:
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": MODEL}))
    save_file({"a": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    hub.add("tiny/lora", adapter).files.update({"optimizer.safetensors": b"no weights", "adapter_model.bin": b"pickle"})
    first = downloads.run("tiny/lora", "--merge-lora")
    assert first.code == 0, first.log
    assert {path.name for path in first.folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert f"tiny/lora is an adapter of {MODEL}" in first.log and "--merge-lora has no effect" in first.log
    again = downloads.run("tiny/lora", environ=OFFLINE)
    assert again.code == 0 and again.log.count("Files are already present on the host") == 2, again.log


def test_an_adapter_beside_a_model_is_fetched_without_anything_else(
    hub: HubStandIn, downloads: Downloads, tmp_path: Path, model_dir: Path
) -> None:
    """Its repository may have a whole model, too; one that has only that is refused before a file is fetched."""
    refused = downloads.run("--adapter", MODEL)
    assert refused.code == 1 and f"{MODEL} has no adapter_config.json: an adapter (LoRA) is a folder" in refused.log
    names = {"adapter_config.json", "adapter_model.safetensors"}
    both = hub.add("tiny/both", model_dir)
    both.files["adapter_config.json"] = b"{}"
    pickled = downloads.run("--adapter", "tiny/both")
    assert pickled.code == 1 and "tiny/both has no adapter_model.safetensors, and pickled weights" in pickled.log
    assert not [request for request in hub.requests if "/resolve/" in request.path]
    save_file({"a": torch.zeros(1)}, tmp_path / "weights")
    both.files["adapter_model.safetensors"] = (tmp_path / "weights").read_bytes()
    first = downloads.run("--adapter", "tiny/both")
    assert first.code == 0, first.log
    assert files_of(first.folder) == names
    hub.add("tiny/lora", model_dir).files = {name: both.files[name] for name in names}
    alone = downloads.run("--adapter", "tiny/lora")
    again = downloads.run("--adapter", "tiny/lora", environ=OFFLINE)
    assert (again.code, again.folder) == (0, alone.folder), again.log
    whole = downloads.run("tiny/both")
    assert whole.code == 0 and {*SHARDS, "config.json"} < files_of(whole.folder), whole.log
