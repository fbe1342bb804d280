"""No attack of the table stalls an honest stream, takes much memory or ends in an internal error; the short form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.attacks import ATTACKS, BODIES, HARD_GRAMMARS
from tests.e2e.canary import AttackTable, Measured, complaints_about, scripted_target

WORST = {"a deep schema as a string", "49,000 biases", "an integer of 5,000 digits", "native biases that collide"}
"""Bodies that once stalled a server for many seconds, or filled its log."""
ABUSE = [name for name in ATTACKS if name.startswith("abuse: ")]
OTHERS = [name for name in ATTACKS if not {name} & {*BODIES, *HARD_GRAMMARS, *ABUSE}]
SHORT = [*WORST, *list(BODIES)[::5], *list(HARD_GRAMMARS)[::4], *ABUSE[::6], *OTHERS]
"""Every fifth body, neighbours being of one kind, some grammars, little of the abuse, which test_abuse.py has, and all
else; `tests/slow` has every attack."""


@pytest.fixture(scope="module")
def table(small_demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttackTable]:
    with scripted_target(small_demo_model, tmp_path_factory.mktemp("canary")) as target:
        with AttackTable(target, seconds=0.3, alone_s=0.2) as table:
            yield table


@pytest.mark.parametrize("name", dict.fromkeys(SHORT))
def test_an_attack_stalls_nobody(table: AttackTable, name: str) -> None:
    outcome = table.outcome(name)
    assert not outcome.complaints, outcome.line()


def measured(beside_s: float, mean_s: float) -> Measured:
    return Measured(0.02, beside_s, mean_s, 10**8, {"200": 9}, num_lost=0, has_traceback=False, plain="")


@pytest.mark.parametrize(
    ("beside_s", "mean_s", "complaints"),
    [
        (1.0, 0.4, []),
        (1.2, 0.2, ["2.4 times a fair gap"]),
        (0.5, 0.5, ["2.5 times a fair mean"]),
    ],
)
def test_sequences_may_take_twice_their_fair_share_and_no_more(
    beside_s: float, mean_s: float, complaints: list[str]
) -> None:
    """A real engine's attacks share its steps: as many plain sequences say what is fair, and no row is exempt."""
    assert complaints_about(measured(beside_s, mean_s), fair=measured(0.5, 0.2)) == complaints


def test_without_a_share_the_gap_may_hardly_grow() -> None:
    assert complaints_about(measured(0.2, 0.02), fair=None) == []
    assert complaints_about(measured(0.3, 0.02), fair=None) == ["the canary waits 0.28 s longer"]
