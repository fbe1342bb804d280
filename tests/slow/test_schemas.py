"""50 random schemas on the demo model give 50 documents that follow them, together with plain requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from pathlib import Path

import jsonschema
import pytest
from tokenizers import Tokenizer

from engine.link.config import EngineConfig
from engine.link.messages import FinishReason, GenerationRequest, SamplingParams
from engine.start import start_engine
from server.requests.grammar import GrammarCompiler
from server.requests.values import GrammarSpec
from tests.contract.harness import run_requests
from tests.e2e.conftest import build_demo_model
from tests.random_schemas import Schema, random_schema

NUM_SCHEMAS = 50
BATCH = 8
MAX_NEW_TOKENS = 400
PLAIN_PROMPT = "The capital of France is"


def make_request(number: int, schema: Schema | None, tokenizer: Tokenizer) -> GenerationRequest:
    """A request for a document, or a plain one without a schema. Every second one is greedy."""
    grammar, text = None, PLAIN_PROMPT
    if schema is not None:
        with contextlib.closing(GrammarCompiler()) as compiler:
            grammar = asyncio.run(compiler.compile(GrammarSpec("json", schema), is_strict=False)).grammar
        text = f"Write an example of this JSON schema:\n{json.dumps(schema)}\n\nExample: "
    return GenerationRequest(
        request_id=f"request {number}",
        prompt_token_ids=tokenizer.encode(text).ids,
        max_new_tokens=MAX_NEW_TOKENS if schema is not None else 24,
        sampling=SamplingParams(seed=number if number % 2 else None),
        grammar=grammar,
    )


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("max_draft_tokens", [0, 8])
def test_documents_follow_their_schemas(max_draft_tokens: int) -> None:
    folder: Path = build_demo_model()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    options = {"max_total_tokens": 2048, "max_batch_total_tokens": 16_384, "max_draft_tokens": max_draft_tokens}
    core, _ = start_engine(EngineConfig(model_path=str(folder), **options))
    schemas = [random_schema(random.Random(1000 + seed)) for seed in range(NUM_SCHEMAS)]
    alone = run_requests(core, [make_request(0, None, tokenizer)]).token_ids
    for first in range(0, NUM_SCHEMAS, BATCH - 1):
        some = schemas[first : first + BATCH - 1]
        requests = [make_request(number, schema, tokenizer) for number, schema in enumerate(some, start=1)]
        outcome = run_requests(core, [*requests, make_request(0, None, tokenizer)])
        for schema, token_ids, event in zip(some, outcome.token_ids, outcome.last_events, strict=False):
            assert event.finish_reason is FinishReason.EOS_TOKEN
            document = json.loads(tokenizer.decode(token_ids))
            print(json.dumps(document, ensure_ascii=False))
            jsonschema.validate(document, schema, jsonschema.Draft202012Validator)
        assert outcome.token_ids[len(some) :] == alone
