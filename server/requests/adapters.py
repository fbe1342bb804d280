"""The adapters that requests may name, and the bodies by which they come and go, as vLLM reads those."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from server.config import RESERVED_NAMES, ServerConfig
from server.errors import ModelNotFoundError, ValidationError, known_names
from server.requests.openai import OpenAIBody

MAX_SHOWN_CHARS = 200
"""Characters of an unknown name that its refusal tells again."""
MAX_PATH_CHARS = 4096
"""Linux takes no longer path."""


class LoadAdapterRequest(OpenAIBody):
    """Body of /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    """A folder of the server's host; of each host, if there are several."""
    load_inplace: bool = False
    """Whether it may take the place of an adapter of that name."""


class UnloadAdapterRequest(OpenAIBody):
    """Body of /v1/unload_lora_adapter."""

    lora_name: str


class AdapterNames:
    """The names of the adapters that the engine has."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._names = dict.fromkeys(config.lora_adapters)
        self.changing = asyncio.Lock()
        """Whoever changes the engine's adapters holds it from the look at the names to their change."""

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str) -> None:
        self._names[name] = None

    def remove(self, name: str) -> None:
        self._names.pop(name, None)

    def resolve(self, name: str | None, *, is_openai: bool) -> str | None:
        """The adapter that a request names; None: it asks for the model as it is.

        Raises ModelNotFoundError or ValidationError for a name that is neither's. Where there are no adapters, and
        under --strict-tgi, any other name means the model (`docs/compatibility.md`, row 26).
        """
        if not name or name in self._names:
            return name or None
        config = self._config
        has_adapters = config.is_lora_updating or bool(config.lora_adapters)
        if config.is_strict_tgi or not has_adapters or name in config.accepted_names:
            return None
        shown = name[:MAX_SHOWN_CHARS]
        if is_openai:
            raise ModelNotFoundError(shown, [*config.model_names, *self._names])
        raise ValidationError(
            f"`adapter_id` {shown} is no adapter of this server: {known_names(self._names)}",
            logged="no such adapter",
            param="adapter_id",
        )

    def check_new(self, body: LoadAdapterRequest) -> None:
        """Raise ValidationError for a name that is taken, and for what can't be a path."""
        name = body.lora_name
        if not name.strip() or len(name) > MAX_SHOWN_CHARS or name in (*self._config.model_names, *RESERVED_NAMES):
            raise ValidationError(
                f"`lora_name` must be a name of 1 to {MAX_SHOWN_CHARS} characters that is not the model's",
                param="lora_name",
            )
        if not 0 < len(body.lora_path) <= MAX_PATH_CHARS:
            raise ValidationError(f"`lora_path` must be a path of 1 to {MAX_PATH_CHARS} characters", param="lora_path")
        if name in self._names and not body.load_inplace:
            raise ValidationError(
                f"The LoRA adapter '{name}' has already been loaded: send `load_inplace`: true to have this one in its "
                "place",
                logged=f"the LoRA adapter {name!r} has already been loaded",
                param="lora_name",
            )
