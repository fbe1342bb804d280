"""A model of the Hugging Face Hub -> a local folder."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from engine.errors import StartError

logger = logging.getLogger(__name__)

FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
"""Weights, configuration and tokenizer; never pickled weights or code."""


def download_model(model_id: str, revision: str | None, cache_dir: str | None) -> Path:
    """The snapshot's folder, fetched as far as it is not in the cache. Raises StartError in words."""
    try:
        return Path(snapshot_download(model_id, revision=revision, cache_dir=cache_dir, allow_patterns=FILES))
    except HFValidationError as error:
        raise StartError(
            f"{model_id!r} is neither a folder nor the id of a model on the Hub: check --model-id"
        ) from error
    except LocalEntryNotFoundError as error:
        raise StartError(
            f"{model_id} is not in the cache and the Hub can't be reached: give --model-id a local folder"
        ) from error
    except HfHubHTTPError as error:
        raise StartError(
            f"The Hub refused {model_id} at {revision or 'main'} ({error}): check the id and HF_TOKEN"
        ) from error
