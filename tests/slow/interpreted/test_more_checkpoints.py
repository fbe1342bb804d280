"""More models with Triton's kernels, interpreted: the cases of tests/interpreted that `make test` does without."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interpreted import test_engine as engine
from tests.interpreted import test_graphs as graphs
from tests.tiny_model import write_tiny_qwen2


@pytest.mark.parametrize("name", ["auto-gptq-8bit-g64-asym-act", "gptqmodel-v1-lm-head-4bit"])
def test_quantized_checkpoints(name: str) -> None:
    engine.check_checkpoint(name)


def test_a_quantized_checkpoint_with_graphs(used: list[int]) -> None:
    graphs.check_checkpoint("autoawq-g32-zeros", used)


def test_int4_while_loading(tiny_model_dir: Path) -> None:
    engine.check_quantized_while_loading("int4", tiny_model_dir)


def test_a_sliding_window_with_graphs(tmp_path: Path, used: list[int]) -> None:
    """The second layer sees 20 tokens."""
    window = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
    write_tiny_qwen2(tmp_path, **window)
    prompts = engine.make_prompts(sizes=[37, 18])
    outcome = engine.run(engine.core_of(tmp_path, graphs.make_graphed_runner(tmp_path)), prompts)
    assert outcome.token_ids == engine.expected_ids(tmp_path, prompts)
    assert used
