"""Engines on tiny models, put together from their parts, and `transformers` as the oracle."""

from __future__ import annotations

import dataclasses
import functools
import threading
from array import array
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.attention.cpu import BLOCK_SIZE
from engine.build import build_model, choose_quantization
from engine.checkpoint.files import read_model_config
from engine.core import EngineCore
from engine.device import Device, find_cpu
from engine.link.messages import GenerationRequest, SamplingParams, TokenEvent
from engine.runner import ModelRunner
from engine.sampling.grammar import ApplyMasks, Grammars
from engine.sampling.grammar_cpu import apply_masks
from engine.sampling.sampler import LaunchSample, Sample
from engine.sampling.sampler_cpu import sample
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from engine.scheduling.speculate import Speculator
from tests.contract.oracles import FAMILIES
from tests.tiny_model import EOS_TOKEN_IDS, VOCAB_SIZE
from tests.unit.engine.builders import make_batch
from tests.unit.engine.core_builders import assemble_core, needs_tokens

KERNELS = dataclasses.replace(find_cpu(0), step_limit_s=None, alone_step_limit_s=None)
REFERENCES = dataclasses.replace(KERNELS, attention="torch", ops="torch")


def make_runner(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: Device = KERNELS,
    num_blocks: int = 64,
    quantize: str | None = None,
) -> ModelRunner:
    config = read_model_config(folder)
    quantization = choose_quantization(config, folder, dtype, device, quantize, None)
    runner = ModelRunner(build_model(config, folder, dtype, device, quantization), device)
    runner.allocate(num_blocks, device.kv_dtype(dtype), num_positions=num_blocks * BLOCK_SIZE)
    return runner


def make_core(
    folder: Path,
    *,
    num_blocks: int = 64,
    max_batch_tokens: int = 512,
    is_prefix_caching: bool = True,
    speculator: Speculator | None = None,
    runner: ModelRunner | None = None,
    sample: Sample = sample,
    apply_masks: ApplyMasks = apply_masks,
    launch_sample: LaunchSample | None = None,
) -> EngineCore:
    scheduler = Scheduler(
        BlockManager(num_blocks, BLOCK_SIZE, is_prefix_caching=is_prefix_caching, is_copying=True),
        max_batch_tokens=max_batch_tokens,
        eos_token_ids=EOS_TOKEN_IDS,
        drafter=speculator,
        needs_tokens=needs_tokens,
    )
    runner = runner or make_runner(folder, num_blocks=num_blocks)
    grammars = Grammars(folder / "tokenizer.json", VOCAB_SIZE, EOS_TOKEN_IDS, 1, lambda: apply_masks)
    return assemble_core(scheduler, runner, sample=sample, grammars=grammars, launch_sample=launch_sample)


def random_ids(size: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB_SIZE, (size,), generator=torch.Generator().manual_seed(seed)).tolist()


def make_sequence(token_ids: list[int], blocks: list[int]) -> Sequence:
    request = GenerationRequest(request_id="any", prompt_token_ids=token_ids, max_new_tokens=1)
    sequence = Sequence(request, arrival_time=0.0)
    sequence.block_table = array("i", blocks)
    return sequence


def run_step(runner: ModelRunner, sequences: list[Sequence], counts: list[int]) -> torch.Tensor:
    logits = runner.execute(make_batch(sequences, counts)).logits.clone()
    for sequence, count in zip(sequences, counts, strict=True):
        sequence.num_computed_tokens += count
    return logits


