"""The variables that TGI's users set, as huggingface_hub then finds them."""

from __future__ import annotations

import pytest

from engine.cli import prepare_environment


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
