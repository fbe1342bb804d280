"""The long form of the disconnects in tests/e2e/test_soak.py, and one on a model whose steps take their time."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak.__main__ import served
from tests.e2e.conftest import build_demo_model
from tests.e2e.disconnects import NUM_PERMITS
from tests.e2e.test_soak import check_disconnects
from tests.tiny_model import write_tiny_qwen2


@pytest.mark.timeout(3600)
async def test_ten_thousand_clients_that_leave_at_any_point_leave_nothing_behind(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path / "model", max_position_embeddings=2048)
    with served(tmp_path / "model", tmp_path / "log", "--max-concurrent-requests", str(NUM_PERMITS)) as server:
        await check_disconnects(server, 10_000)


@pytest.mark.timeout(3600)
async def test_clients_that_leave_a_slow_engine_leave_nothing_behind(tmp_path: Path) -> None:
    with served(build_demo_model("--small"), tmp_path, "--max-concurrent-requests", str(NUM_PERMITS)) as server:
        await check_disconnects(server, 1_000)
