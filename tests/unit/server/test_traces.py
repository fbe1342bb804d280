"""Spans of real requests at an OTLP collector, and a collector that is not there; the spans of log lines."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from engine.link.logs import JsonFormatter
from server.app import create_app
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import FakeEngine, make_config, running_server, url_of

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
BODY = {"inputs": "Hello", "parameters": {"do_sample": True, "seed": 7}}
FIELDS = {"parameters", "total_time", "validation_time", "queue_time", "inference_time", "time_per_token", "seed"}

FLUSH_S = 0.5
"""Time that a server here has to send its last spans."""


class Collector(TraceServiceServicer):
    """A collector that keeps the spans it is sent."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []

    def Export(self, request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:
        self.requests.append(request)
        return ExportTraceServiceResponse()

    @property
    def spans(self) -> dict[str, Span]:
        """Spans by name; each name is there once."""
        spans = [
            span
            for request in self.requests
            for of_resource in request.resource_spans
            for of_scope in of_resource.scope_spans
            for span in of_scope.spans
        ]
        by_name = {span.name: span for span in spans}
        assert len(by_name) == len(spans)
        return by_name

    @property
    def service_names(self) -> set[str]:
        resources = [resource.resource for request in self.requests for resource in request.resource_spans]
        pairs = [pair for resource in resources for pair in resource.attributes]
        return {pair.value.string_value for pair in pairs if pair.key == "service.name"}


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    """A collector and its endpoint."""
    servicer = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(1))
    add_TraceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


def traced_app(engine: FakeEngine, folder: Path, endpoint: str, **changes: Any) -> FastAPI:
    config = make_config(otlp_endpoint=endpoint, **changes)
    return create_app(engine, config, TextTokenizer.from_folder(str(folder), 1))


def attributes_of(span: Span) -> dict[str, str | int]:
    return {pair.key: pair.value.string_value or pair.value.int_value for pair in span.attributes}


def test_spans_of_a_request(engine: FakeEngine, model_folder: Path, collector: tuple[Collector, str]) -> None:
    servicer, endpoint = collector
    before = time.time_ns()
    with running_server(traced_app(engine, model_folder, endpoint, otlp_service_name="tests")) as server:
        host = url_of(server).removeprefix("http://")
        headers = {"user-agent": "me", **TRACEPARENT}
        assert httpx.post(f"{url_of(server)}/generate?a=b", json=BODY, headers=headers).status_code == 200
    assert servicer.service_names == {"tests"}
    http, handler = servicer.spans["POST /generate"], servicer.spans["generate"]
    assert len(servicer.spans) == 2
    assert attributes_of(http) == {
        "http.request.method": "POST",
        "http.route": "/generate",
        "network.protocol.version": "1.1",
        "server.address": host,
        "user_agent.original": "me",
        "url.path": "/generate",
        "url.query": "a=b",
        "url.scheme": "http",
        "http.response.status_code": 200,
        "span.type": "web",
    }
    assert http.kind == Span.SPAN_KIND_SERVER
    for span in (http, handler):
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
        assert before < span.start_time_unix_nano < span.end_time_unix_nano < time.time_ns()
    fields = attributes_of(handler)
    assert fields.keys() == FIELDS
    assert fields["seed"] == "Some(7)"
    assert str(fields["total_time"]).endswith("s")


