"""Every row of a table that contract tests run over has its oracle, and every oracle its row."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest

from engine.attention import ATTENTION_BACKENDS
from engine.checkpoint.files import read_model_config, read_quantization_config
from engine.layers import OPS
from engine.models import MODELS
from engine.quantize.methods import METHODS
from engine.quantize.stages import STAGES
from engine.sampling.grammar import MASKS
from engine.sampling.sampler import SAMPLERS
from quant.config import FORMATS
from quant.kernels import MATRICES
from tests.contract.oracles import DEQUANTIZERS, FAMILIES, INTERPRETED, WRITTEN
from tests.contract.test_quantize_methods import CASES
from tests.contract.test_quantized_checkpoints import FOLDERS

ROOT = Path(__file__).parents[2]


def test_every_family_has_its_model_in_transformers() -> None:
    assert FAMILIES.keys() == MODELS.keys()
    assert STAGES.keys() <= MODELS.keys()


def test_every_format_has_its_dequantization_and_checkpoints_of_real_tools() -> None:
    assert DEQUANTIZERS.keys() == FORMATS.keys()
    settings = [read_quantization_config(folder, read_model_config(folder)) or {} for folder in FOLDERS]
    # AutoGPTQ of old names no format.
    assert {each.get("quant_method", "gptq") for each in settings} == FORMATS.keys()


def test_every_method_writes_a_format_that_is_read_and_has_its_cases() -> None:
    assert WRITTEN.keys() == METHODS.keys()
    assert set(WRITTEN.values()) <= FORMATS.keys()
    assert {case.split("-")[0] for case in CASES} == METHODS.keys()


@pytest.mark.parametrize(
    ("table", "module"),
    [
        (ATTENTION_BACKENDS, "attention"),
        (OPS, "ops"),
        (MATRICES, "matrices"),
        (SAMPLERS, "sampler"),
        (MASKS, "sampler"),
    ],
    ids="attention ops matrices samplers masks".split(),
)
def test_a_backend_that_is_left_out_here_is_proven_in_the_interpreter(table: Collection[str], module: str) -> None:
    has_proof = (ROOT / "tests" / "interpreted" / f"test_{module}.py").exists()
    assert has_proof == (INTERPRETED in table)
