"""Random requests made from the server's own description, and whether the answers are as it says; no fixtures."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import jsonschema
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import CheckFunction, not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.types import Receive, Scope, Send

from server.app import create_app
from server.requests.openai import LENGTH_KEYS
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import ObligingEngine, events_of, make_config, write_model_folder

CHECKS: list[CheckFunction] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


class Server:
    """An application whose engine gives what is asked for, and the application's own description."""

    def __init__(self, folder: Path, **config: Any) -> None:
        write_model_folder(folder)
        tokenizer = TextTokenizer.from_folder(str(folder), 1)
        self.engine = ObligingEngine(tokenizer._encode("Hello, world! 你好<|im_end|>", False))
        self.app: FastAPI = create_app(self.engine, make_config(**config), tokenizer)
        self.schema = schemathesis.openapi.from_asgi("/openapi.json", self._without_lifespan)

    async def _without_lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """schemathesis starts and stops the application for each call: it would close the tokenizer."""
        if scope["type"] == "http":
            await self.app(scope, receive, send)
            return
        for word in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{word}.complete"})

    def try_out(self, num_cases: int, *, is_random: bool = False) -> collections.Counter[int]:
        """Send so many requests, about half of which break the description. Returns how often each status came."""
        statuses: collections.Counter[int] = collections.Counter()

        as_described = self.schema.as_strategy(generation_mode=GenerationMode.POSITIVE)
        wrong = self.schema.include(method="POST").as_strategy(generation_mode=GenerationMode.NEGATIVE)

        @given(case=as_described | wrong)
        @settings(
            max_examples=num_cases,
            deadline=None,
            database=None,
            derandomize=not is_random,
            suppress_health_check=list(HealthCheck),
        )
        def call(case: schemathesis.Case) -> None:
            statuses[self.check(case)] += 1

        call()
        return statuses

    def check(self, case: schemathesis.Case) -> int:
        """Call, and compare the answer with the description. Returns the status."""
        response = case.call()
        excused: set[CheckFunction] = set()
        if self.app.state.service.config.is_strict_tgi:
            # What is described is the reading without it, and /vertex says 500 whatever fails.
            excused |= {negative_data_rejection, *([not_a_server_error] if case.path == "/vertex" else [])}
        if case.path in ("/tokenize", "/chat_tokenize"):
            excused.add(negative_data_rejection)  # they don't look at the parameters
        if isinstance(case.body, dict) and case.body.keys() >= set(LENGTH_KEYS):
            excused.add(negative_data_rejection)  # of two names of a field the newer counts, and the other is not read
        if response.headers.get("content-type", [""])[0] == "text/event-stream":
            excused.add(response_schema_conformance)  # it wants OpenAPI 3.2
            events = events_of(response.content)
            for data in events:
                self._validate_event(case, data)
            if "error" in events[0]:
                excused.add(negative_data_rejection)  # a refusal under status 200
        case.validate_response(response, checks=[check for check in CHECKS if check not in excused])
        return response.status_code

    def _validate_event(self, case: schemathesis.Case, data: Any) -> None:
        document = self.app.state.openapi
        responses = document["paths"][case.path][case.method.lower()]["responses"]
        schema = responses["200"]["content"]["text/event-stream"]["schema"]
        jsonschema.validate(data, schema | {"components": document["components"]})
