"""The launcher's pieces that need no child process; the whole is in tests/e2e/test_life_cycle.py."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest

from engine.link.errors import StartError
from server.launcher.args import parse_args
from server.launcher.children import Child, Signals
from server.launcher.errors import LaunchError
from server.launcher.shard_check import check_model
from server.launcher.sharding import Sharding
from server.launcher.sockets import bind, ip_address_of, rendezvous_socket
from server.launcher.start import (
    COLLECTOR_SECRETS,
    HUB_SECRETS,
    ModelFolders,
    _follow_download,
    find_folders,
    find_model,
    snapshot_commit,
)

TWO = Sharding(size=2, ranks=(0, 1), local_size=2)


@pytest.mark.parametrize(
    ("hostname", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("::", "::"),
        ("[::]", "::"),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1"),
        ("0.0.0.0", "0.0.0.0"),
        ("4f2a9c0d1e", "0.0.0.0"),  # a container's HOSTNAME
    ],
)
def test_what_is_bound(hostname: str, address: str) -> None:
    with bind(hostname, 0) as listener:
        assert listener.getsockname()[0] == address
        port = listener.getsockname()[1]
        with socket.socket(listener.family) as client:
            assert client.connect_ex((address, port)) != 0, "nobody may be let in before the engine is ready"


def test_a_busy_port_is_refused_with_the_mend() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with pytest.raises(LaunchError, match="Address already in use.*give another --port"):
            bind("127.0.0.1", busy.getsockname()[1])


def test_an_address_of_version_6_is_shown_in_brackets() -> None:
    with pytest.raises(LaunchError, match=r"^Cannot listen on \[2001:db8::1\]:80 \(.*\): give another --hostname$"):
        bind("2001:db8::1", 80)


UTF8_PROGRAM = """
import os, sys
from engine.link.encoding import use_utf8
use_utf8()
print(ascii(sys.argv[1]), open(sys.argv[2]).read())
print(os.environ["PYTHONUTF8"])
"""


@pytest.mark.parametrize(
    "environ",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "POSIX"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
        {"LANG": "C"},
        {"LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0"},
        {"LC_ALL": "C.utf8"},
        {"LC_ALL": "C.utf8", "PYTHONIOENCODING": "ascii"},
    ],
)
def test_text_is_utf8_whatever_the_locale(tmp_path: Path, environ: dict[str, str]) -> None:
    path = tmp_path / "modèle-模型"
    path.write_text("“é模”", encoding="utf-8")
    environ = {**environ, "PATH": os.environ["PATH"], "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", UTF8_PROGRAM, "模型é", str(path)]
    done = subprocess.run(command, env=environ, capture_output=True, check=True)
    assert done.stdout.decode() == "'\\u6a21\\u578b\\xe9' “é模”\n1\n"


@pytest.mark.parametrize(
    ("given", "address"), [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("::1", "::1"), ("[::1]", "::1")]
)
def test_the_ranks_meet_at_the_address_given_and_nowhere_else(given: str, address: str) -> None:
    with rendezvous_socket(dataclasses.replace(TWO, address=given)) as listener:
        assert listener is not None
        host, port = listener.getsockname()[:2]
        assert host == address
        with socket.socket(listener.family) as client:
            assert client.connect_ex((address, port)) == 0, "a rank that is there early need not try again"
    with socket.socket(listener.family) as client:
        assert client.connect_ex((address, port)) != 0


def test_a_meeting_port_that_was_given_is_taken_and_the_mend_told_where_it_is_busy() -> None:
    with rendezvous_socket(TWO) as first:
        assert first is not None
        port = first.getsockname()[1]
        with pytest.raises(LaunchError, match=f"meet on 127.0.0.1:{port} .Address already in use.*another --master-p"):
            with rendezvous_socket(dataclasses.replace(TWO, port=port)):
                pytest.fail("one port for two servers")
    with rendezvous_socket(dataclasses.replace(TWO, port=port)) as second:
        assert second is not None and second.getsockname()[1] == port


def test_an_address_of_another_host_is_no_meeting_point() -> None:
    with pytest.raises(LaunchError, match="meet on 192.0.2.1:0 .*give another --master-addr"):
        with rendezvous_socket(dataclasses.replace(TWO, address="192.0.2.1")):
            pytest.fail("nobody has that address")


def test_a_name_that_means_no_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", find_nothing)
    with pytest.raises(LaunchError) as caught:
        ip_address_of("first-host")
    assert str(caught.value) == (
        "--master-addr first-host can't be resolved (Name or service not known): give an IP address"
    )


@pytest.mark.parametrize(
    "sharding",
    [
        Sharding(),
        Sharding(size=4, num_hosts=2, ranks=(2, 3), local_size=2, address="192.0.2.1", port=29500),
        dataclasses.replace(TWO, ranks=(0,), port=29500, is_torchrun=True),
    ],
    ids=["one shard", "another host", "torchrun"],
)
def test_who_does_not_hold_the_meeting_binds_nothing(sharding: Sharding) -> None:
    with rendezvous_socket(sharding) as listener:
        assert listener is None


def test_only_a_folder_of_the_hub_has_a_commit() -> None:
    assert snapshot_commit("/data/hub/models--Qwen--Q/snapshots/abc123") == "abc123"
    assert snapshot_commit("/models/mine") is None


def test_children_get_no_secrets_but_those_that_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = "API_KEY HF_TOKEN HUGGING_FACE_HUB_TOKEN NGROK_AUTHTOKEN AWS_SECRET_ACCESS_KEY SHARD_SECRET".split()
    for name in (*secrets, "OTEL_EXPORTER_OTLP_HEADERS", "TOKENIZERS_PARALLELISM", "HF_HOME"):
        monkeypatch.setenv(name, "a value")

    def variables(kept: Sequence[str]) -> set[str]:
        child = Child("env", ["env"], stdout=subprocess.PIPE, environ={"RANK": "0"}, kept_secrets=kept)
        written, _ = child.process.communicate()
        return {line.partition("=")[0] for line in written.decode().splitlines()}

    bare = variables(())
    assert bare.isdisjoint([*secrets, "OTEL_EXPORTER_OTLP_HEADERS"])
    assert {"TOKENIZERS_PARALLELISM", "HF_HOME", "RANK", "PATH"} <= bare
    assert variables(HUB_SECRETS) - bare == {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}
    assert variables(COLLECTOR_SECRETS) - bare == {"OTEL_EXPORTER_OTLP_HEADERS"}


def test_reports_of_a_download_go_on_to_the_webserver_and_its_last_line_is_the_folder() -> None:
    report = '{"stage": "downloading", "done": 0.5, "text": "half"}'
    download = Child("download", ["printf", "%s\\n", report, "/folder"], stdout=subprocess.PIPE)
    webserver = Child("webserver", ["cat"], config="the configuration", stdout=subprocess.PIPE)
    assert _follow_download(download, Mock(Signals, count=0), webserver) == ["/folder"]
    written, _ = webserver.process.communicate()
    assert written.decode().splitlines() == ["the configuration", report]
    close_pipes(download)


def test_a_download_ends_with_the_webserver_that_waits_for_it() -> None:
    download = Child("download", ["sleep", "60"], stdout=subprocess.PIPE)
    webserver = Child("webserver", ["false"])
    with pytest.raises(LaunchError, match="WebserverFailed: webserver ended with exit code 1"):
        _follow_download(download, Mock(Signals, count=0), webserver)
    assert download.exit_code == -signal.SIGTERM
    close_pipes(download, webserver)


def close_pipes(*children: Child) -> None:
    for child in children:
        for stream in filter(None, (child.process.stdin, child.process.stdout)):
            with contextlib.suppress(BrokenPipeError):  # it ended before it could read
                stream.close()


CONFIG = {"num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151_936}


@pytest.mark.parametrize(
    ("changes", "size", "sentence"),
    [
        ({}, 8, None),
        (
            {},
            64,
            "the model can't be cut for 64 shards: 14 heads in 2 groups of 7 are too few for 64 shards: the largest "
            "count is 14: start with --num-shard 1 or 2 or 3 or 4 or 5 or 6 or 7 or 8",
        ),
        ({"intermediate_size": 24}, 4, "24 can't be split over 4 shards in units of 64 or 32 or 16 or 8: start with"),
        ({"num_key_value_heads": 3}, 2, "14 heads don't divide into 3 groups: correct config.json"),
        ({"intermediate_size": 24, "moe_intermediate_size": 64}, 4, None),
        ({"moe_intermediate_size": 24}, 4, "24 can't be split over 4 shards in units of 64 or 32 or 16 or 8: start"),
        ({"num_attention_heads": "many"}, 64, None),  # for the engine to say
        ({"num_key_value_heads": None}, 64, None),
        ({"num_key_value_heads": 0}, 64, None),
    ],
)
def test_shards_that_the_model_can_not_be_cut_for(
    tmp_path: Path, changes: dict[str, object], size: int, sentence: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    sharding = Sharding(size=size, local_size=size)
    if sentence is None:
        check_model(str(tmp_path), sharding)
        return
    with pytest.raises(LaunchError) as caught:
        check_model(str(tmp_path), sharding)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{", "5", '"text"', "[" * 100_000])
def test_a_config_that_can_not_be_read_is_left_to_the_engine(tmp_path: Path, content: str) -> None:
    check_model(str(tmp_path), TWO)
    (tmp_path / "config.json").write_text(content)
    check_model(str(tmp_path), TWO)


def write_adapter(folder: Path, base: Path) -> None:
    folder.mkdir()
    (folder / "adapter_model.safetensors").touch()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "revision": "v1"}))


def find_local(folder: Path, *flags: str) -> ModelFolders:
    return find_folders(parse_args(["--model-id", str(folder), *flags], {}), Mock(Signals, count=0))


def test_an_adapter_is_served_with_the_model_that_it_names(tmp_path: Path) -> None:
    model, adapter, second = tmp_path / "model", tmp_path / "adapter", tmp_path / "second"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (model / name).touch()
    write_adapter(adapter, model)
    write_adapter(second, adapter)
    assert find_local(model) == ModelFolders(str(model))
    assert find_local(adapter) == ModelFolders(str(model), str(adapter))
    with pytest.raises(LaunchError, match=f"{second} is an adapter of {adapter}, which is one itself"):
        find_local(second)
    assert find_local(model, "--lora-adapters", f"sql={adapter},{second}").loras == (
        ("sql", str(adapter)),
        (str(second), str(second)),
    )
    with pytest.raises(LaunchError, match=f"{adapter} is a folder here and has no revision: leave @main out"):
        find_local(model, "--lora-adapters", f"sql={adapter}@main")
    (tmp_path / "lora.gguf").touch()
    with pytest.raises(
        LaunchError, match="lora.gguf is in GGUF, and an adapter .* is a folder with adapter_config.json"
    ):
        find_local(model, "--lora-adapters", f"sql={tmp_path / 'lora.gguf'}")
    with pytest.raises(
        StartError, match="--lora-adapters sql: '/no/such' is neither a folder nor the id of an adapter .LoRA. on the"
    ):
        find_local(model, "--lora-adapters", "sql=/no/such")
    write_adapter(tmp_path / "moved", tmp_path / "elsewhere")
    with pytest.raises(LaunchError, match="/elsewhere, which is not here: correct base_model_name_or_path in"):
        find_local(tmp_path / "moved")


@pytest.mark.parametrize("is_gguf", [True, False])
def test_a_file_of_this_machine_is_not_called_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_gguf: bool
) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    caplog.set_level("INFO")
    monkeypatch.setattr("server.launcher.start._follow_download", lambda *_: [])
    monkeypatch.setattr("server.launcher.start.Child", lambda *_, **__: Mock(exit_code=1))
    sentence = f"{file} can't be read; the reason" if is_gguf else "DownloadError: a/b could not be fetched; the reason"
    with pytest.raises(LaunchError, match=f"^{sentence} is above"):
        find_local(file if is_gguf else Path("a/b"))
    assert ("download" in caplog.text) is not is_gguf
    monkeypatch.setattr("server.launcher.start._follow_download", lambda *_: [str(tmp_path)])
    monkeypatch.setattr("server.launcher.start.Child", lambda *_, **__: Mock(exit_code=0))
    assert find_local(file if is_gguf else Path("a/b")).model == str(tmp_path)
    assert ("download" in caplog.text) is not is_gguf


def test_the_model_of_an_adapter_may_be_a_gguf_file(tmp_path: Path) -> None:
    file, adapter = tmp_path / "model.gguf", tmp_path / "adapter"
    file.touch()
    write_adapter(adapter, file)
    fetched: list[tuple[str, str | None]] = []

    def fetch(model_id: str, revision: str | None) -> str:
        fetched.append((model_id, revision))
        return str(adapter if len(fetched) == 1 else tmp_path)

    folders = find_model(parse_args(["--model-id", str(adapter)], {}), fetch)
    assert folders == ModelFolders(str(tmp_path), str(adapter))
    assert fetched == [(str(adapter), None), (str(file), None)]
