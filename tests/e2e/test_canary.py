"""No attack of the table stalls an honest stream, takes much memory or ends in an internal error; the short form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.attacks import ATTACKS, BODIES, HARD_GRAMMARS
from tests.e2e.canary import AttackTable, scripted_target

WORST = {"a deep schema as a string", "49,000 biases", "an integer of 5,000 digits", "native biases that collide"}
"""Bodies that once stalled a server for many seconds, or filled its log."""
OTHERS = [name for name in ATTACKS if name not in BODIES and name not in HARD_GRAMMARS]
SHORT = [*WORST, *list(BODIES)[::2], *list(HARD_GRAMMARS)[::4], *OTHERS]
"""Every second body, neighbours being of one kind, some grammars, and all else; `tests/slow` has every attack."""


@pytest.fixture(scope="module")
def table(small_demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttackTable]:
    with scripted_target(small_demo_model, tmp_path_factory.mktemp("canary")) as target:
        with AttackTable(target, seconds=0.3, alone_s=0.2) as table:
            yield table


@pytest.mark.parametrize("name", dict.fromkeys(SHORT))
def test_an_attack_stalls_nobody(table: AttackTable, name: str) -> None:
    outcome = table.outcome(name)
    assert not outcome.complaints, outcome.line()
