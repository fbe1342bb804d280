"""What a cloud platform's environment means to the launcher, and where nothing of it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.launcher.args import LauncherArgs, parse_args
from server.launcher.children import LAST_EVENTS_TIMEOUT_S, STOP_TIMEOUT_S
from server.launcher.platforms import PLATFORMS, find_platform

SAGEMAKER = {"HF_MODEL_ID": "m", "SM_NUM_GPUS": "1"}
SAGEMAKER_KILLS_AFTER_S = 30
VERTEX = {"MODEL_ID": "m", "AIP_MODE": "PREDICTION"}


def parse(environ: dict[str, str], *argv: str) -> LauncherArgs:
    return parse_args(argv, environ)


@pytest.mark.parametrize(
    ("argv", "environ", "expected"),
    [
        ("", SAGEMAKER, {"model_id": "m", "port": 8080, "graceful_termination_timeout_s": 15}),
        ("serve", {"HF_MODEL_ID": "m"}, {"model_id": "m", "port": 8080}),
        ("serve", {"MODEL_ID": "m"}, {"model_id": "m", "port": 8080}),
        ("", {"HF_MODEL_ID": "m"}, {"model_id": "m", "port": 8080}),
        # TGI's entrypoint: the platform's names win, the port is 8080 whatever the image says.
        ("serve", {**SAGEMAKER, "MODEL_ID": "other", "PORT": "80"}, {"model_id": "m", "port": 8080}),
        ("", {**SAGEMAKER, "SAGEMAKER_BIND_TO_PORT": "9000"}, {"port": 9000}),
        ("", {**SAGEMAKER, "GRACEFUL_TERMINATION_TIMEOUT": "5"}, {"graceful_termination_timeout_s": 5}),
        ("", {**SAGEMAKER, "HF_MODEL_REVISION": "r"}, {"revision": "r"}),
        ("--port 7000 --model-id n", SAGEMAKER, {"port": 7000, "model_id": "n"}),
        ("", VERTEX, {"model_id": "m", "port": 8080}),
        ("", {**VERTEX, "AIP_HTTP_PORT": "7080", "PORT": "80"}, {"port": 7080}),
        ("", {**VERTEX, "AIP_STORAGE_URI": "/mnt/model"}, {"model_id": "/mnt/model"}),
        ("", {**VERTEX, "AIP_STORAGE_URI": ""}, {"model_id": "m"}),
        ("--port 7000", VERTEX, {"port": 7000}),
    ],
)
def test_settings(argv: str, environ: dict[str, str], expected: dict[str, Any]) -> None:
    args = parse(environ, *argv.split())
    assert {name: getattr(args, name) for name in expected} == expected


def test_the_number_of_gpus_and_the_format() -> None:
    args = parse({"HF_MODEL_ID": "m", "SM_NUM_GPUS": "2", "HF_MODEL_QUANTIZE": "gptq"}, "serve")
    assert args.sharding.size == 2 and args.engine["quantize"] == "gptq"


@pytest.mark.parametrize(
    ("argv", "environ"),
    [
        ("", {"MODEL_ID": "m", "PORT": "80", "HF_MODEL_ID": "n"}),
        ("--model-id m", {"PORT": "80", "HF_MODEL_ID": "n", "HF_MODEL_QUANTIZE": "gptq"}),
        ("--model-id=m", {"PORT": "80", "AIP_STORAGE_URI": "gs://n"}),
    ],
)
def test_without_a_sign_nothing_is_read(argv: str, environ: dict[str, str]) -> None:
    args = parse(environ, *argv.split())
    assert (args.model_id, args.port, args.graceful_termination_timeout_s) == ("m", 80, 90)
    assert "quantize" not in args.engine


def test_sagemaker_has_no_time_to_kill_what_still_ends() -> None:
    args = parse(SAGEMAKER)
    assert args.graceful_termination_timeout_s + LAST_EVENTS_TIMEOUT_S + STOP_TIMEOUT_S < SAGEMAKER_KILLS_AFTER_S


def test_the_log_says_where_a_value_comes_from() -> None:
    echo = parse({"HF_MODEL_ID": "m", "SM_NUM_GPUS": "1"}).echo
    assert "the variable HF_MODEL_ID = 'm'" in echo
    assert "PORT of Amazon SageMaker = 8080" in echo


@pytest.mark.parametrize(
    ("argv", "environ", "message"),
    [
        ("", {**SAGEMAKER, "SM_NUM_GPUS": "all"}, "variable SM_NUM_GPUS: invalid count value: 'all'"),
        ("", {**VERTEX, "AIP_HTTP_PORT": "x"}, "variable AIP_HTTP_PORT: invalid port value: 'x'"),
        ("", {**VERTEX, "AIP_PREDICT_ROUTE": "x"}, "variable AIP_PREDICT_ROUTE: invalid route value: 'x'"),
        (
            "serve",
            {},
            "--model-id is missing: give a folder or a Hub id, e.g. --model-id Qwen/Qwen2.5-0.5B-Instruct, "
            "on Amazon SageMaker as HF_MODEL_ID",
        ),
        ("serve --port 80", SAGEMAKER, "unrecognized arguments: serve"),
    ],
)
def test_usage_errors(argv: str, environ: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(environ, *argv.split())
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}\n")


@pytest.mark.parametrize("platform", [platform for platform in PLATFORMS if platform.model_folder])
def test_a_model_that_the_platform_has_put_there_is_served(platform: Any, tmp_path: Path) -> None:
    assert find_platform([], {}, tmp_path) is None
    folder = tmp_path / platform.model_folder.lstrip("/")
    folder.mkdir(parents=True)
    assert find_platform([], {}, tmp_path) is None, "there is no model in it"
    (folder / "config.json").write_text("{}")
    assert find_platform([], {}, tmp_path) is platform
    assert platform.settings({}, tmp_path)["MODEL_ID"].value == platform.model_folder
    assert find_platform([], {"MODEL_ID": "m"}, tmp_path) is None
    assert find_platform(["--model-id", "m"], {}, tmp_path) is None


def test_a_mounted_repository_counts_before_the_name_that_it_has_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "config.json").write_text("{}")
    platform = find_platform([], {"HF_MODEL_ID": "org/model", "PORT": "80"}, tmp_path)
    assert platform is not None
    settings = platform.settings({"HF_MODEL_ID": "org/model", "PORT": "80"}, tmp_path)
    assert {name: setting.value for name, setting in settings.items()} == {"MODEL_ID": "/repository"}
