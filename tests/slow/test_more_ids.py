"""More ids of the real demo model: the cases of `tests/e2e` that `make test` does without."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.e2e import test_reference_ids as reference_ids
from tests.e2e import test_rope_ids as rope_ids
from tests.e2e.conftest import demo_model
from tests.e2e.launched import launched
from tests.e2e.test_demo_shards import answers, ids
from tests.e2e.test_reference_ids import tokenizer

__all__ = ["demo_model", "tokenizer"]


def test_small_steps_give_the_ids_of_transformers(demo_model: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with launched(demo_model, tmp_path, "--dtype", "float32", "--max-batch-prefill-tokens", "48") as server:
        reference_ids.check_ids(server, tokenizer)


@pytest.mark.parametrize("case", sorted(rope_ids.CASES.keys() - set(rope_ids.FEW)))
def test_other_positions_give_the_ids_of_transformers(
    case: str, demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rope_ids.check_case(case, demo_model, tmp_path, monkeypatch)


def test_two_shards_give_the_same_ids_in_float32(demo_model: Path, tmp_path: Path) -> None:
    one, two = (answers(demo_model, tmp_path, num_shards, "--dtype", "float32") for num_shards in (1, 2))
    assert ids(two) == ids(one)
    for of_one, of_two in zip(one, two, strict=True):
        assert [logprob for _, logprob in of_two] == pytest.approx([logprob for _, logprob in of_one], abs=1e-3)
