"""Servers that are started as cloud platforms start a container, and asked as the platforms ask."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.bucket_stand_in import bucket_stand_in
from tests.e2e.launched import LaunchedServer, free_port, launched

GREEDY = {"max_new_tokens": 4}
ENDPOINT = "/v1/endpoints/7/deployedModels/9"


def post(server: LaunchedServer, path: str, body: Any, **headers: str) -> httpx.Response:
    return httpx.post(server.url + path, json=body, headers=headers, timeout=60)


def test_sagemaker(tiny_model_dir: Path, tmp_path: Path) -> None:
    """`docker run IMAGE serve`, /ping until it answers, /invocations; SIGKILL would come 30 s after SIGTERM."""
    port = free_port()
    environ = {
        "HF_MODEL_ID": str(tiny_model_dir),
        "SM_NUM_GPUS": "1",
        "SAGEMAKER_BIND_TO_PORT": str(port),
        "PORT": "80",
        "MAX_TOTAL_TOKENS": "64",
    }
    with launched(None, tmp_path, "serve", environ=environ, port=port) as server:
        assert httpx.get(f"{server.url}/ping").status_code == 200
        answer = post(server, "/invocations", {"inputs": "Hi", "parameters": GREEDY}, accept="application/json")
        assert answer.status_code == 200 and isinstance(answer.json()[0]["generated_text"], str)
        chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "stream": True}
        events = post(server, "/invocations", chat, **{"x-amzn-sagemaker-custom-attributes": "a=b"}).text
        assert events.rstrip().endswith("data: [DONE]")
        assert server.info()["max_total_tokens"] == 64
        started = time.monotonic()
        server.process.terminate()
        assert server.wait_for_end() == 0
        assert time.monotonic() - started < 20


def test_vertex(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Port, both routes and the bucket with the model by variables."""
    port = free_port()
    environ = {
        "HUGGINGFACE_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "AIP_MODE": "PREDICTION",
        "AIP_HTTP_PORT": str(port),
        "AIP_HEALTH_ROUTE": ENDPOINT,
        "AIP_PREDICT_ROUTE": f"{ENDPOINT}:predict",
        "AIP_STORAGE_URI": "gs://bucket/models/mine",
        "PORT": "80",
    }
    files = {f"models/mine/{path.name}": path.read_bytes() for path in tiny_model_dir.iterdir()}
    with (
        bucket_stand_in(files) as bucket,
        launched(None, tmp_path, environ=environ | bucket.environ, port=port) as server,
    ):
        assert httpx.get(server.url + ENDPOINT).status_code == 200
        prompt = {"inputs": "Hi", "parameters": {**GREEDY, "do_sample": False}}
        chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}
        answer = post(server, f"{ENDPOINT}:predict", {"instances": [prompt, chat, prompt]}).json()
        first, second, third = answer["predictions"]
        assert first == third == server.generate("Hi", **GREEDY)["generated_text"]
        assert isinstance(second, str)


def test_hugging_face_endpoints(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The model's repository is a folder in the container; the endpoint's settings say port, route and variables."""
    port = free_port()
    environ = {"MODEL_ID": str(tiny_model_dir), "PORT": str(port), "MAX_INPUT_TOKENS": "32", "JSON_OUTPUT": "true"}
    with launched(None, tmp_path, environ=environ, port=port) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert post(server, "/", {"inputs": "Hi", "parameters": GREEDY}).json()[0]["generated_text"].startswith("Hi")
        assert server.info()["max_input_tokens"] == 32
        assert json.loads(server.log.splitlines()[-1])["message"]
