"""From a configuration to an engine that can serve: this module composes what the others make."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from engine.build import LoadedModel, Siblings, load_model
from engine.checkpoint.files import read_eos_token_ids
from engine.core import AdapterFiles, EngineCore
from engine.device import Device, detect_device
from engine.full_step import StepMeter, max_measured_running, plan_measured
from engine.graphs import DEFAULT_GRAPH_SIZES, MAX_GRAPH_ROWS, GraphLimits
from engine.kernel_cache import share_kernels
from engine.kernel_variants import compile_variants
from engine.limits import MemoryNeeds, MemoryPlan, ModelWindow, check_window, kv_allocation_refusal, plan_memory
from engine.link.config import EngineConfig
from engine.link.errors import StartError
from engine.link.messages import EngineReady
from engine.link.progress import Stage, StartProgress
from engine.link.registry import import_entry
from engine.numa import bind_shard
from engine.overlap import describe_overlap, make_core, why_not_overlap
from engine.ranks import Follower, Leader, Ranks, SharedAdapters
from engine.runner import ModelRunner
from engine.sampling.bans import Bans
from engine.sampling.batch_sampler import BatchSampler, LogitsProcessor
from engine.sampling.grammar import BYTES_PER_TOKEN, MASKS, Grammars
from engine.sampling.penalties import Penalties
from engine.sampling.sampler import SAMPLERS, Sample
from engine.scheduling.adapters import AdapterCache
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.ngram import propose_ngram
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.speculate import Speculator
from engine.scheduling.step_costs import StepCosts, UnusedCosts
from engine.scheduling.step_limit import StepLimit
from engine.summary import log_row_invariance, log_summary
from engine.warm_up import WARM_UP_TOKENS, measure_steps, warm_up, watch_compiler

logger = logging.getLogger(__name__)


def start_engine(
    config: EngineConfig, ranks: Ranks | None = None, progress: StartProgress | None = None
) -> tuple[EngineCore, EngineReady]:
    """Load the model and make everything ready for the first step; also return what the HTTP process must know.

    With `ranks` this is rank 0, and the others call `start_follower` at the same time. Raises StartError in words.
    """
    progress = progress or StartProgress()
    prepared = _prepare(config, ranks, progress)
    device, limits = prepared.device, prepared.plan.limits
    grammars = _make_grammars(prepared)
    with _written_caches(prepared):
        if not config.is_grammar_disabled:
            progress.begin(Stage.READING_VOCABULARY)
            grammars.prepare()  # it holds the GIL most of a second: nothing else could run but what needs none
    runner = prepared.runner if ranks is None else Leader(prepared.runner, ranks)
    step_limit = make_step_limit(config, device)
    sample: Sample = import_entry(SAMPLERS, device.sampler, "sampler")
    block_size = prepared.runner.block_size
    num_tokens = min(WARM_UP_TOKENS, limits.max_batch_prefill_tokens, limits.max_total_tokens)
    # A step of one token has no place for a draft.
    has_drafts = config.max_draft_tokens and num_tokens > 1
    with watch_compiler(progress):
        is_row_invariant = warm_up(runner, sample, step_limit, num_tokens, block_size=block_size, progress=progress)
        costs = measure_steps(runner, sample, num_tokens, block_size=block_size) if has_drafts else None
    if costs is not None:
        logger.info("Using speculation n-gram with %d input ids", config.max_draft_tokens)
    adapter_files: AdapterFiles | None = prepared.loaded.adapters
    if adapter_files is not None and ranks is not None:
        adapter_files = SharedAdapters(prepared.runner, ranks)
    core = _make_core(prepared, runner, sample, grammars, step_limit, costs, adapter_files)
    _compile_variants(prepared, core, progress)
    if ranks is not None:
        ranks.start_serving()
    log_summary(
        prepared.config,
        device,
        prepared.loaded,
        limits,
        places=[None if ranks is None else ranks.describe(), prepared.nodes],
        graphs=prepared.runner.describe_graphs(),
        overlap=describe_overlap(prepared.why_not_overlap) if device.is_asynchronous else None,
        steps=step_limit.describe(),
    )
    log_row_invariance(is_row_invariant)
    return core, EngineReady(**dataclasses.asdict(limits), vocab_size=prepared.loaded.model.vocab_size)


def make_step_limit(config: EngineConfig, device: Device) -> StepLimit:
    """The limit that the flag says, or the device's."""
    target_s = config.target_inter_token_latency_s
    if target_s is None:
        return StepLimit(device.step_limit_s, device.alone_step_limit_s, spares_streams=device.spares_streams)
    return StepLimit(target_s or None, device.alone_step_limit_s)


