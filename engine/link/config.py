"""The engine's configuration, read once and frozen. Standard library only: the launcher imports it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Everything that one engine rank is told; the launcher makes it and hands it over as JSON."""

    model_path: str
    """Local folder with config.json and safetensors files."""
    adapter_path: str | None = None
    """Local folder of an adapter (LoRA) that is merged into the model; None: there is none."""
    lora_adapters: Sequence[Sequence[str]] = dataclasses.field(default_factory=list)
    """Name and local folder of each adapter that requests may name, as this host has it."""
    max_loras: int = 8
    """Adapters in memory at a time."""
    max_lora_rank: int | None = None
    """Largest rank of an adapter; None: that of the largest of `lora_adapters`, or 16 without any."""
    is_lora_updating: bool = False
    """Whether adapters may come and go while the engine serves."""
    device: str = "auto"
    """Key of `engine.device.DEVICES`; `auto`: the first that is there."""
    dtype: str = "auto"
    """`auto`, `float32`, `bfloat16` or `float16`."""
    quantize: str | None = None
    """Key of `quant.config.FORMATS` or `ON_LOAD`; None: the format that the checkpoint names."""
    quantize_head: str | None = None
    """`none` or a key of `quant.config.ON_LOAD`; None: int8 where the rest is quantised, unless dtype is float32."""
    rope_scaling: str | None = None
    """Key of `engine.layers.rope.ROPE_TYPES`, in place of config.json's; None: config.json's."""
    rope_factor: float | None = None
    """A factor alone means `linear`; `rope_scaling` without a factor has factor 1."""
    max_input_tokens: int | None = None
    """Longest prompt; None: one token less than `max_total_tokens`."""
    max_total_tokens: int | None = None
    """Longest sequence, prompt and output together; None: the model's window, or the KV capacity if that is less."""
    max_batch_prefill_tokens: int | None = None
    """Tokens that one step computes at most; None: `engine.limits` has the default."""
    max_batch_total_tokens: int | None = None
    """KV capacity in tokens; None: it follows from the free memory."""
    max_batch_size: int | None = None
    """Sequences that run at a time at most; None: as many as fit."""
    target_inter_token_latency_s: float | None = None
    """Longest step that is planned while several sequences are there; 0: any; None: what `Device` says."""
    graph_sizes: Sequence[int] | None = None
    """Rows of the steps that are captured as graphs, 0 stands for none; None: `engine.graphs` has the default."""
    is_overlap_disabled: bool = False
    """Whether a GPU's next step waits until the last one's tokens are taken in."""
    memory_fraction: float = 1.0
    """Part of the device's memory that may be used; where it is the host's, of what is free of it."""
    kv_memory_share: float | None = None
    """Part of the memory left beside the weights that the KV cache may take; None: `engine.limits` has the default."""
    is_prefix_caching: bool = True
    """Whether a prompt reuses the KV blocks of an earlier one that begins alike."""
    max_draft_tokens: int = 0
    """Longest draft of speculation; 0: there is no speculation."""
    watermark_gamma: float = 0.5
    """Part of the vocabulary on the watermark's green list."""
    watermark_delta: float = 2.0
    """Number that is added to the logits of the green list."""
    shard_timeout_s: float = 15.0
    """Longest time that another rank may be silent, or late in a step."""
    may_share_memory: bool = True
    """Whether ranks of one host's CPU may use shared memory; False: gloo, for comparison."""
    listen_fd: int | None = None
    """Rank 0's inherited socket that listens at the ranks' address; None: it makes one if there are other ranks."""
    shard_secret: str = dataclasses.field(default="", repr=False)
    """The ranks' proof to each other that they belong together; empty: they believe anybody who reaches their port."""
    is_strict_tgi: bool = False
    """Whether a text ends at TGI's end-of-sequence ids alone (`engine.checkpoint.files`)."""
    is_grammar_disabled: bool = False
    """Nobody may send a grammar, so that no vocabulary is read for any."""
    num_threads: int = 1
    """Threads of the CPU kernels, and of the masks of grammars."""
    socket_fd: int | None = None
    """Inherited end of the socket pair to the HTTP process; None on other ranks than 0."""
    log_level: str = "info"
    """A filter as `engine.link.logs.parse_log_filter` reads it."""
    is_json_output: bool = False
    """Whether log lines are JSON objects."""

    @property
    def has_adapters(self) -> bool:
        """Whether requests may ever name an adapter."""
        return bool(self.lora_adapters) or self.is_lora_updating

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> EngineConfig:
        return cls(**json.loads(text))


GRAMMAR_LIMITS: dict[str, Any] = {"max_lexer_states": 20_000, "step_max_items": 20_000}
"""llguidance's limits of one grammar, in both processes.

A state of the lexer takes 1 or 2 kB; llguidance's default is 250,000. Items of the parser for one mask or one forced
text; the default of 50,000 can take 30 ms.
"""
MAX_FORCED_CHARS = 8_192
"""Longest text that a grammar may force within one string or pattern, so that it comes without a choice.

llguidance makes and tokenizes the rest of it for every mask: 0.2 us a character, 1 us the first time.
"""
