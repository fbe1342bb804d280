"""The long form of tests/e2e/test_canary.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.attacks import ATTACKS
from tests.e2e.canary import AttackTable, launched_target, scripted_target
from tests.e2e.conftest import build_demo_model

ALLOWED = set("200 400 404 405 408 411 413 415 422 424 429 431 none left".split())


@pytest.mark.timeout(1800)
def test_twenty_thousand_mutated_requests_stall_nobody(tmp_path: Path) -> None:
    num_requests = 0
    with scripted_target(build_demo_model("--small"), tmp_path) as target, AttackTable(target, seconds=10) as table:
        while num_requests < 20_000:
            outcome = table.outcome("mutated requests")
            print(outcome.line())
            assert not outcome.complaints, outcome.line()
            assert outcome.counts.keys() <= ALLOWED
            num_requests += sum(outcome.counts.values())


@pytest.mark.timeout(3600)
def test_no_attack_stalls_a_real_engine(tmp_path: Path) -> None:
    complaints = []
    with launched_target(build_demo_model("--small"), tmp_path) as target, AttackTable(target, seconds=3) as table:
        for name in ATTACKS:
            outcome = table.outcome(name)
            print(outcome.line())
            complaints += [outcome.line()] if outcome.complaints else []
    assert not complaints


@pytest.mark.timeout(600)
def test_200_clients_against_16_permits_of_a_real_engine(tmp_path: Path) -> None:
    """The canary is one of the admitted: it keeps its speed, as beside 15 plain sequences and no refusals."""
    flags = ("--max-concurrent-requests", "16")
    with launched_target(build_demo_model("--small"), tmp_path, *flags) as target:
        with AttackTable(target, seconds=10) as table:
            outcome = table.outcome("overload")
    print(outcome.line())
    assert not outcome.complaints
    assert outcome.counts["429"] > 200
    assert outcome.counts["refusal_ms"] < 1_000