def start_follower(config: EngineConfig, ranks: Ranks) -> Follower:
    """The part of the start that every rank makes, for ranks other than 0. Raises StartError in words."""
    prepared = _prepare(config, ranks, StartProgress())
    with _written_caches(prepared):
        pass
    return Follower(prepared.runner, ranks)


@dataclasses.dataclass(frozen=True, slots=True)
class _Prepared:
    """A runner with weights and memory, and what was resolved on the way: the same on every rank."""

    config: EngineConfig
    device: Device
    loaded: LoadedModel
    runner: ModelRunner
    plan: MemoryPlan
    why_not_overlap: list[str]
    """Reasons why steps don't overlap."""
    nodes: str | None
    """A line about the nodes of the host's memory, if there are several."""


def _prepare(config: EngineConfig, ranks: Ranks | None, progress: StartProgress) -> _Prepared:
    share_kernels()
    local_rank, local_size = (0, 1) if ranks is None else (ranks.world.local_rank, ranks.world.local_size)
    device = detect_device(local_rank, config.device)
    nodes = None
    if device.memory is None and not (ranks is not None and ranks.world.has_thread_places):
        nodes = bind_shard(local_rank, local_size, config.num_threads)  # before there are threads and weights
    set_threads(config.num_threads)
    if device.memory is not None and config.memory_fraction < 1:
        device.memory.set_limit(config.memory_fraction)
    loaded = _load(config, device, ranks, progress)
    if config.is_prefix_caching and loaded.model.rotary.is_prompt_dependent:
        logger.info("Prefix caching is turned off: with dynamic rope scaling keys depend on the prompt's length")
        config = dataclasses.replace(config, is_prefix_caching=False)
    runner = ModelRunner(loaded.model, device, loaded.adapters)
    progress.begin(Stage.PLANNING)
    plan = _plan(config, device, loaded, runner, ranks)
    try:
        runner.allocate(plan.num_blocks, device.kv_dtype(loaded.dtype), num_positions=plan.limits.max_total_tokens)
    except torch.OutOfMemoryError as error:
        raise StartError(kv_allocation_refusal(plan.limits.max_batch_total_tokens)) from error
    _capture_graphs(config, runner, plan, ranks, progress)
    return _Prepared(config, device, loaded, runner, plan, why_not_overlap(config, device), nodes)


def _capture_graphs(
    config: EngineConfig, runner: ModelRunner, plan: MemoryPlan, ranks: Ranks | None, progress: StartProgress
) -> None:
    """Capture graphs where the device and the model let it; the log says why not if a flag asks for them."""
    limits = _graph_limits(config, plan.limits.max_total_tokens, plan.limits.max_batch_total_tokens)
    if ranks is None:
        runner.capture(limits, progress)
    else:
        ranks.capture(runner, limits, progress)
    if config.graph_sizes is not None and limits.buckets and (reasons := runner.why_no_graphs()):
        logger.warning("--cuda-graphs has no effect: %s", "; ".join(reasons))


