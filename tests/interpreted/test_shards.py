"""Two shards with Triton's kernels, interpreted: greedy ids are those of one process in plain torch, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from engine.attention.base import AttentionShape
from engine.attention.triton import TritonAttention
from engine.graph_capture import Work
from engine.graphs import GraphLimits, capture_graphs
from engine.link.messages import SamplingParams
from engine.step_inputs import StepInputs
from tests.contract.harness import make_requests, make_runner, run_requests
from tests.interpreted.ranks import InterpretedRanks
from tests.interpreted.test_engine import (
    CHECKPOINTS,
    MAX_NEW_TOKENS,
    PLAIN,
    core_of,
    expected_ids,
    interpreted,
    make_prompts,
    make_quantized_runner,
)

PROMPTS = make_prompts(sizes=[1, 20])
"""The second one takes two steps."""
BLOCK_SIZE = 16
MAX_SEQ_LEN = 3000
LIMITS = GraphLimits(sizes=(1, 4, 16), max_seq_len=MAX_SEQ_LEN, num_kv_tokens=MAX_SEQ_LEN)
SHAPES_OF_RANKS = [AttentionShape(16, 1, 128), AttentionShape(4, 1, 128), AttentionShape(3, 1, 128)]
"""28 heads over 8 ranks are four or three to a key; sixteen are the most that a tile takes."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[InterpretedRanks]:
    with InterpretedRanks() as made:
        yield made


def test_a_dense_model_with_graphs(ranks: InterpretedRanks, tiny_model_dir: Path) -> None:
    """Both ranks take the steps without prompts for graphs. Rows of padding are part of the sums, and harm no id."""
    first, second = ranks.run(tiny_model_dir, make_requests(PROMPTS, max_new_tokens=MAX_NEW_TOKENS), has_graphs=True)
    assert first.token_ids == expected_ids(tiny_model_dir, PROMPTS)
    assert first.description == "2 shards on 1 host, collectives through gloo"
    assert first.has_overlap
    assert first.num_replays == second.num_replays >= MAX_NEW_TOKENS - 1


def test_a_rank_has_no_graphs_where_another_has_reasons(tiny_model_dir: Path) -> None:
    runner = make_runner(tiny_model_dir, device=interpreted())
    runner.refuse_graphs(["another rank has none"])
    runner.capture(GraphLimits(sizes=(1,), max_seq_len=64, num_kv_tokens=64))
    assert runner.describe_graphs() == "No graphs: another rank has none"


@pytest.mark.long
def test_quantized_while_loading(ranks: InterpretedRanks, tiny_model_dir: Path) -> None:
    """The scales of a matrix whose inputs are split are the whole matrix's: host tensors are gathered for them."""
    sampling = SamplingParams(repetition_penalty=1.3, logit_bias={7: 2.0})
    requests = make_requests(PROMPTS, max_new_tokens=MAX_NEW_TOKENS, sampling=sampling)
    outcome = ranks.run(tiny_model_dir, requests, quantize="eetq")[0]
    runner = make_quantized_runner(tiny_model_dir, PLAIN, "eetq", torch.float32)
    assert outcome.token_ids == run_requests(core_of(tiny_model_dir, runner), requests).token_ids


def test_gptq_with_act_order(ranks: InterpretedRanks) -> None:
    """No shard of the inputs has whole groups, so inputs and outputs are gathered; the ids are `transformers`' own."""
    folder = CHECKPOINTS / "auto-gptq-4bit-g32-act"
    stored = np.load(folder / "expected.npz")
    requests = make_requests([stored["prompt_0"].tolist()], max_new_tokens=2)
    assert ranks.run(folder, requests)[0].token_ids == [stored["ids_0"][:2].tolist()]


@st.composite
def steps(draw: st.DrawFn) -> StepInputs:
    """A step as it reaches every rank: decoding, drafts, prompts, of all lengths that the KV cache has place for."""
    counts = draw(st.lists(st.sampled_from([1, 1, 1, 2, 3, 5, 9]), min_size=1, max_size=10))
    starts = [sum(counts[:index]) for index in range(len(counts) + 1)]
    most = max(MAX_SEQ_LEN // len(counts), max(counts))
    seq_lens = [draw(st.integers(count, most) | st.just(most)) for count in counts]
    width = -(-max(seq_lens) // BLOCK_SIZE)
    rows = list(range(starts[-1]))
    inputs = StepInputs(
        input_ids=rows,
        query_start_loc=starts,
        seq_lens=seq_lens,
        block_table=bytes(4 * width * len(counts)),
        prompt_lens=[1] * len(counts),
        logits_indices=rows[draw(st.sampled_from([0, 0, 0, 1])) :],
        scored_indices=[],
        scored_token_ids=[],
    )
    return msgspec.msgpack.decode(msgspec.msgpack.encode(inputs), type=StepInputs)


class Untaped:
    """Captures nothing, but counts how often a graph would run."""

    def capture(self, work: Work) -> Work:
        return lambda: torch.empty(LIMITS.buckets[0], 1)


@given(inputs=steps())
@settings(max_examples=200, deadline=None)
def test_every_rank_takes_the_same_steps_for_graphs(inputs: StepInputs) -> None:
    """Whether a step finds place is told by its numbers alone, however many heads of the rank share a key."""
    chosen = []
    for shape in SHAPES_OF_RANKS:
        attention = TritonAttention(shape, BLOCK_SIZE)
        graphs = capture_graphs(Untaped(), lambda tensors: tensors.input_ids, attention, LIMITS, torch.device("cpu"))
        items = attention.work_items(inputs.query_start_loc, inputs.seq_lens, inputs.table_width)
        chosen.append(graphs.run(inputs, items) is not None)
    event(f"a graph: {chosen[0]}")
    assert len(set(chosen)) == 1