def all_logits(runner: ModelRunner, token_ids: list[int], num_prompt_tokens: int, cuts: list[int]) -> torch.Tensor:
    """Logits from the prompt's last token on: the prompt in chunks, then token after token."""
    blocks = list(range(7, 7 + -(-len(token_ids) // BLOCK_SIZE)))[::-1]
    sequence = make_sequence(token_ids[:num_prompt_tokens], blocks)
    for cut in cuts:
        logits = run_step(runner, [sequence], [cut - sequence.num_computed_tokens])
        assert logits.shape == (0, VOCAB_SIZE), "a chunk within the prompt has no successor to sample"
    rows = [run_step(runner, [sequence], [num_prompt_tokens - sequence.num_computed_tokens])]
    for token_id in token_ids[num_prompt_tokens:]:
        sequence.token_ids.append(token_id)
        rows.append(run_step(runner, [sequence], [1]))
    return torch.cat(rows)


@dataclasses.dataclass
class Outcome:
    """The results of a run of some requests."""

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    last_events: list[TokenEvent]
    top_tokens: list[list[tuple[list[int], list[float]]]] = dataclasses.field(default_factory=list)
    """Ids and logprobs of the top tokens, by request and token."""
    num_preemptions: int = 0
    most_cached_tokens: int = 0
    most_running: int = 0


def make_requests(
    prompts: list[list[int]], *, max_new_tokens: int, sampling: SamplingParams | None = None
) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=f"r{number}",
            prompt_token_ids=prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling or SamplingParams(),
        )
        for number, prompt in enumerate(prompts)
    ]


def take(core: EngineCore, request: GenerationRequest) -> None:
    """Hand over a request, and wait for its grammar."""
    if request.grammar is None:
        core.take(request)
        return
    is_compiled = threading.Event()
    core.grammars.on_compiled = is_compiled.set
    core.take(request)
    assert is_compiled.wait(60)
    assert not core.take_compiled()


def run_requests(core: EngineCore, requests: list[GenerationRequest], *, is_staggered: bool = False) -> Outcome:
    """Run to the end. `is_staggered`: each request comes two steps after the one before."""
    arrivals = list(requests)
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    outcome = Outcome([], [], [])
    num_steps = 0
    while arrivals or core.has_work:
        while arrivals and (not is_staggered or num_steps % 2 == 0 or not core.scheduler.has_work):
            take(core, arrivals.pop(0))
            if is_staggered:
                break
        before = set(core.scheduler.running)
        for event in core.step():
            events[event.request_id].append(event)
        running = core.scheduler.running
        outcome.num_preemptions += len(before & set(core.scheduler.waiting))
        outcome.most_running = max(outcome.most_running, len(running))
        outcome.most_cached_tokens = max([outcome.most_cached_tokens, *(s.num_cached_tokens for s in running)])
        num_steps += 1
    for request in requests:
        of_request = events[request.request_id]
        outcome.token_ids.append([token_id for event in of_request for token_id in event.token_ids])
        outcome.logprobs.append([logprob for event in of_request for logprob in event.logprobs])
        outcome.top_tokens.append(
            [
                (token_ids, logprobs)
                for event in of_request
                for token_ids, logprobs in zip(event.top_token_ids, event.top_logprobs, strict=True)
            ]
        )
        outcome.last_events.append(of_request[-1])
    return outcome


@functools.cache
def load_oracle(folder: Path) -> Any:
    family = FAMILIES[read_model_config(folder)["model_type"]]
    oracle_class: Any = getattr(transformers, family.oracle)
    return oracle_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def oracle(folder: Path) -> Any:
    """`transformers`' own model in float32, forgetting the longest text it has seen: `dynamic` rope remembers that."""
    model = load_oracle(folder)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


@torch.inference_mode()
def oracle_logits(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """[len(token_ids), vocab_size]"""
    logits: torch.Tensor = oracle(folder)(torch.tensor([token_ids])).logits[0]
    return logits


@torch.inference_mode()
def oracle_steps(folder: Path, token_ids: list[int], num_prompt_tokens: int) -> torch.Tensor:
    """Logits from the prompt's last token on as `generate` makes them: the prompt at once, then token after token."""
    model = oracle(folder)
    out = model(torch.tensor([token_ids[:num_prompt_tokens]]), use_cache=True)
    rows = [out.logits[0, -1:]]
    for token_id in token_ids[num_prompt_tokens:]:
        out = model(torch.tensor([[token_id]]), past_key_values=out.past_key_values)
        rows.append(out.logits[0])
    return torch.cat(rows)


@torch.inference_mode()
def oracle_greedy(folder: Path, prompt: list[int], max_new_tokens: int) -> tuple[list[int], float]:
    """Greedy ids, and the smallest gap between the best two logits on the way."""
    generated = oracle(folder).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=EOS_TOKEN_IDS,
        pad_token_id=EOS_TOKEN_IDS[0],
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(generated.logits)[:, 0].topk(2, dim=-1).values
    return generated.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min())
