"""A model of the Hugging Face Hub -> a local folder."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from engine.errors import StartError
from engine.model_files import read_model_config, safetensors_files

logger = logging.getLogger(__name__)

FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
"""Weights, configuration and tokenizer; never pickled weights or code."""


def download_model(model_id: str, revision: str | None, cache_dir: str | None) -> Path:
    """The snapshot's folder; the Hub is asked only if the cache does not have it whole. Raises StartError in words."""
    fetch = functools.partial(snapshot_download, model_id, revision=revision, cache_dir=cache_dir, allow_patterns=FILES)
    try:
        cached = _cached(fetch)
        return Path(fetch()) if cached is None else cached
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


def _cached(fetch: Callable[..., str]) -> Path | None:
    """The snapshot in the cache if it is there with all its weights; makes no network call."""
    try:
        folder = Path(fetch(local_files_only=True))
        read_model_config(folder)
        safetensors_files(folder)
    except (LocalEntryNotFoundError, StartError):
        return None
    logger.info("Files are already present on the host. Skipping download.")
    return folder
