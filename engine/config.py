"""The engine's configuration, read once and frozen. Standard library only: the launcher imports it."""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import json
import logging
import shutil
import tempfile
from pathlib import Path

from engine.errors import StartError

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
    """Key of `engine.rope.ROPE_TYPES`, in place of what config.json says."""
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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineLimits:
    """`EngineConfig`'s limits with every value settled."""

    max_input_tokens: int
    max_total_tokens: int
    max_batch_prefill_tokens: int
    max_batch_total_tokens: int


PEER_GONE_EXIT_CODE = 3
"""Exit code of a process that ended because the other end of its socket closed: it is not the cause."""
ENGINE_HUNG_EXIT_CODE = 4
"""Exit code of the HTTP process when the engine is there but silent: the engine is the cause."""
START_FAILED_EXIT_CODE = 5
"""Exit code of an engine that could not start; it has said why."""
RANK_LOST_EXIT_CODE = 6
"""Exit code of an engine rank that has lost another one, which is the cause; it has said which."""
DEFAULT_MAX_BATCH_PREFILL_TOKENS = 4096


def check_window(config: EngineConfig, *, max_position_embeddings: int, max_window: int) -> None:
    """Raises StartError when the user wants a longer window than the model has.

    `max_window` is more than `max_position_embeddings` where rope scaling stretches beyond it: only who asks gets it.
    """
    total = config.max_total_tokens
    if total is not None and total > max_window:
        reason = (
            f"the model's max_position_embeddings ({max_position_embeddings})"
            if max_window == max_position_embeddings
            else f"what rope scaling stretches the model's window to ({max_window})"
        )
        raise StartError(
            f"`max_total_tokens` ({total}) is more than {reason}: lower --max-total-tokens to {max_window}"
        )


def resolve_limits(
    config: EngineConfig, *, max_position_embeddings: int, max_window: int, kv_tokens: int
) -> EngineLimits:
    """Settle the limits (reference `tgi-cli.md` 3.1-3.3).

    `kv_tokens` is the KV capacity that was settled on. Raises StartError with TGI's sentences where they contradict.
    """
    check_window(config, max_position_embeddings=max_position_embeddings, max_window=max_window)
    total = config.max_total_tokens
    if total is None:
        total = min(kv_tokens, max_position_embeddings)
        logger.info("Maximum total tokens defaulted to %d", total)
    if total > kv_tokens:
        raise StartError(
            f"`max_total_tokens` must be <= `max_batch_total_tokens`. Given: {total} and {kv_tokens}: "
            f"lower --max-total-tokens to {kv_tokens} or raise --max-batch-total-tokens"
        )
    input_tokens = config.max_input_tokens
    if input_tokens is None:
        input_tokens = total - 1
        logger.info("Maximum input tokens defaulted to %d", input_tokens)
    if not 0 < input_tokens < total:
        raise StartError(
            f"`max_input_tokens`({input_tokens}) must be < `max_total_tokens`({total}): "
            f"lower --max-input-tokens or raise --max-total-tokens"
        )
    prefill = config.max_batch_prefill_tokens
    if prefill is None:
        prefill = min(DEFAULT_MAX_BATCH_PREFILL_TOKENS, max_position_embeddings, kv_tokens)
        logger.info("Default `max_batch_prefill_tokens` to %d", prefill)
    if prefill > kv_tokens:
        raise StartError(
            f"`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. Given: {prefill} and {kv_tokens}: "
            f"lower --max-batch-prefill-tokens to {kv_tokens}"
        )
    return EngineLimits(
        max_input_tokens=input_tokens,
        max_total_tokens=total,
        max_batch_prefill_tokens=prefill,
        max_batch_total_tokens=kv_tokens,
    )


def user_cache_dir(environ: dict[str, str]) -> Path:
    """`pytgi` under the user's cache folder; where that cannot be written, a new temporary folder and a warning.

    The temporary one is removed when this process ends. Raises StartError when none can be made.

    The temporary folder's name cannot be guessed: Numba's cache is pickled, whoever can write it can run code as us.
    """
    try:
        base = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pytgi"
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=base):
            return base
    except (OSError, RuntimeError) as error:
        logger.warning("No cache folder can be written (%s): compiled kernels are kept for this run only", error)
    try:
        folder = Path(tempfile.mkdtemp(prefix="pytgi-"))
    except OSError as error:
        raise StartError(
            f"No folder can be written for compiled kernels ({error}): set XDG_CACHE_HOME or TMPDIR to one that can"
        ) from error
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def engine_environment(num_threads: int, environ: dict[str, str]) -> dict[str, str]:
    """Variables an engine process must be started with: libraries read them when they are first imported.

    What the user has set wins. Numba's `omp` layer starts a parallel region in 5 us where `workqueue` takes 60 and
    dies of concurrent calls (design section 5); it needs libgomp, which `engine.start` checks. libgomp's threads spin a
    short while between two regions, then sleep: with its default of milliseconds, one busy neighbour on 2 cores makes
    decoding ten times slower (43 ms per token became 500), with this about twice. torch is told to ask for huge pages:
    weights are read up to 10 % faster through them than through 4 KB pages. Its store warns of hosts without a name.
    """
    defaults = {
        "NUMBA_CACHE_DIR": str(user_cache_dir(environ) / "numba" / _kernel_version()),
        "NUMBA_THREADING_LAYER": "omp",
        "NUMBA_NUM_THREADS": str(num_threads),
        "OMP_NUM_THREADS": str(num_threads),
        "GOMP_SPINCOUNT": "4000",
        "THP_MEM_ALLOC_ENABLE": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    return {name: value for name, value in defaults.items() if not environ.get(name)}


MAX_LEXER_STATES = 20_000
"""Of each grammar, in both processes; a state takes 1 or 2 kB, and llguidance's own default is 250,000."""

KERNEL_SOURCES = (
    *("quant/kernels/*.py", "engine/layers/cpu.py", "engine/attention/cpu.py", "engine/sampler_cpu.py"),
    *("engine/grammar_cpu.py", "engine/ngram.py", "parallel/atomics.py", "parallel/shared_memory.py"),
)


def _kernel_version() -> str:
    """A hash of all kernel sources: Numba's own cache looks only at the file of the kernel, not at what it inlines."""
    root = Path(__file__).parent.parent
    digest = hashlib.blake2b(digest_size=8)
    for pattern in KERNEL_SOURCES:
        for path in sorted(root.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()
