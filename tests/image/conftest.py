"""The image, built once, and a volume for /data with the models that the tests name as on the Hub."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import build_demo_model
from tests.image import building
from tests.image.container import Container, Options, running

MODEL = "Qwen/Qwen2-7B-Instruct"
GPTQ_MODEL = "Qwen/Qwen2-7B-Instruct-GPTQ-Int4"
AWQ_MODEL = "Qwen/Qwen2-7B-Instruct-AWQ"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = "--groupsize 64 --num-samples 16 --sample-tokens 128 --perplexity-tokens 0".split()
QUANTIZE_TIMEOUT_S = 600.0


@dataclasses.dataclass(frozen=True)
class Image:
    root: Path
    configuration: dict[str, Any]
    built_s: float
    num_bytes: int
    log_dir: Path

    def run(self, *arguments: str, **options: Any) -> AbstractContextManager[Container]:
        log_path = self.log_dir / f"{len(list(self.log_dir.iterdir()))}.log"
        return running(self.root, self.configuration, log_path, arguments, Options(**options))


def snapshot_folder(cache: Path, model_id: str) -> Path:
    """A new folder for the model's files in a cache of the Hub."""
    repository = cache / f"models--{model_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    return repository / "snapshots" / COMMIT


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    if reasons := building.reasons_against():
        pytest.fail("; ".join(reasons))
    building.remove_all()
    building.FOLDER.mkdir(parents=True)
    try:
        print("Making the base with debootstrap", flush=True)  # each of these takes minutes
        building.make_base()
        print("Building the target cpu", flush=True)
        built_s = building.build("cpu")
        root = building.unpack()
        yield Image(root, building.configuration(), built_s, building.num_bytes(root), tmp_path_factory.mktemp("logs"))
    finally:
        building.remove_all()


@pytest.fixture(scope="session")
def volume(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's `$PWD/data`: the small demo model where TGI 2.0 kept models, and its quantised forms in `hub`."""
    folder = tmp_path_factory.mktemp("data")
    folder.chmod(0o755)
    shutil.copytree(build_demo_model("--small"), snapshot_folder(folder, MODEL))
    shutil.copy(building.REPOSITORY / "LICENSE", folder / "text.txt")
    for method, model_id in (("gptq", GPTQ_MODEL), ("awq", AWQ_MODEL)):
        arguments = ["quantize", MODEL, f"/data/{method}", "--method", method, "--dataset", "/data/text.txt", *SMALL]
        entrypoint = ("text-generation-server",)
        print(f"Making the {method} checkpoint", flush=True)
        with image.run(*arguments, volumes={folder: "/data"}, entrypoint=entrypoint) as container:
            assert container.process.wait(QUANTIZE_TIMEOUT_S) == 0, container.log
        os.rename(folder / method, snapshot_folder(folder / "hub", model_id))
    return folder


@pytest.fixture(scope="session")
def report() -> Iterator[Callable[[str], None]]:
    """Takes the lines that are printed at the end."""
    lines: list[str] = []
    yield lines.append
    print("\n" + "\n".join(lines))
