"""The variables that TGI's users set, as huggingface_hub then finds them, and words that are misspelt."""

from __future__ import annotations

import pytest

from engine.cli import build_parser, prepare_environment


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"HF_TOKEN": "", "HF_ENDPOINT": "", "HF_HUB_OFFLINE": ""}, {}),
        ({"HF_API_TOKEN": "a"}, {"HF_TOKEN": "a"}),
        ({"HF_API_TOKEN": "a", "HF_TOKEN": ""}, {"HF_TOKEN": "a"}),
        ({"HF_API_TOKEN": "a", "HF_TOKEN": "b"}, {"HF_TOKEN": "b"}),
        ({"HUGGINGFACE_HUB_CACHE": "/flag", "HF_HUB_CACHE": "/library"}, {"HF_HUB_CACHE": "/flag"}),
        ({"HF_HUB_CACHE": "/library"}, {"HF_HUB_CACHE": "/library"}),
        ({"HF_HUB_ENABLE_HF_TRANSFER": "1"}, {}),
    ],
)
def test_variables(environ: dict[str, str], expected: dict[str, str]) -> None:
    prepare_environment(environ)
    library = ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_HUB_ENABLE_HF_TRANSFER")
    assert {name: value for name, value in environ.items() if name in library} == expected
    assert environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("downlod-weights m", "'downlod-weights' (choose from 'download-weights', 'quantize') (did you mean download-"),
        ("Quantise m out", "'Quantise' (choose from 'download-weights', 'quantize') (did you mean quantize?)"),
        ("serve m", "invalid choice: 'serve' (choose from 'download-weights', 'quantize')\n"),
        ("download-weights m --revison main", "unrecognized arguments: --revison main (did you mean --revision?)\n"),
        ("download-weights m --json_output", "unrecognized arguments: --json_output (did you mean --json-output?)\n"),
        ("quantize m out --group-size 8", "unrecognized arguments: --group-size 8 (did you mean --groupsize?)\n"),
        ("quantize m out --method gtpq", "(choose from 'gptq', 'awq', 'int8', 'int4') (did you mean gptq?)\n"),
        ("quantize m out --dataset=x y --nothing", "unrecognized arguments: y --nothing\n"),
    ],
)
def test_a_misspelt_word_names_the_nearest(line: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        build_parser({}).parse_args(line.split())
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err
