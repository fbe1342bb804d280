"""The engine's configuration, read once and frozen. Standard library only: the launcher imports it."""

from __future__ import annotations

import dataclasses
import json
import logging

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What one engine rank needs to know; made by the launcher, handed over as JSON."""

    model_path: str
    """Local folder with config.json and safetensors files."""
    dtype: str = "auto"
    """`auto`, `float32`, `bfloat16` or `float16`."""
    quantize: str | None = None
    """Key of `quant.config.FORMATS` or `ON_LOAD`; None: as the checkpoint says."""
    quantize_head: str | None = None
    """`none` or a key of `quant.config.ON_LOAD`; None: int8 where the rest is quantised, unless dtype is float32."""
    rope_scaling: str | None = None
    """Key of `engine.layers.rope.ROPE_TYPES`, in place of what config.json says."""
    rope_factor: float | None = None
    """Alone it means `linear`; `rope_scaling` without it has factor 1."""
    max_input_tokens: int | None = None
    max_total_tokens: int | None = None
    max_batch_prefill_tokens: int | None = None
    max_batch_total_tokens: int | None = None
    """KV capacity in tokens; None: from the free memory."""
    max_batch_size: int | None = None
    """Most sequences that run at a time."""
    memory_fraction: float = 1.0
    """Share of the device's free memory that may be used."""
    kv_memory_share: float = 0.8
    """Share of what is left once the weights are there that the KV cache may take."""
    is_prefix_caching: bool = True
    max_draft_tokens: int = 0
    """Longest draft of speculation; 0: none is made."""
    watermark_gamma: float = 0.5
    """Share of the vocabulary on the watermark's green list."""
    watermark_delta: float = 2.0
    """What the logits of that list get."""
    shard_timeout_s: float = 15.0
    """How long another rank may be silent, or late in a step."""
    may_share_memory: bool = True
    """Whether ranks of one host's CPU may use shared memory; False: gloo, for comparison."""
    listen_fd: int | None = None
    """Rank 0's inherited socket that listens where the ranks meet; None: it makes one if there are others."""
    num_threads: int = 1
    socket_fd: int | None = None
    """Inherited end of the socket pair to the HTTP process."""
    log_level: str = "info"
    is_json_output: bool = False

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> EngineConfig:
        return cls(**json.loads(text))


MAX_LEXER_STATES = 20_000
"""Of each grammar, in both processes; a state takes 1 or 2 kB, and llguidance's own default is 250,000."""
