"""Two shards with Triton's kernels, interpreted: greedy ids are those of one process on the CPU path, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.link.messages import SamplingParams
from tests.contract.harness import KERNELS, make_requests, run_requests
from tests.interpreted.ranks import InterpretedRanks
from tests.interpreted.test_engine import (
    CHECKPOINTS,
    MAX_NEW_TOKENS,
    core_of,
    expected_ids,
    make_prompts,
    make_quantized_runner,
)

PROMPTS = make_prompts(sizes=[1, 20])
"""The second one takes two steps."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[InterpretedRanks]:
    with InterpretedRanks() as made:
        yield made


def test_a_dense_model(ranks: InterpretedRanks, tiny_model_dir: Path) -> None:
    ids, shards = ranks.run(tiny_model_dir, make_requests(PROMPTS, max_new_tokens=MAX_NEW_TOKENS))
    assert ids == expected_ids(tiny_model_dir, PROMPTS)
    assert shards == "2 shards on 1 host, collectives through gloo"


def test_quantized_while_loading(ranks: InterpretedRanks, tiny_model_dir: Path) -> None:
    """The scales of a matrix whose inputs are split are the whole matrix's: host tensors are gathered for them."""
    sampling = SamplingParams(repetition_penalty=1.3, logit_bias={7: 2.0})
    requests = make_requests(PROMPTS, max_new_tokens=MAX_NEW_TOKENS, sampling=sampling)
    ids, _ = ranks.run(tiny_model_dir, requests, "eetq")
    runner = make_quantized_runner(tiny_model_dir, KERNELS, "eetq", torch.float32)
    assert ids == run_requests(core_of(tiny_model_dir, runner), requests).token_ids


def test_gptq_with_act_order(ranks: InterpretedRanks) -> None:
    """No shard of the inputs has whole groups, so inputs and outputs are gathered; the ids are `transformers`' own."""
    folder = CHECKPOINTS / "auto-gptq-4bit-g32-act"
    stored = np.load(folder / "expected.npz")
    ids, _ = ranks.run(folder, make_requests([stored["prompt_0"].tolist()], max_new_tokens=MAX_NEW_TOKENS))
    assert ids == [stored["ids_0"][:MAX_NEW_TOKENS].tolist()]
