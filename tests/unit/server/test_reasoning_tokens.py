"""Usage says how many tokens of an answer are thoughts, on each route that tells thoughts apart."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.link.messages import FinishReason
from server.app import create_app
from tests.unit.server.harness import CHATML, FakeEngine, client_of, events_of, make_config, one_by_one
from tests.unit.server.test_thoughts import THINKING_CHATML, load

USER = [{"role": "user", "content": "2 + 2?"}]
CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
MARKS = ("<think>", "</think>")


@contextlib.asynccontextmanager
async def answering(
    folder: Path, template: str, text: str, reason: FinishReason = FinishReason.EOS_TOKEN, **config: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, list[int], dict[str, int]]]:
    """A client of a model that answers `text`, the ids of the answer, and those of the marks."""
    tokenizer = load(folder, template, *MARKS)
    engine = FakeEngine()
    ids = tokenizer._encode(text + ("<|im_end|>" if reason is FinishReason.EOS_TOKEN else ""), False)
    engine.script.events = one_by_one(ids, reason)
    mark_ids = {mark: tokenizer._encode(mark, False)[0] for mark in MARKS}
    async with client_of(create_app(engine, make_config(**config), tokenizer)) as client:
        yield client, ids, mark_ids


async def usages(client: httpx.AsyncClient, **said: Any) -> list[dict[str, Any]]:
    """The usage of a whole answer and of a streamed one."""
    body = {"messages": USER} | said
    whole = await client.post("/v1/chat/completions", json=body)
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = await client.post("/v1/chat/completions", json=body | streaming)
    return [whole.json()["usage"], events_of(streamed.content)[-1]["usage"]]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (THINKING_CHATML, "Two and two.\n</think>\n\nFour."),
        (THINKING_CHATML, "</think>Four."),
        (CHATML, "<think>\nHm, 你好.\n</think>\n\nFour."),
        (CHATML, "<think></think>Four."),
        (CHATML, "Four."),
        (THINKING_CHATML, f"maybe {CALL}\n</think>\n\n{CALL}"),
    ],
)
@pytest.mark.parametrize("said", [{}, {"n": 2}, {"tools": TOOLS}, {"stop": "never"}])
async def test_the_tokens_between_the_marks_count(tmp_path: Path, template: str, text: str, said: Any) -> None:
    async with answering(tmp_path, template, text) as (client, ids, marks):
        end = ids.index(marks["</think>"]) if "</think>" in text else 0
        num_thought = end - ids.index(marks["<think>"]) - 1 if "<think>" in text else end
        for usage in await usages(client, **said):
            details = usage["completion_tokens_details"]
            assert details == {"reasoning_tokens": num_thought * said.get("n", 1)}
            assert usage["completion_tokens"] == len(ids) * said.get("n", 1)


async def test_a_thought_without_end_is_all_of_the_answer(tmp_path: Path) -> None:
    async with answering(tmp_path, THINKING_CHATML, "Two and", FinishReason.LENGTH) as (client, ids, _):
        for usage in await usages(client):
            assert usage["completion_tokens_details"] == {"reasoning_tokens": len(ids)}


async def test_responses_count_them_too(tmp_path: Path) -> None:
    async with answering(tmp_path, THINKING_CHATML, "Two and two.\n</think>\n\nFour.") as (client, ids, marks):
        whole = (await client.post("/v1/responses", json={"input": "2 + 2?"})).json()
        streamed = await client.post("/v1/responses", json={"input": "2 + 2?", "stream": True})
        expected = {"reasoning_tokens": ids.index(marks["</think>"])}
        assert whole["usage"]["output_tokens_details"] == expected
        assert f'"output_tokens_details":{{"reasoning_tokens":{expected["reasoning_tokens"]}}}' in streamed.text


@pytest.mark.parametrize("config", [{"reasoning_parser": "off"}, {"is_strict_tgi": True, "reasoning_parser": "qwen3"}])
async def test_where_thoughts_are_content_nobody_counts(tmp_path: Path, config: dict[str, Any]) -> None:
    async with answering(tmp_path, THINKING_CHATML, "Hm.\n</think>\n\nFour.", **config) as (client, _, _):
        assert all("completion_tokens_details" not in usage for usage in await usages(client))
