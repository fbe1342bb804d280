"""The cost of adapters in a step: steps with them and without in turns, in one process.

    python benchmarks/adapters.py [FORM ...] [--rank 16] [--adapters 3] [--threads 1] [--rounds 40]

FORM is bfloat16 or a value of --quantize. Adapters of random numbers change every matrix of the demo model's layers.
With one thread the processor's time is counted, which other processes disturb less; with more it is the clock's. Shown
are medians and minima of the steps, the median of the ratios of neighbours, and the ratio of the minima.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from array import array
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.offline import demo_model, num_cores, restart_with_environment  # noqa: E402

FORMS = "bfloat16 eetq int4".split()
STEPS = {"1 sequence": (1, 1), "8 sequences": (8, 1), "a prompt of 256": (1, 256)}
"""Sequences, and tokens of each that the step computes."""
CONTEXT = 256


def write_adapter(folder: Path, base: Path, rank: int) -> Path:
    """An adapter of small random numbers."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    with safe_open(base / "model.safetensors", framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118, it is no dict
            if name.endswith("_proj.weight"):
                outputs, inputs = weights.get_slice(name).get_shape()
                module = f"base_model.model.{name.removesuffix('.weight')}"
                for part, size in {"A": (rank, inputs), "B": (outputs, rank)}.items():
                    tensors[f"{module}.lora_{part}.weight"] = torch.randn(size).div(1000).to(torch.bfloat16)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


class Steps:
    """An engine's model, and steps of it."""

    def __init__(self, form: str, base: str, adapters: list[Path], num_threads: int) -> None:
        from engine.link.config import EngineConfig
        from engine.start import start_engine

        config = EngineConfig(
            model_path=base,
            quantize=None if form == "bfloat16" else form,
            dtype="bfloat16",
            num_threads=num_threads,
            max_batch_total_tokens=8 * 2 * CONTEXT,
            is_grammar_disabled=True,
            lora_adapters=[(folder.name, str(folder)) for folder in adapters],
        )
        self._core = start_engine(config)[0]
        self._clock = time.thread_time if num_threads == 1 else time.perf_counter
        self._adapters = [self._core.scheduler.adapters.find(folder.name) for folder in adapters]

    def seconds(self, num_sequences: int, num_tokens: int, *, has_adapters: bool) -> float:
        """The time of one step; sequence i has adapter i."""
        from engine.link.messages import GenerationRequest
        from engine.scheduling.batch import ScheduledBatch
        from engine.scheduling.sequence import Sequence

        batch, num_blocks = ScheduledBatch(), 2 * CONTEXT // 16
        for index in range(num_sequences):
            prompt = [1 + token % 1000 for token in range(CONTEXT)]
            request = GenerationRequest(request_id="", prompt_token_ids=prompt, max_new_tokens=1)
            adapter = self._adapters[index % len(self._adapters)] if has_adapters else None
            sequence = Sequence(request, arrival_time=0.0, adapter=adapter)
            sequence.block_table = array("i", range(index * num_blocks, (index + 1) * num_blocks))
            sequence.num_computed_tokens = CONTEXT - num_tokens
            batch.add(sequence, num_tokens)
        started = self._clock()
        self._core.runner.execute(batch)
        return self._clock() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forms", metavar="FORM", nargs="*", default=FORMS, help=f"default: {' '.join(FORMS)}")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=3)
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    restart_with_environment()
    base = demo_model()
    with tempfile.TemporaryDirectory() as root:
        adapters = [write_adapter(Path(root, f"a{n}"), Path(base), args.rank) for n in range(args.adapters)]
        for form in args.forms:
            steps = Steps(form, base, adapters, args.threads)
            for name, (num_sequences, num_tokens) in STEPS.items():
                print(f"{form}, {name}: {compare(steps, num_sequences, num_tokens, args.rounds)}", flush=True)


def compare(steps: Steps, num_sequences: int, num_tokens: int, rounds: int) -> str:
    """The times of both kinds of step, in words."""
    pairs = []
    for index in range(rounds + 3):  # the first ones record programs
        kinds = [bool(index % 2), not index % 2]
        times = {kind: steps.seconds(num_sequences, num_tokens, has_adapters=kind) for kind in kinds}
        pairs.append((times[False], times[True]))
    without, beside = ([times[kind] * 1000 for times in pairs[3:]] for kind in (0, 1))
    ratio = statistics.median(a / b for a, b in zip(beside, without, strict=True))
    return (
        f"{statistics.median(without):.2f} ms (least {min(without):.2f}) without, "
        f"{statistics.median(beside):.2f} ({min(beside):.2f}) with: {ratio:.3f} times, {min(beside) / min(without):.3f}"
    )


if __name__ == "__main__":
    main()
