"""No kernel compiles while an engine serves: everything that a random run launches was met before it began."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from llguidance import LLMatcher

from engine import warm_up
from engine.link.config import EngineConfig
from engine.link.messages import GenerationRequest, SamplingParams
from engine.start import start_engine
from tests.contract.harness import random_ids, run_requests
from tests.interpreted.launches import Descriptions, launches_made_by
from tests.tiny_model import write_tiny_qwen2

NUM_REQUESTS = 68
"""More than the largest count of rows with kernels of its own."""


def make_params(chance: random.Random) -> SamplingParams:
    kinds = [
        SamplingParams(),
        SamplingParams(num_top_tokens=chance.randint(1, 40)),
        SamplingParams(seed=1, temperature=0.5, top_k=chance.randint(1, 99), num_top_tokens=chance.randint(0, 5)),
        SamplingParams(seed=2, top_p=0.5, min_p=0.1, typical_p=0.5, is_logprob_filtered=True),
        SamplingParams(repetition_penalty=1.2, relative_frequency_penalty=0.5),
        SamplingParams(frequency_penalty=0.2, presence_penalty=0.3, num_top_tokens=2),
        SamplingParams(logit_bias={number: 1.5 for number in range(chance.randint(1, 300)) if number < 264}),
        SamplingParams(is_watermarked=True),
    ]
    return chance.choice(kinds)


def make_requests(chance: random.Random) -> list[GenerationRequest]:
    """Most have prompts of a few tokens, so that all of them decode together; some repeat themselves, for drafts."""
    grammar = LLMatcher.grammar_from_regex(r"[a-z]+")
    sizes = [chance.choice([1, 2, 3]) for _ in range(NUM_REQUESTS - 5)] + [20, 25, 17, 33, 66]
    return [
        GenerationRequest(
            request_id=f"r{number}",
            prompt_token_ids=random_ids(5, number) * (size // 5)
            if number % 9 == 0 and size > 9
            else random_ids(size, number),
            max_new_tokens=4 if number % 9 == 0 else 2,
            is_ignoring_eos=True,
            sampling=make_params(chance),
            has_prompt_logprobs=number % 7 == 0,
            grammar=grammar if number % 20 == 1 else None,
        )
        for number, size in enumerate(sizes)
    ]


def test_everything_is_compiled_before_it_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_qwen2(tmp_path, num_hidden_layers=1, hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    monkeypatch.setattr(warm_up, "MEASUREMENTS", 1)
    monkeypatch.setattr(warm_up, "MEASURED_ROWS", (1, 4))
    config = EngineConfig(
        model_path=str(tmp_path),
        device="interpreted",
        dtype="float32",
        max_batch_total_tokens=4096,
        max_total_tokens=128,
        max_batch_prefill_tokens=512,
        max_draft_tokens=3,
        graph_sizes=(2,),
    )
    before, serving = Descriptions(), Descriptions()
    with launches_made_by(before):
        core, _ = start_engine(config)
    with launches_made_by(serving):
        outcome = run_requests(core, make_requests(random.Random(5)))
    assert [event.error for event in outcome.last_events] == [None] * NUM_REQUESTS
    assert outcome.most_running > 65
    new = serving.met - before.met
    assert not new, json.dumps(
        [[launch.name, str(launch.signature), str(launch.constants), str(launch.aligned)] for launch in new]
    )
    assert {launch.name for launch in serving.met} == {launch.name for launch in before.met}
