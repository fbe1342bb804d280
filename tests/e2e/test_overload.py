"""200 clients against 16 permits: refusals come at once, and what was admitted keeps its speed."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.canary import STEP_S, AttackTable, scripted_target

NUM_TOKENS = 50


def test_200_clients_against_16_permits(small_demo_model: Path, tmp_path: Path) -> None:
    with scripted_target(small_demo_model, tmp_path, max_concurrent_requests=16) as target:
        with AttackTable(target, seconds=5) as table:
            outcome = table.outcome("overload")
    print(outcome.line())
    assert not outcome.complaints
    assert outcome.counts["429"] > outcome.counts["200"] > 15
    assert outcome.counts["refusal_ms"] < 1_000
    assert outcome.counts["answer_ms"] < 2.5 * 1_000 * NUM_TOKENS * STEP_S
