"""Penalties, biases and green lists in Triton: the values of the reference implementation, which no read waits for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.link.messages import GenerationRequest, SamplingParams
from engine.sampling import penalties_triton
from engine.sampling.bans import Bans
from engine.sampling.penalties import PENALTIES, AdjustLogits, Adjustments, GreenList, Penalties, Places
from engine.sampling.penalties_torch import adjust_logits as adjust_in_torch
from engine.sampling.penalties_triton import adjust_logits
from engine.sampling.sampler import RawRows
from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.sequence import Sequence

PLACES, PART = 8, 64
"""Small ones, so that few places and small vocabularies take several programs."""
NUM_ROWS = 5
NUMBERS = st.floats(-3.0, 3.0, width=32)
PLACE = Places(np.array([1]), np.array([3]), biases=np.array([2.0], np.float32))
EVERYTHING = SamplingParams(
    is_watermarked=True,
    repetition_penalty=1.1,
    relative_frequency_penalty=0.5,
    frequency_penalty=0.2,
    presence_penalty=0.3,
    logit_bias={5: 1.5, 2: -4.0},
)


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(penalties_triton, "PLACES", PLACES)
        patch.setattr(penalties_triton, "PART", PART)
        yield


@st.composite
def adjustments_of(draw: st.DrawFn, vocab_size: int) -> Adjustments:
    """Any rows and tokens, each place once; rows with a green list that begins before the places, or after them."""
    tokens = st.integers(0, vocab_size - 1)
    places = draw(
        st.lists(
            st.tuples(st.integers(0, NUM_ROWS - 1), tokens, st.floats(0.125, 3.0, width=32), NUMBERS, NUMBERS),
            unique_by=lambda place: place[:2],
            max_size=3 * PLACES,
        )
    )
    green_lists = [
        GreenList(row, np.array(draw(st.lists(tokens, unique=True)), np.int64))
        for row in sorted(draw(st.sets(st.integers(0, NUM_ROWS - 1), max_size=3)))
    ]
    rows, token_ids, *numbers = zip(*places, strict=True) if places else ((),) * 5
    penalties, subtracted, biases = (np.array(kind, np.float32) for kind in numbers)
    is_counting, is_biased = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    made = Places(
        np.array(rows, np.int64),
        np.array(token_ids, np.int64),
        penalties if is_counting else None,
        subtracted if is_counting else None,
        biases if is_biased else None,
    )
    return Adjustments(green_lists, draw(NUMBERS), made if places else None)


@given(data=st.data(), vocab_size=st.sampled_from([1, 31, 32, 33, 63, 64, 65, 300]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_values_are_the_references(data: st.DataObject, vocab_size: int, seed: int) -> None:
    """Infinities are ruled out by nobody yet, but a broken row must not spoil another one."""
    adjustments = data.draw(adjustments_of(vocab_size))
    logits = torch.randn(NUM_ROWS, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    logits[-1] = torch.nan
    logits[-2, 0] = -torch.inf
    expected = logits.clone()
    adjust_in_torch(expected, adjustments)
    adjust_logits(logits, adjustments)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def make_batch() -> ScheduledBatch:
    """A row with nothing, three rows of a draft with everything, a row with a bias alone."""
    batch = ScheduledBatch()
    for index, params in enumerate([SamplingParams(), EVERYTHING, SamplingParams(logit_bias={7: 3.0})]):
        request = GenerationRequest(
            request_id=str(index), prompt_token_ids=[1, 2, 3], max_new_tokens=1, sampling=params
        )
        batch.add(Sequence(request, arrival_time=0.0), 3, [7, 8] if params is EVERYTHING else [])
    return batch


def test_requests_with_every_parameter() -> None:
    results = []
    for backend in PENALTIES:
        logits = torch.randn(NUM_ROWS, 100, generator=torch.Generator().manual_seed(0))
        before, batch = logits.clone(), make_batch()
        Penalties(backend=backend).apply(Penalties.select(batch), logits)
        assert torch.equal(logits[0], before[0])
        assert (logits[4] != before[4]).nonzero().tolist() == [[7]]
        results.append(logits)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)


def test_bans() -> None:
    """A ban is a bias of -inf; a list of allowed tokens bans most of a row."""
    request = GenerationRequest(
        request_id="any",
        prompt_token_ids=[1],
        max_new_tokens=9,
        sampling=SamplingParams(min_tokens=2, allowed_token_ids=[*range(40, 60)]),
        stop_token_ids=[45],
        banned_sequences=[[50], [41, 42]],
    )
    results = []
    for backend in PENALTIES:
        batch = ScheduledBatch()
        batch.add(Sequence(request, arrival_time=0.0), 1, [41, 44])
        logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
        bans = Bans([40], backend)
        bans.apply(bans.select(batch), logits)
        results.append(logits)
    assert torch.equal(*results)
    kept = [logits.isfinite().sum().item() for logits in results[1]]
    assert kept == [20 - 3, 20 - 4, 20 - 1]


@pytest.mark.parametrize(("adjust", "device"), [(adjust_in_torch, "cpu"), (adjust_logits, "cuda:0")])
def test_nothing_is_read(adjust: AdjustLogits, device: str) -> None:
    """There are no numbers behind fake tensors: a read would be an error."""
    adjustments = Adjustments([GreenList(0, np.array([4]))], 2.0, PLACE)
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits = torch.empty(2, 100)
        assert RawRows.of(logits, range(2), [EVERYTHING] * 2) is not None
        adjust(logits.to(device), adjustments)


@pytest.mark.parametrize(
    ("adjustments", "launches"),
    [
        (Adjustments([], 2.0, PLACE), ["adjust_kernel"]),
        (Adjustments([GreenList(0, np.array([4]))], 2.0, PLACE), ["green_kernel", "adjust_kernel"]),
    ],
    ids=["places", "watermark"],
)
def test_launches_of_a_step(adjustments: Adjustments, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[str] = []
    monkeypatch.setattr(penalties_triton, "launch", lambda kernel, *_, **__: recorded.append(kernel.fn.__name__))
    adjust_logits(torch.zeros(2, 100), adjustments)
    assert recorded == launches
