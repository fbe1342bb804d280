"""The image for CPUs, built from the Dockerfile and run with the command lines of Qwen's page about TGI.

`make image-test` runs this. It needs root, buildah, debootstrap and the package registries, and some GB in `build/`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.image.building import DOCKER_LABEL, GIT_SHA
from tests.image.conftest import AWQ_MODEL, GPTQ_MODEL, MODEL, Image
from tests.image.container import Container

pytestmark = pytest.mark.timeout(3600)

RANDOM_USER = "54321:12345"
QUESTION = "Tell me something about large language models."
CHAT = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": QUESTION}]
ANOTHER_MODEL = "/model"


def ask_as_the_page_does(container: Container) -> None:
    """The page's two curl commands, with shorter answers."""
    stream = container.curl("/generate_stream", {"inputs": QUESTION, "parameters": {"max_new_tokens": 8}})
    events = [json.loads(line.removeprefix("data:")) for line in stream.splitlines() if line.startswith("data:")]
    assert isinstance(events[-1]["generated_text"], str), stream  # it may be empty: the small model is terse
    chat = json.loads(container.curl("/v1/chat/completions", {"model": "", "messages": CHAT, "max_tokens": 8}))
    assert chat["usage"]["completion_tokens"] > 0, chat


def kernels(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*.nb[ci]")}


@pytest.mark.parametrize(
    ("name", "line", "log"),
    [
        ("plain", f"--model-id {MODEL}", "Connected"),
        ("gptq", f"--model-id {GPTQ_MODEL} --quantize gptq", "gptq, 4 bits"),
        ("awq", f"--model-id {AWQ_MODEL} --quantize awq", "awq, 4 bits"),
        ("eetq", f"--model-id {MODEL} --quantize eetq", "eetq, head int8"),
        ("two shards", f"--model-id {MODEL} --num-shard 2", "Sharding model on 2 processes"),
        ("speculation", f"--model-id {MODEL} --speculate 2", "Connected"),
        (
            "limits",
            f"--model-id {MODEL} --max-batch-prefill-tokens 4096 --max-total-tokens 4096 --max-input-length 2048",
            "Connected",
        ),
    ],
)
def test_the_command_lines_of_the_page(
    image: Image, volume: Path, report: Callable[[str], None], name: str, line: str, log: str
) -> None:
    with image.run(*line.split(), volumes={volume: "/data"}, shm_size="1g") as container:
        start_s = container.wait_for_log("Connected")
        ask_as_the_page_does(container)
        assert log in container.log
        assert container.stop() == 0, container.log
    report(f"{name}: connected after {start_s:.1f} s")


def test_limits_are_those_of_the_command_line(image: Image, volume: Path) -> None:
    line = f"--model-id {MODEL} --max-batch-prefill-tokens 1024 --max-total-tokens 512 --max-input-tokens 256"
    with image.run(*line.split(), volumes={volume: "/data"}) as container:
        container.wait_for_log("Connected")
        info = json.loads(container.curl("/info"))
        assert (info["max_input_tokens"], info["max_total_tokens"]) == (256, 512)
        assert (info["sha"], info["docker_label"], info["model_id"]) == (GIT_SHA, DOCKER_LABEL, MODEL)


def test_a_read_only_root_for_any_user_compiles_nothing(
    image: Image, volume: Path, tmp_path: Path, report: Callable[[str], None]
) -> None:
    """The kernels that were compiled at the build are found: nothing is added to them."""
    data = tmp_path / "data"
    data.mkdir()
    data.chmod(0o1777)
    (model,) = (volume / f"models--{MODEL.replace('/', '--')}" / "snapshots").iterdir()
    volumes = {data: "/data", model: f"{ANOTHER_MODEL}:ro"}
    with image.run("--model-id", ANOTHER_MODEL, volumes=volumes, user=RANDOM_USER, is_read_only=True) as container:
        start_s = container.wait_for_log("Connected")
        ask_as_the_page_does(container)
        assert container.stop() == 0, container.log
    shipped = kernels(image.root / "opt" / "venv" / "share" / "pytgi" / "numba")
    assert kernels(data / "cache" / "pytgi" / "numba") == shipped != set()
    report(f"read-only root, random user, empty /data: connected after {start_s:.1f} s")


def test_nothing_can_be_written_but_tmp(image: Image, volume: Path) -> None:
    options = {"volumes": {volume: "/data:ro"}, "user": RANDOM_USER, "is_read_only": True}
    with image.run("--model-id", MODEL, **options) as container:
        container.wait_for_log("Connected")
        ask_as_the_page_does(container)
        assert container.stop() == 0, container.log


def test_the_health_check(image: Image, volume: Path) -> None:
    check = image.configuration["Healthcheck"]["Test"]
    assert check[0] == "CMD"
    with image.run("--model-id", MODEL, "--port", "8123", volumes={volume: "/data"}) as container:
        container.wait_for_log("Args: ")
        assert container.execute(*check[1:]).returncode != 0
        container.wait_for_log("Connected")
        done = container.execute(*check[1:])
        assert done.returncode == 0, done.stderr


def test_the_argument_of_sagemaker(image: Image, volume: Path) -> None:
    environ = {"HF_MODEL_ID": MODEL, "SM_NUM_GPUS": "2", "HF_MODEL_QUANTIZE": "eetq"}
    with image.run("serve", volumes={volume: "/data"}, environ=environ) as container:
        container.wait_for_log("Connected")
        assert "Sharding model on 2 processes" in container.log
        assert container.curl("/ping", port=8080) == ""
        assert container.stop() == 0, container.log


def test_what_the_image_says_of_itself(image: Image, report: Callable[[str], None]) -> None:
    configuration = image.configuration
    assert configuration["Entrypoint"] == ["text-generation-launcher"] and not configuration.get("Cmd")
    assert {"PORT=80", "HF_HOME=/data", f"GIT_SHA={GIT_SHA}"} <= set(configuration["Env"])
    assert configuration["Labels"]["org.opencontainers.image.revision"] == GIT_SHA
    assert not (image.root / "build" / "dist").exists()
    report(f"built in {image.built_s:.0f} s; {image.num_bytes / 1e9:.2f} GB unpacked")
