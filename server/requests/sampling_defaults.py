"""Values of generation_config.json for what a request of OpenAI's routes leaves out.

They count as in vLLM and SGLang, which read the same keys. `do_sample` is none of them: a request is greedy if its
temperature is 0, by itself or by default.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from engine.link.model_files import read_json
from server.config import ServerConfig
from server.requests.rows import Dialect
from server.requests.sampling import ROWS, Parameters

logger = logging.getLogger("server.main")

FILE = "generation_config.json"
NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Keys that count, which are names of Parameters as well."""


def read_sampling_defaults(config: ServerConfig) -> dict[str, float]:
    """Name -> value of the defaults that apply, which the log tells; none with --strict-tgi. Raises StartError."""
    if config.is_strict_tgi or config.generation_config != "auto":
        return {}
    path = Path(config.model_path) / FILE
    stored = read_json(path)
    defaults: dict[str, float] = {}
    for name in NAMES:
        value = stored.get(name)
        if value is None:
            continue
        if (number := _read(name, value, config)) is None:
            logger.warning("%s of %s has no effect: no request could have %r", name, path, value)
        else:
            defaults[name] = number
    if defaults:
        shown = ", ".join(f"{name} {value:g}" for name, value in defaults.items())
        logger.info("Defaults of OpenAI's routes, from %s: %s (--generation-config none turns them off)", FILE, shown)
    return defaults


def _read(name: str, value: Any, config: ServerConfig) -> float | None:
    """The value as a request may have it; None: it may not."""
    row = ROWS[name]
    try:
        number: float = pydantic.TypeAdapter(row.type).validate_python(value)
    except pydantic.ValidationError:
        return None
    is_allowed = math.isfinite(number) and row.bounds_in(Dialect.CHAT).hold(number, config, Dialect.CHAT)
    return number if is_allowed else None


def filled(parameters: Parameters, defaults: Mapping[str, Any]) -> Parameters:
    """The parameters, with the defaults of those that the request leaves out."""
    missing = {name: value for name, value in defaults.items() if getattr(parameters, name) is None}
    return dataclasses.replace(parameters, **missing)