def test_spans_without_a_trace_context(
    engine: FakeEngine, model_folder: Path, collector: tuple[Collector, str]
) -> None:
    servicer, endpoint = collector
    chat = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    with running_server(traced_app(engine, model_folder, endpoint)) as server:
        base = url_of(server)
        httpx.post(f"{base}/", json={"inputs": "Hello", "stream": True})
        httpx.post(f"{base}/v1/chat/completions", json=chat, headers={"traceparent": "not one"})
        httpx.get(f"{base}/health")
        httpx.get(f"{base}/nowhere")
    assert servicer.service_names == {"text-generation-inference.router"}
    spans = servicer.spans
    handlers = {
        "POST /": "compat_generate",
        "compat_generate": "generate_stream",
        "POST /v1/chat/completions": "chat_completions",
        "GET /health": "health",
    }
    assert spans.keys() == {"POST /", "GET", *handlers, *handlers.values()}
    for parent, child in handlers.items():
        assert spans[child].parent_span_id == spans[parent].span_id
        assert spans[child].trace_id == spans[parent].trace_id
    assert {spans[name].parent_span_id for name in spans if name not in handlers.values()} == {b""}
    assert len({span.trace_id for span in spans.values()}) == 4
    assert attributes_of(spans["generate_stream"]).keys() == attributes_of(spans["chat_completions"]).keys() == FIELDS
    assert not attributes_of(spans["compat_generate"])
    assert attributes_of(spans["GET"])["http.response.status_code"] == 404


def test_a_refusal_before_the_handler_has_no_handlers_span(
    engine: FakeEngine, model_folder: Path, collector: tuple[Collector, str]
) -> None:
    servicer, endpoint = collector
    with running_server(traced_app(engine, model_folder, endpoint, api_key="key")) as server:
        assert httpx.post(f"{url_of(server)}/generate", json=BODY).status_code == 401
        engine.healthy = False
        assert httpx.get(f"{url_of(server)}/health").status_code == 503
    assert servicer.spans.keys() == {"POST", "GET /health", "health"}
    assert attributes_of(servicer.spans["POST"])["http.response.status_code"] == 401
    assert servicer.spans["GET /health"].status.code == Status.STATUS_CODE_ERROR


@pytest.mark.parametrize("kind", ["refuses", "is silent"])
def test_a_collector_that_does_not_take_anything(
    engine: FakeEngine,
    model_folder: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Requests don't notice, the end comes in time, and the log says it once."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setattr("server.telemetry.otlp.FLUSH_S", FLUSH_S)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "is silent":
            listener.listen()
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with running_server(traced_app(engine, model_folder, endpoint)) as server:
            for _ in range(5):
                started = time.monotonic()
                assert httpx.post(f"{url_of(server)}/generate", json=BODY).status_code == 200
                assert time.monotonic() - started < 1
                time.sleep(0.05)
            ending = time.monotonic()
        assert time.monotonic() - ending < FLUSH_S + 1
    deadline = time.monotonic() + 1
    while not (lines := [record.getMessage() for record in caplog.records if record.name == "server.telemetry.otlp"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert lines == [f"Traces can't be sent to {endpoint}: spans are lost until they can"]
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry")]
    assert capfd.readouterr().err == ""


def test_without_an_endpoint_nothing_that_sends_traces_is_imported() -> None:
    """FastAPI itself imports the interface of opentelemetry, which does nothing."""
    names = "('grpc', 'google', 'opentelemetry.sdk', 'opentelemetry.exporter')"
    script = f"import sys, server.__main__; print([name for name in sys.modules if name.startswith({names})])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


async def lines_of(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, body: Any, path: str) -> list[Any]:
    """The JSON lines of one request."""
    with caplog.at_level(logging.INFO):
        await client.post(path, json=body)
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    return [line for line in lines if line["target"].startswith("server.")]


async def test_the_line_of_a_request_has_its_handlers_spans(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    (line,) = await lines_of(client, caplog, {**BODY, "stream": True}, "/")
    assert (line["level"], line["message"]) == ("INFO", "Success")
    assert line["span"].keys() == {"name", *FIELDS, "route", "request_id", "prompt_tokens", "generated_tokens"}
    assert line["span"]["name"] == "generate_stream"
    assert line["spans"] == [{"name": "compat_generate"}, line["span"]]


async def test_the_line_of_a_failure_has_the_bare_text(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}
    (line,) = await lines_of(client, caplog, body, "/v1/chat/completions")
    assert (line["level"], line["message"]) == ("WARN", "`max_tokens` must be strictly positive")
    assert line["span"].keys() == {"name", "route", "request_id"}
    assert line["span"]["name"] == "chat_completions"
    assert line["spans"] == [line["span"]]
