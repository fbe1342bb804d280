"""How many tokens a step may have, learnt from what steps cost."""

from __future__ import annotations

import pytest

from engine.scheduling.step_limit import MIN_CHUNK_TOKENS, MIN_TOKENS_LEARNT_FROM, StepLimit


def test_nothing_is_limited_before_anything_is_known() -> None:
    limit = StepLimit(1.0, 5.0)
    assert limit.max_tokens(is_only_sequence=False) is None


def test_a_request_that_is_alone_may_take_longer() -> None:
    limit = StepLimit(1.0, 5.0)
    limit.observe(100, 1.0)
    assert limit.max_tokens(is_only_sequence=False) == 100
    assert limit.max_tokens(is_only_sequence=True) == 500


def test_no_limit_on_devices_whose_steps_are_short() -> None:
    limit = StepLimit(None, None)
    limit.observe(100, 1000.0)
    assert limit.max_tokens(is_only_sequence=False) is None
    assert limit.max_tokens(is_only_sequence=True) is None


def test_small_steps_teach_nothing() -> None:
    limit = StepLimit(1.0, 5.0)
    limit.observe(MIN_TOKENS_LEARNT_FROM - 1, 10.0)
    assert limit.max_tokens(is_only_sequence=False) is None
    limit.observe(MIN_TOKENS_LEARNT_FROM, 0.16)
    assert limit.max_tokens(is_only_sequence=False) == 100


def test_a_chunk_is_never_tiny() -> None:
    limit = StepLimit(1.0, 5.0)
    limit.observe(100, 1e6)
    assert limit.max_tokens(is_only_sequence=False) == MIN_CHUNK_TOKENS


def test_the_estimate_follows_slowly() -> None:
    limit = StepLimit(1.0, None)
    limit.observe(100, 1.0)
    limit.observe(100, 2.0)
    assert limit.max_tokens(is_only_sequence=False) == int(1 / 0.013)
    for _ in range(50):
        limit.observe(100, 2.0)
    assert limit.max_tokens(is_only_sequence=False) == pytest.approx(50, abs=1)
