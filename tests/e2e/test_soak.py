"""`make soak` in seconds instead of hours, on a tiny model: the same clients, samples and checks."""

from __future__ import annotations

from pathlib import Path

from benchmarks.soak.__main__ import Settings, run_soak
from benchmarks.soak.judging import judge
from tests.tiny_model import write_tiny_qwen2

SECONDS = 6


def test_a_short_soak_passes(tmp_path: Path) -> None:
    """The window is one in which the description of a tool has place, a byte being a token."""
    model = tmp_path / "model"
    write_tiny_qwen2(model, max_position_embeddings=2048)
    lines: list[str] = []
    soak = run_soak(Settings(model, tmp_path / "soak", SECONDS, num_clients=16, num_restarts=1), lines.append)
    print(*lines, sep="\n")
    failed = [f"{check.name}: {'; '.join(check.complaints)}" for check in judge(soak) if not check.is_ok]
    assert not failed
    assert soak.tally.num_requests > 100
