"""The checkpoints that the real tools wrote are the stored ones, and dequantised they still give the stored logits."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from tests.oracles.dequantize import dequantize
from tests.oracles.quant_expected import dense_model
from tests.oracles.quant_stored import CHECKPOINTS, PROVENANCE

STORED = {name: entry["files"] for name, entry in json.loads(PROVENANCE.read_text()).items() if "files" in entry}


def test_stored_files_are_the_ones_in_the_list() -> None:
    listed = {(name, file): facts["sha256"] for name, files in STORED.items() for file, facts in files.items()}
    found = {
        (path.parent.name, path.name): hashlib.sha256(path.read_bytes()).hexdigest() for path in CHECKPOINTS.glob("*/*")
    }
    assert found == listed


def test_stored_files_stay_small() -> None:
    sizes = [facts["size"] for files in STORED.values() for facts in files.values()]
    assert max(sizes) < 1_000_000
    assert sum(sizes) < 12_500_000


@pytest.mark.parametrize("name", ["auto-gptq-3bit-g32-act", "gptqmodel-awq-g32"])
def test_dequantized_weights_give_the_stored_logits(name: str) -> None:
    model = dense_model(CHECKPOINTS / name, dequantize(CHECKPOINTS / name))
    expected = np.load(CHECKPOINTS / name / "expected.npz")
    for number in range(2):
        with torch.inference_mode():
            logits = model(torch.from_numpy(expected[f"prompt_{number}"]).long()[None]).logits[0, -1].numpy()
        np.testing.assert_allclose(logits, expected[f"logits_{number}"], rtol=0, atol=1e-4)
        assert logits.argmax() == expected[f"ids_{number}"][0]


@pytest.mark.parametrize("reading", ["field", "unmasked"])
def test_readings_of_a_zero_point_differ_only_where_zero_is_stored(reading: str) -> None:
    for name in ("auto-gptq-4bit-g32-zeros", "auto-gptq-4bit-g64-static"):
        arrays = np.load(CHECKPOINTS / name / "expected.npz")
        assert (f"ids_0_{reading}" in arrays) == name.endswith("zeros")
