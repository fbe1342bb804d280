"""The HTTP process's configuration, read once and frozen. Standard library only, as the launcher makes it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

TGI_CLIENT_BATCH_SIZE = 4
TGI_MODEL_NAME = "tgi"
"""TGI's word for the model as it is."""
NO_MODEL_NAME = "dummy"
"""What `huggingface_hub.InferenceClient` sends as `model` where its user names none."""
RESERVED_NAMES = (TGI_MODEL_NAME, NO_MODEL_NAME)
"""Names of the model as it is in every server; no adapter has them."""
READY_LINE = "Connected"
"""Scripts wait for it, as for TGI's."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """The configuration of the HTTP process. The launcher makes it and hands it over as JSON."""

    model_id: str
    """The user's word for the model; /info shows it."""
    served_model_names: tuple[str, ...] = ()
    """Names of the model on OpenAI's routes. Empty: `model_id` alone."""
    lora_adapters: tuple[str, ...] = ()
    """Names of the adapters that the engine has when it is ready."""
    is_lora_updating: bool = False
    """Whether there are the routes by which adapters come and go."""
    model_path: str
    """Local folder with tokenizer.json and tokenizer_config.json. Empty: the launcher will tell, it is on its way."""
    model_sha: str | None = None
    """Commit of the Hub snapshot, if there is one."""
    listen_fd: int
    """Bound socket."""
    is_listening_early: bool = False
    """Whether the server listens before the engine is ready, and answers then that it isn't."""
    engine_fd: int
    """Inherited end of the socket pair to the engine."""
    engine_silence_s: float = 20.0
    """An engine that is silent for longer counts as hung."""
    max_concurrent_requests: int = 128
    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_logit_bias: int = 1024
    """Tokens in the `logit_bias` of a request."""
    max_client_batch_size: int | None = None
    """Prompts in one call of /v1/completions. None: `max_prompts` says how many."""
    validation_workers: int = 2
    payload_limit: int = 2_000_000
    """Largest request body in bytes."""
    has_prompt_logprobs: bool = False
    """`--enable-prefill-logprobs`. Only --strict-tgi needs it: logprobs of a prompt cost little here."""
    is_grammar_disabled: bool = False
    tokenizer_config_path: str | None = None
    """Read in place of the folder's tokenizer_config.json."""
    generation_config: str = "auto"
    """`auto`: sampling defaults of generation_config.json apply on OpenAI's routes; anything else turns that off."""
    api_key: str | None = dataclasses.field(default=None, repr=False)
    cors_allow_origin: tuple[str, ...] = ()
    """Origins whose pages may call. Empty means any."""
    is_rendering_here: bool = False
    """Whether chat templates run in the HTTP process, for tests, whose templates end."""
    reasoning_parser: str = "auto"
    """How thoughts are told from answers; a key of `PARSERS` in `server.chat.thoughts`, or `auto`."""
    is_strict_tgi: bool = False
    """TGI's behaviour also where it breaks clients."""
    is_ui_disabled: bool = False
    ready_line: str = READY_LINE
    """What the log says once the server answers."""
    predict_route: str | None = None
    """A further path of /vertex."""
    health_route: str | None = None
    """A further path of /health."""
    graceful_termination_timeout_s: int = 90
    compute_type: str = "cpu"
    """Value of the x-compute-type header."""
    build_sha: str | None = None
    """Commit that the container image was built from; /info shows it."""
    docker_label: str | None = None
    """The container image's name for itself; /info shows it."""
    log_level: str = "info"
    is_json_output: bool = False
    otlp_endpoint: str | None = None
    """Collector of traces. None means that there are no traces."""
    otlp_service_name: str = "text-generation-inference.router"

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names of the model, the one first that answers have where a request names none."""
        return self.served_model_names or (self.model_id,)

    @property
    def accepted_names(self) -> tuple[str, ...]:
        """All names by which a request may mean the model as it is, also those that are listed nowhere."""
        folder_name = os.path.basename(self.model_id.rstrip("/"))
        return (*self.model_names, self.model_id, folder_name, *RESERVED_NAMES)

    @property
    def has_pages(self) -> bool:
        """Whether browsers get pages; TGI has none."""
        return not (self.is_ui_disabled or self.is_strict_tgi)

    @property
    def max_prompts(self) -> int:
        """Prompts in one call of /v1/completions; each takes a permit."""
        if self.max_client_batch_size is not None:
            return self.max_client_batch_size
        return TGI_CLIENT_BATCH_SIZE if self.is_strict_tgi else self.max_concurrent_requests

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ServerConfig:
        return cls(**_with_tuples(json.loads(text)))

    def completed(self, fields: Mapping[str, Any]) -> ServerConfig:
        """The configuration with fields that the launcher has told later."""
        return dataclasses.replace(self, **_with_tuples(fields))


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples. With a list the configuration could not be the key of a cache."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
