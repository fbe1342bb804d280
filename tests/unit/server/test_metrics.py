"""/metrics in the official parser, against TGI's families (`docs/metrics.md`): names, kinds, labels, bounds, values."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from engine.link.messages import EngineStats, StepOutput, StepReport, TokenEvent
from server.app import create_app
from server.telemetry.families import Histogram
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import LIMITS, FakeEngine, client_of, make_config, one_by_one

DURATIONS = "D"
INPUT_TOKENS = "I"
TOTAL_TOKENS = "T"
BATCHES = "B"
BOUNDS = {
    INPUT_TOKENS: [LIMITS.max_input_tokens / 100 * k for k in range(1, 101)],
    TOTAL_TOKENS: [LIMITS.max_total_tokens / 100 * k for k in range(1, 101)],
    BATCHES: list(range(1, 1025)),
}
FIRST_DURATIONS = "0.00015000000000000001 0.00022500000000000002 0.0003375 0.00050625 0.000759375 0.0011390624999999999"
LAST_DURATION = "145.61096060497135"

TGI: dict[str, tuple[str, str, str]] = {
    "tgi_request_count": ("counter", "", ""),
    "tgi_request_success": ("counter", "", ""),
    "tgi_request_failure": ("counter", "err", ""),
    "tgi_request_duration": ("histogram", "", DURATIONS),
    "tgi_request_validation_duration": ("histogram", "", DURATIONS),
    "tgi_request_queue_duration": ("histogram", "", DURATIONS),
    "tgi_request_inference_duration": ("histogram", "", DURATIONS),
    "tgi_request_mean_time_per_token_duration": ("histogram", "", DURATIONS),
    "tgi_request_generated_tokens": ("histogram", "", TOTAL_TOKENS),
    "tgi_request_input_length": ("histogram", "", INPUT_TOKENS),
    "tgi_request_max_new_tokens": ("histogram", "", TOTAL_TOKENS),
    "tgi_request_skipped_tokens": ("summary", "", ""),
    "tgi_batch_next_size": ("histogram", "", BATCHES),
    "tgi_batch_current_size": ("gauge", "", ""),
    "tgi_batch_current_max_tokens": ("gauge", "", ""),
    "tgi_queue_size": ("gauge", "", ""),
    "tgi_batch_inference_count": ("counter", "method", ""),
    "tgi_batch_inference_success": ("counter", "method", ""),
    "tgi_batch_inference_failure": ("counter", "method", ""),
    "tgi_batch_inference_duration": ("histogram", "method", DURATIONS),
    "tgi_batch_forward_duration": ("histogram", "method", DURATIONS),
    "tgi_batch_decode_duration": ("histogram", "method", DURATIONS),
    "tgi_batch_filter_duration": ("histogram", "method", DURATIONS),
    "tgi_batch_concat": ("counter", "reason", ""),
    "tgi_batch_concat_duration": ("histogram", "method", DURATIONS),
}
"""A family of TGI -> kind, label, bounds."""
COUNTERS = {name for name, (kind, _, _) in TGI.items() if kind == "counter"}
READINGS = {"tgi_batch_current_size", "tgi_batch_current_max_tokens", "tgi_queue_size"}
OURS = {
    "pytgi_requests_running": "gauge",
    "pytgi_requests_waiting": "gauge",
    "pytgi_kv_blocks_used": "gauge",
    "pytgi_kv_blocks_cached": "gauge",
    "pytgi_kv_blocks_total": "gauge",
    "pytgi_prefix_hit_tokens": "counter",
    "pytgi_preemptions": "counter",
    "pytgi_adapter_loads": "counter",
    "pytgi_draft_steps": "counter",
    "pytgi_draft_tokens": "counter",
    "pytgi_draft_tokens_accepted": "counter",
    "pytgi_time_to_first_token_duration": "histogram",
    "pytgi_inter_token_duration": "histogram",
    "pytgi_request_prefix_hit_ratio": "histogram",
}
STATS = EngineStats(
    num_running=3, num_waiting=2, num_used_blocks=5, num_blocks=9, block_size=16, num_prefix_hit_tokens=32
)
STEPS = StepOutput(
    events=[],
    stats=STATS,
    reports=[
        StepReport(
            is_prefill=True, num_sequences=2, num_admitted=2, num_draft_hits=[0, 0], total_s=0.5, forward_s=0.25
        ),
        StepReport(num_sequences=2, num_draft_hits=[3, 0], total_s=0.0625, forward_s=0.03125, update_s=0.001),
        StepReport(is_prefill=True, num_sequences=3, num_admitted=1, num_draft_hits=[1, 0, 0], schedule_s=0.001),
        StepReport(is_failed=True, num_sequences=3),
    ],
)
PROMPT = {"inputs": "Hello", "parameters": {"max_new_tokens": 20}}
CHAT = {"messages": [{"role": "user", "content": "Hello"}]}


async def scrape(client: httpx.AsyncClient) -> dict[str, Metric]:
    """Samples by name, from the official parser, which names those of counters `_total` whatever they were."""
    response = await client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert "_total " not in response.text.replace("pytgi_kv_blocks_total ", "")
    return {family.name: family for family in text_string_to_metric_families(response.text)}


def name_of(sample: Sample) -> str:
    return sample.name if sample.name == "pytgi_kv_blocks_total" else sample.name.removesuffix("_total")


def value_of(families: dict[str, Metric], name: str, **labels: str) -> float:
    samples = [sample for family in families.values() for sample in family.samples]
    (value,) = [sample.value for sample in samples if (name_of(sample), sample.labels) == (name, labels)]
    return value


async def ask(client: httpx.AsyncClient, **parameters: Any) -> int:
    return (await client.post("/generate", json={"inputs": "Hello", "parameters": parameters})).status_code


async def test_every_family_of_the_reference(strict_client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert await ask(strict_client, max_new_tokens=20) == 200
    assert await ask(strict_client, max_new_tokens=0) == 422
    engine.stats = STATS
    engine.observe_output(STEPS, 0.002)
    families = await scrape(strict_client)
    assert families.keys() == TGI.keys() | OURS.keys()
    for name, (kind, label, bounds) in TGI.items():
        family = families[name]
        assert family.type == kind, name
        names = {name_of(sample) for sample in family.samples}
        suffixes = {"histogram": ["_bucket", "_sum", "_count"], "summary": ["", "_sum", "_count"]}.get(kind, [""])
        assert names == {name + suffix for suffix in suffixes}
        labels = {key for sample in family.samples for key in sample.labels} - {"le", "quantile"}
        assert labels == ({label} if label else set())
        if bounds:
            check_bounds(family, bounds)
    assert {name: families[name].type for name in OURS} == OURS


def check_bounds(family: Metric, bounds: str) -> None:
    """Every row of buckets has exactly the bounds, and counts that only grow, up to the count of all."""
    rows: dict[str, list[tuple[str, float]]] = {}
    for sample in family.samples:
        if sample.name.endswith("_bucket"):
            rest = {key: value for key, value in sample.labels.items() if key != "le"}
            rows.setdefault(str(rest), []).append((sample.labels["le"], sample.value))
    assert rows
    for row in rows.values():
        texts = [text for text, _ in row]
        assert texts[-1] == "+Inf"
        assert not any(text.endswith(".0") or "e" in text for text in texts)
        if bounds == DURATIONS:
            assert (len(texts), " ".join(texts[:6]), texts[-2]) == (36, FIRST_DURATIONS, LAST_DURATION)
        else:
            assert [float(text) for text in texts[:-1]] == BOUNDS[bounds]
        counts = [count for _, count in row]
        assert counts == sorted(counts)


async def test_the_text(strict_client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await ask(strict_client, max_new_tokens=0)
    text = (await strict_client.get("/metrics")).text
    assert text.startswith(
        "# HELP tgi_request_count Requests for a generation\n# TYPE tgi_request_count counter\ntgi_request_count 1\n\n"
        "# HELP tgi_request_failure Requests that failed, by the reason\n# TYPE tgi_request_failure counter\n"
        'tgi_request_failure{err="validation"} 1\n\n# HELP pytgi_'
    )
    engine.observe_output(STEPS, 0.002)
    text = (await strict_client.get("/metrics")).text
    assert 'tgi_batch_next_size_bucket{le="1"} 1\ntgi_batch_next_size_bucket{le="2"} 2\n' in text
    assert 'tgi_batch_filter_duration_sum{method="decode"} 0.002\n' in text
    for block in text.removesuffix("\n\n").split("\n\n"):
        assert re.match(r"# HELP (\w+) .+\n# TYPE \1 \w+\n\1", block)


async def test_families_appear_with_their_first_observation_in_strict_mode(strict_client: httpx.AsyncClient) -> None:
    assert (await scrape(strict_client)).keys() == {name for name, kind in OURS.items() if kind != "histogram"}


async def test_counters_start_at_zero_by_default(client: httpx.AsyncClient) -> None:
    families = await scrape(client)
    names = {name for name in families if name.startswith("tgi_")}
    assert names == COUNTERS | READINGS | {"tgi_batch_max_total_tokens"}
    for err in ("validation", "overloaded", "template", "generation", "incomplete", "dropped"):
        assert value_of(families, "tgi_request_failure", err=err) == 0
    for method in ("prefill", "decode"):
        assert value_of(families, "tgi_batch_inference_count", method=method) == 0
    assert value_of(families, "tgi_batch_concat", reason="chunking") == 0
    assert value_of(families, "tgi_batch_max_total_tokens") == LIMITS.max_batch_total_tokens


async def test_a_successful_request(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.pause_s = 0.005
    assert await ask(client, max_new_tokens=20) == 200
    families = await scrape(client)
    assert value_of(families, "tgi_request_count") == value_of(families, "tgi_request_success") == 1
    for name, value in (("generated_tokens", 5), ("input_length", 1), ("max_new_tokens", 20)):
        assert value_of(families, f"tgi_request_{name}_sum") == value
        assert value_of(families, f"tgi_request_{name}_count") == 1
    total, queue, inference, validation, per_token = (
        value_of(families, f"tgi_request_{name}_sum")
        for name in ("duration", "queue_duration", "inference_duration", "validation_duration")
        + ("mean_time_per_token_duration",)
    )
    assert queue == 0.001
    assert total == pytest.approx(validation + queue + inference)
    assert per_token == pytest.approx(inference / 5)
    assert value_of(families, "pytgi_time_to_first_token_duration_count") == 1
    assert value_of(families, "pytgi_inter_token_duration_count") == 4
    assert 0.02 < value_of(families, "pytgi_inter_token_duration_sum") < total


async def test_the_part_of_each_prompt_that_was_cached(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for num_cached in (0, 1):
        engine.script.events = [TokenEvent(request_id="", num_cached_tokens=num_cached), *one_by_one([5, 6])]
        engine.script.events[1].num_cached_tokens = num_cached
        prompt = {"inputs": "Hello Hello", "parameters": {"max_new_tokens": 20}}
        assert (await client.post("/generate", json=prompt)).status_code == 200
    families = await scrape(client)
    ratio = families["pytgi_request_prefix_hit_ratio"]
    assert value_of(families, "pytgi_request_prefix_hit_ratio_count") == 2
    assert [sample.value for sample in ratio.samples if sample.labels.get("le") in ("0.0", "0")] == [1]
    assert 0 < value_of(families, "pytgi_request_prefix_hit_ratio_sum") <= 0.5


async def test_a_request_with_two_sequences(client: httpx.AsyncClient) -> None:
    assert await ask(client, best_of=2, do_sample=True) == 200
    families = await scrape(client)
    assert value_of(families, "tgi_request_count") == 1
    assert value_of(families, "tgi_request_success") == 2
    assert value_of(families, "tgi_request_input_length_count") == 2
    assert value_of(families, "pytgi_time_to_first_token_duration_count") == 2


async def test_tokens_that_come_together_share_the_time_since_the_last_ones(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script.events = [
        TokenEvent(request_id="", token_ids=[5], logprobs=[0.0]),
        TokenEvent(request_id="", token_ids=[5] * 4, logprobs=[0.0] * 4),
        *one_by_one([5]),
    ]
    await ask(client)
    assert value_of(await scrape(client), "pytgi_inter_token_duration_count") == 5


async def test_failures_by_their_reason(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert await ask(client, max_new_tokens=0) == 422
    assert await ask(client, best_of=3) == 422
    engine.script.error = "boom"
    engine.script.events = one_by_one([5], reason=None)
    assert await ask(client) == 424
    engine.script.error = None
    assert await ask(client) == 500
    app.state.service.admission.num_free = 0
    assert await ask(client) == 429
    assert (await client.post("/generate_stream", json=PROMPT)).status_code == 429
    assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 429
    assert (await client.post("/vertex", json={"instances": [CHAT]})).status_code == 429
    assert (await client.post("/generate", json={"inputs": 5})).status_code == 422, "counts nothing"
    families = await scrape(client)
    reasons = {"validation": 2, "generation": 1, "incomplete": 1, "overloaded": 4, "template": 0, "dropped": 0}
    assert {err: value_of(families, "tgi_request_failure", err=err) for err in reasons} == reasons
    assert value_of(families, "tgi_request_count") == 8
    assert value_of(families, "tgi_request_success") == 0


async def test_a_failure_in_a_stream_counts_once(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.error = "boom"
    engine.script.events = one_by_one([5], reason=None)
    assert (await client.post("/generate_stream", json=PROMPT)).status_code == 200
    families = await scrape(client)
    assert value_of(families, "tgi_request_failure", err="generation") == 1
    assert value_of(families, "tgi_request_count") == 1


async def test_a_chat_that_cannot_become_a_prompt(client: httpx.AsyncClient) -> None:
    picture = {"type": "image_url", "image_url": {"url": "x"}}
    body = {"messages": [{"role": "user", "content": [picture]}]}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 400
    families = await scrape(client)
    assert value_of(families, "tgi_request_failure", err="validation") == value_of(families, "tgi_request_count") == 1


async def test_a_template_that_fails(engine: FakeEngine, tmp_path: Path, model_folder: Path) -> None:
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ raise_exception('no') }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    app = create_app(engine, make_config(), TextTokenizer.from_folder(str(tmp_path), 1))
    async with client_of(app) as client:
        body = {"messages": [{"role": "user", "content": "x"}]}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 400
        families = await scrape(client)
    assert value_of(families, "tgi_request_failure", err="template") == value_of(families, "tgi_request_count") == 1


async def test_a_client_that_left(base_url: str, engine: FakeEngine) -> None:
    engine.script.pause_s = 0.02
    engine.script.stall_after = 2
    async with httpx.AsyncClient(base_url=base_url) as client:
        async with client.stream("POST", "/generate_stream", json=PROMPT) as response:
            await anext(response.aiter_bytes())
        deadline = time.monotonic() + 5
        while value_of(families := await scrape(client), "tgi_request_failure", err="dropped") != 1:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
    assert value_of(families, "tgi_request_count") == 1
    assert value_of(families, "tgi_request_success") == 0


async def test_steps(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.stats = STATS
    engine.observe_output(STEPS, 0.002)
    families = await scrape(client)
    values = {
        ("tgi_batch_inference_count", "prefill"): 2,
        ("tgi_batch_inference_count", "decode"): 2,
        ("tgi_batch_inference_success", "prefill"): 2,
        ("tgi_batch_inference_success", "decode"): 1,
        ("tgi_batch_inference_failure", "decode"): 1,
        ("tgi_batch_inference_duration_sum", "prefill"): 0.5,
        ("tgi_batch_inference_duration_sum", "decode"): 0.0625,
        ("tgi_batch_forward_duration_sum", "prefill"): 0.25,
        ("tgi_batch_forward_duration_sum", "decode"): 0.03125,
        ("tgi_batch_decode_duration_sum", "decode"): 0.001,
        ("tgi_batch_filter_duration_sum", "decode"): 0.002,
        ("tgi_batch_concat_duration_sum", "decode"): 0.001,
    }
    assert {key: value_of(families, key[0], method=key[1]) for key in values} == values
    assert value_of(families, "tgi_batch_concat", reason="chunking") == 1
    assert value_of(families, "tgi_batch_next_size_sum") == 3
    assert value_of(families, "tgi_batch_next_size_count") == 2
    quantiles = {"0": 0, "0.5": 0, "0.9": 3, "0.95": 3, "0.99": 3, "0.999": 3, "1": 3}
    assert {q: value_of(families, "tgi_request_skipped_tokens", quantile=q) for q in quantiles} == quantiles
    assert value_of(families, "tgi_request_skipped_tokens_sum") == 4
    assert value_of(families, "tgi_request_skipped_tokens_count") == 7
    assert value_of(families, "tgi_queue_size") == value_of(families, "pytgi_requests_waiting") == 2
    assert value_of(families, "tgi_batch_current_size") == value_of(families, "pytgi_requests_running") == 3
    assert value_of(families, "tgi_batch_current_max_tokens") == 5 * 16
    assert value_of(families, "pytgi_prefix_hit_tokens") == 32


def test_a_bound_belongs_to_its_bucket() -> None:
    histogram = Histogram("h", "", [1, 2.5])
    for value in (1, 1.0000001, 2.5, 1e9, 1e-7):
        histogram.observe(value)
    assert list(histogram.samples()) == [
        'h_bucket{le="1"} 2',
        'h_bucket{le="2.5"} 4',
        'h_bucket{le="+Inf"} 5',
        "h_sum 1000000004.5000002",
        "h_count 5",
    ]