def _graph_limits(config: EngineConfig, max_seq_len: int, num_kv_tokens: int) -> GraphLimits:
    sizes = DEFAULT_GRAPH_SIZES if config.graph_sizes is None else config.graph_sizes
    if max(sizes, default=0) > MAX_GRAPH_ROWS:
        raise StartError(f"--cuda-graphs {max(sizes)}: a graph has at most {MAX_GRAPH_ROWS} rows: name smaller sizes")
    return GraphLimits(
        sizes=sizes,
        max_seq_len=min(max_seq_len, num_kv_tokens),
        num_kv_tokens=num_kv_tokens,
        max_draft_tokens=config.max_draft_tokens,
    )


def _load(config: EngineConfig, device: Device, ranks: Ranks | None, progress: StartProgress) -> LoadedModel:
    if ranks is None:
        return load_model(config, device, progress=progress)
    ranks.connect(device, config)
    siblings = Siblings(ranks.state, ranks.world.local_size, ranks.wait_for_all)
    return load_model(config, device, siblings, progress)


def _plan(
    config: EngineConfig, device: Device, loaded: LoadedModel, runner: ModelRunner, ranks: Ranks | None
) -> MemoryPlan:
    """The plan for the rank that needs most and the one that has least."""
    model, kv_dtype = loaded.model, device.kv_dtype(loaded.dtype)
    window = ModelWindow(max_position_embeddings=model.max_position_embeddings, max_window=model.rotary.rope.max_window)
    per_step_token = model.activations_per_token * device.activation_dtype(loaded.dtype).itemsize
    needs = MemoryNeeds(
        weights=loaded.weight_bytes,
        per_block=runner.kv_bytes_per_block(kv_dtype),
        per_step_token=per_step_token,
        block_size=runner.block_size,
        programs=runner.program_bytes(per_step_token, config.max_batch_prefill_tokens) if device.memory is None else 0,
        grammars=BYTES_PER_TOKEN * model.vocab_size if device.memory is None and not config.is_grammar_disabled else 0,
    )
    num_positions = config.max_total_tokens or window.max_position_embeddings
    if device.memory is not None:
        # The plan is yet to be made: no cache is larger than what the weights leave.
        max_blocks = max(1, (loaded.free_bytes - needs.weights) // needs.per_block)
        max_kv_tokens = config.max_batch_total_tokens or max_blocks * needs.block_size
        graphs = runner.graph_bytes(_graph_limits(config, num_positions, max_kv_tokens), needs.per_step_token)
        needs = dataclasses.replace(needs, graphs=graphs)
    tightest = _alone if ranks is None else ranks.tightest
    needs, free_bytes = tightest(needs, loaded.free_bytes)
    plan = functools.partial(plan_memory, config, window, has_default_cap=device.is_memory_shared)
    if device.memory is None:
        return plan(needs, free_bytes=free_bytes)
    check_window(config, window)
    meter = StepMeter(
        runner,
        device,
        kv_dtype,
        import_entry(SAMPLERS, device.sampler, "sampler"),
        num_positions=num_positions,
        max_rows=max_measured_running(config) * (1 + config.max_draft_tokens),
    )

    def plan_for(num_tokens: int, step_bytes: int) -> MemoryPlan:
        measured, _ = tightest(dataclasses.replace(needs, measured_step=step_bytes), free_bytes)
        return plan(measured, free_bytes=free_bytes, default_prefill_tokens=num_tokens)

    max_tokens = window.max_position_embeddings
    return plan_measured(
        config, max_tokens, needs, free_bytes, measure=meter.measure, plan=plan_for, is_alone=ranks is None
    )


def _alone(needs: MemoryNeeds, free_bytes: int) -> tuple[MemoryNeeds, int]:
    """`Ranks.tightest` without other ranks."""
    return needs, free_bytes


@contextlib.contextmanager
def _written_caches(prepared: _Prepared) -> Iterator[None]:
    """Write all KV memory of the host by the end of the block: it must be there before the server is ready.

    Each thread makes one call, which does not need the GIL, and brings in what it writes: where the host has several
    nodes of memory, the cache is on all of them.
    """
    tensors = prepared.runner.cache_tensors if prepared.device.memory is None else []
    num_threads = prepared.config.num_threads
    with ThreadPoolExecutor(num_threads, "caches") as threads:
        parts = [tensors[index::num_threads] for index in range(num_threads)]
        writing = [threads.submit(torch._foreach_zero_, part) for part in parts if part]
        yield
    for part in writing:
        part.result()


def _make_grammars(prepared: _Prepared) -> Grammars:
    config, vocab_size = prepared.config, prepared.loaded.model.vocab_size
    folder = Path(config.model_path)
    named_ids = read_eos_token_ids(folder, prepared.loaded.config, is_strict=config.is_strict_tgi)
    eos_token_ids = [token_id for token_id in named_ids if 0 <= token_id < vocab_size]
    apply_masks = functools.partial(import_entry, MASKS, prepared.device.masks, "mask")
    return Grammars(folder / "tokenizer.json", vocab_size, eos_token_ids, config.num_threads, apply_masks)


def _make_core(
    prepared: _Prepared,
    runner: ModelRunner | Leader,
    sample: Sample,
    grammars: Grammars,
    step_limit: StepLimit,
    costs: StepCosts | None,
    adapter_files: AdapterFiles | None,
) -> EngineCore:
    config, device, plan = prepared.config, prepared.device, prepared.plan
    penalties = Penalties(config.watermark_gamma, config.watermark_delta, device.penalties)
    processors: list[LogitsProcessor] = [penalties, Bans(grammars.eos_token_ids, device.penalties), grammars]
    sampler = BatchSampler(sample, processors)
    scheduler = Scheduler(
        BlockManager(
            plan.num_blocks,
            prepared.runner.block_size,
            is_prefix_caching=config.is_prefix_caching,
            # A GPU computes a block's few tokens in less time than its copies in all layers take to launch.
            is_copying=not device.is_asynchronous,
        ),
        max_batch_tokens=plan.limits.max_batch_prefill_tokens,
        eos_token_ids=grammars.eos_token_ids,
        max_running=config.max_batch_size if device.memory is None else max_measured_running(config),
        drafter=None if costs is None else Speculator(propose_ngram, costs, config.max_draft_tokens),
        needs_tokens=sampler.needs_tokens,
        adapters=AdapterCache(config.max_loras if config.has_adapters else 0),
    )
    for name, _ in config.lora_adapters:
        scheduler.adapters.add(name)
    return make_core(
        device,
        scheduler,
        runner,
        sampler,
        grammars,
        step_limit,
        costs or UnusedCosts(),
        adapter_files,
        is_overlapped=not prepared.why_not_overlap,
    )


def _compile_variants(prepared: _Prepared, core: EngineCore, progress: StartProgress) -> None:
    """Compile the kernels that the warm-up has not met, where kernels are compiled at first use."""
    device, limits = prepared.device, prepared.plan.limits
    max_rows = min(limits.max_batch_prefill_tokens, limits.max_total_tokens)
    if row_counts := [rows for rows in device.row_variants if rows <= max_rows]:
        apply_masks = import_entry(MASKS, device.masks, "mask")
        block_size = prepared.runner.block_size
        compile_variants(core.runner, core.sampler, apply_masks, row_counts, block_size=block_size, progress=progress)


def set_threads(num_threads: int) -> None:
    """Give Numba's pool `num_threads` threads and torch's one.

    All heavy work on a CPU is in Numba's pool: a second busy pool on the same cores would only spin against it. Raises
    StartError where Numba lacks its OpenMP layer.
    """
    torch.set_num_threads(1)
    import numba

    try:
        numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
    except ValueError as error:
        raise StartError(
            f"Numba has no OpenMP threading layer ({error}): install libgomp (Debian: libgomp1)"
        ) from error
