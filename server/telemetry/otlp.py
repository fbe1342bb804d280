"""Traces to an OpenTelemetry collector, over OTLP and gRPC (`docs/wire.md`, 7.3).

This module is imported only with --otlp-endpoint: the libraries cost memory. Spans are made when a request has ended,
with its times: nothing has to be kept open meanwhile, and no trace header goes back to the client.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import Scope

from server.telemetry.spans import RequestSpans

logger = logging.getLogger(__name__)

FLUSH_S = 1.5
"""The longest that the last spans may hold up the end of the process."""


class QuietExporter(SpanExporter):
    """Logs one line when the collector can't be reached and one when it can again, whatever happens in between."""

    def __init__(self, endpoint: str) -> None:
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # a line for every attempt otherwise
        self._endpoint = endpoint
        is_plain = not endpoint.startswith("https://")
        self._exporter = OTLPSpanExporter(endpoint=endpoint, insecure=is_plain)
        self._is_failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        is_failing = result is not SpanExportResult.SUCCESS
        if is_failing and not self._is_failing:
            logger.warning("Traces can't be sent to %s: spans are lost until they can", self._endpoint)
        elif self._is_failing and not is_failing:
            logger.info("Traces can be sent to %s again", self._endpoint)
        self._is_failing = is_failing
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


class OtlpTracer:
    """Sends every request's spans in batches, from a thread of its own."""

    def __init__(self, endpoint: str, service_name: str) -> None:
        self._exporter = QuietExporter(endpoint)
        resource = Resource.create({"service.name": service_name})
        self._provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("pytgi")
        self._propagator = TraceContextTextMapPropagator()

    def report(self, scope: Scope, spans: RequestSpans, started_ns: int, status: int) -> None:
        """Send one HTTP server span, and the handlers' spans.

        As with TGI, the trace context of the request is the parent of the HTTP span and of the outermost handler's span
        alike. Without a context the HTTP span is the parent of the handler's span.
        """
        parent = self._parent(scope)
        route = getattr(scope.get("route"), "path", None)
        http = self._tracer.start_span(
            f"{scope['method']} {route}" if route else scope["method"],
            parent,
            kind=trace.SpanKind.SERVER,
            attributes=_http_attributes(scope, route, status),
            start_time=started_ns,
        )
        if status >= 500:
            http.set_status(trace.StatusCode.ERROR)
        opened = [http]
        context = parent if trace.get_current_span(parent).get_span_context().is_valid else _inside(http)
        for name in spans.names if route else []:
            is_innermost = name == spans.names[-1]
            span = self._tracer.start_span(
                name, context, attributes=spans.fields if is_innermost else None, start_time=started_ns
            )
            opened.append(span)
            context = _inside(span)
        for span in reversed(opened):
            span.end()

    def _parent(self, scope: Scope) -> Context:
        traceparent = Headers(scope=scope).get("traceparent")
        return self._propagator.extract({"traceparent": traceparent} if traceparent else {}, Context())

    def close(self) -> None:
        """Send the last spans within `FLUSH_S`; spans that are left then are lost."""
        flush = threading.Thread(target=self._provider.shutdown, name="trace-flush", daemon=True)
        flush.start()
        flush.join(FLUSH_S)
        self._exporter.shutdown()


def _inside(span: trace.Span) -> Context:
    return trace.set_span_in_context(span, Context())


def _http_attributes(scope: Scope, route: str | None, status: int) -> dict[str, str | int]:
    """The attributes of TGI's HTTP span. One that a request does not have is left out."""
    headers = Headers(scope=scope)
    attributes = {
        "http.request.method": scope["method"],
        "http.route": route,
        "network.protocol.version": scope["http_version"],
        "server.address": headers.get("host"),
        "user_agent.original": headers.get("user-agent"),
        "url.path": scope["path"],
        "url.query": scope["query_string"].decode("latin-1") or None,
        "url.scheme": scope["scheme"],
        "http.response.status_code": status,
        "span.type": "web",
    }
    return {name: value for name, value in attributes.items() if value is not None}
