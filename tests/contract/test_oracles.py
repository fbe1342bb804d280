"""Every row of a table that contract tests run over has its oracle, and every oracle its row."""

from __future__ import annotations

from engine.checkpoint.files import read_model_config, read_quantization_config
from engine.models import MODELS
from engine.quantize.methods import METHODS
from engine.quantize.stages import STAGES
from quant.config import FORMATS
from tests.contract.oracles import DEQUANTIZERS, FAMILIES, WRITTEN
from tests.contract.test_quantize_methods import CASES
from tests.contract.test_quantized_checkpoints import FOLDERS


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
