"""Models in a bucket of Google's Cloud Storage, against a stand-in on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import cli
from engine.checkpoint import retries
from engine.checkpoint.bucket import Storage, copy_model
from engine.checkpoint.retries import TRIES
from engine.link.errors import StartError
from tests.e2e.bucket_stand_in import TOKEN, BucketStandIn, bucket_stand_in

URI = "gs://bucket/models/mine"
WEIGHTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
NEVER = ["pytorch_model.bin", "modeling.py", "README.md", ".hidden.json", "onnx/config.json", "../config.json"]


@pytest.fixture
def stand_in() -> Iterator[BucketStandIn]:
    names = ["config.json", *WEIGHTS, "tokenizer.json", "chat template.jinja", *NEVER]
    files = {f"models/mine/{name}": f"content of {name}".encode() for name in names}
    with bucket_stand_in(
        files | {"models/mine/": b"", "models/mine2/config.json": b"{}", "config.json": b"{}"}
    ) as bucket:
        yield bucket


@pytest.fixture(autouse=True)
def is_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.01)


def copy(stand_in: BucketStandIn, cache: Path, uri: str = URI, *, is_adapter: bool = False) -> Path:
    stand_in.fetched.clear()
    return copy_model(uri, cache, Storage.of(stand_in.environ), is_adapter=is_adapter)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("uri", [URI, f"{URI}/"])
def test_the_files_of_a_model_come_weights_last(stand_in: BucketStandIn, tmp_path: Path, uri: str) -> None:
    folder = copy(stand_in, tmp_path, uri)
    names = ["config.json", "tokenizer.json", "chat template.jinja", *WEIGHTS]
    assert contents(folder) == {name: f"content of {name}".encode() for name in names}
    assert [name.rpartition("/")[2] for name, _ in stand_in.fetched] == names
    assert list(tmp_path.iterdir()) == [folder]


def test_of_an_adapter_two_files_come_and_of_a_model_in_its_place_none(stand_in: BucketStandIn, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=f"^{URI} has no adapter_config.json: an adapter"):
        copy(stand_in, tmp_path, is_adapter=True)
    assert stand_in.fetched == []
    names = ["adapter_config.json", "adapter_model.safetensors"]
    stand_in.files.update({f"models/mine/{name}": b"its" for name in names})
    assert contents(copy(stand_in, tmp_path, is_adapter=True)) == dict.fromkeys(names, b"its")


def test_what_is_there_is_not_fetched_again_and_what_has_changed_is(stand_in: BucketStandIn, tmp_path: Path) -> None:
    folder = copy(stand_in, tmp_path)
    copy(stand_in, tmp_path)
    assert stand_in.fetched == []
    stand_in.updated = "2026-11-29T00:00:00Z"
    stand_in.files["models/mine/config.json"] = b"CONTENT OF config.json"
    copy(stand_in, tmp_path)
    assert contents(folder)["config.json"] == b"CONTENT OF config.json"


def test_a_download_goes_on_where_it_was_cut(stand_in: BucketStandIn, tmp_path: Path) -> None:
    name = f"models/mine/{WEIGHTS[1]}"
    stand_in.failures[name] = [503, 0, 429, 200]
    folder = copy(stand_in, tmp_path)
    half = len(stand_in.files[name]) // 2
    ranges = [byte_range for object_name, byte_range in stand_in.fetched if object_name == name]
    assert ranges == [None, None, f"bytes={half}-", f"bytes={half}-"]
    assert contents(folder)[WEIGHTS[1]] == stand_in.files[name]


def test_a_file_that_is_too_long_begins_anew(stand_in: BucketStandIn, tmp_path: Path) -> None:
    name = "models/mine/config.json"
    stand_in.failures[name] = [0] * TRIES
    with pytest.raises(StartError, match="can't be reached"):
        copy(stand_in, tmp_path)
    (part,) = tmp_path.rglob(".config.json.*.part")
    part.write_bytes(b"x" * 1000)
    folder = copy(stand_in, tmp_path)
    assert stand_in.fetched[0] == (name, None)
    assert contents(folder)["config.json"] == stand_in.files[name]


def test_a_public_bucket_needs_no_machine_of_googles(stand_in: BucketStandIn, tmp_path: Path) -> None:
    stand_in.has_metadata_server, stand_in.needs_token = False, False
    assert WEIGHTS[0] in contents(copy(stand_in, tmp_path))


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("gs://", "is not the address of a bucket"),
        ("gs://Bucket/../x", "is not the address of a bucket"),
        ("gs://bucket/nothing", "has no files of a model"),
        ("gs://bucket/models", "has no files of a model"),
        ("gs://other/models/mine", r"could not be read \(HTTP 404\): check the name of the bucket"),
    ],
)
def test_wrong_addresses(stand_in: BucketStandIn, tmp_path: Path, uri: str, words: str) -> None:
    with pytest.raises(StartError, match=words):
        copy(stand_in, tmp_path, uri)


def test_no_permission_and_no_network(stand_in: BucketStandIn, tmp_path: Path) -> None:
    stand_in.has_metadata_server = False
    with pytest.raises(StartError, match="may not be read: give the service account") as caught:
        copy(stand_in, tmp_path)
    assert TOKEN not in str(caught.value)
    nowhere = Storage("http://127.0.0.1:9", "http://127.0.0.1:9")
    with pytest.raises(StartError, match="can't be reached"):
        copy_model(URI, tmp_path, nowhere)


def test_a_disk_that_takes_nothing(stand_in: BucketStandIn, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match=r"can't be written \(.*\): set HUGGINGFACE_HUB_CACHE"):
        copy(stand_in, tmp_path / "file")


def test_what_is_no_storage(stand_in: BucketStandIn, tmp_path: Path) -> None:
    stand_in.updated = "yesterday"
    with pytest.raises(StartError, match="does not answer as Google's does"):
        copy(stand_in, tmp_path)


@pytest.mark.parametrize("arguments", [[URI, "--revision", "v1"], [URI]])
def test_what_a_bucket_has_not(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A revision, or, offline as these tests are, anything at all."""
    args = cli.build_parser({}).parse_args(["download-weights", *arguments])
    with pytest.raises(StartError, match="leave it out for a bucket" if args.revision else "needs a network"):
        cli.download_weights(args)
