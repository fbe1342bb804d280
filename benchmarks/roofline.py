"""A decoding step's time by sequences and context, on a CPU, over its floor.

    python benchmarks/roofline.py [FORM ...] [--model FOLDER] [--rounds 7] [--write]

A FORM as in perplexity.py. One engine in this process decodes a token of each of 1 to 32 sequences whose contexts have
128 to 32k tokens: the model and the sampler, without the scheduler. Keys and values are random numbers in a pool of
1.6 GB (demo model) that all sequences share, so that no prompt needs to be computed first, and no cache holds them. The
floor is the longer of two times: the bytes of weights, keys and values over the bandwidth at which all cores sum an
array in the same minute, and the operations at the rate of a prompt of 512. Every round has each step once, and the
quickest counts: other processes only make one slower. Prints tables in Markdown; --write puts them and plots into
docs/performance.md. Takes about two minutes a form.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.documents import measured_on, print_and_write  # noqa: E402
from benchmarks.offline import demo_model, num_cores, read_bandwidth, restart_with_environment  # noqa: E402
from benchmarks.perplexity import engine_config  # noqa: E402
from benchmarks.profile_step import Work, matrix_work  # noqa: E402
from server.bench.charts import line_chart  # noqa: E402

DOCUMENT = REPOSITORY / "docs" / "performance.md"
BEGIN, END = "<!-- made by benchmarks/roofline.py -->", "<!-- until here -->"
FORMS = ["bfloat16", "eetq"]
SEQUENCES = [1, 2, 4, 8, 16, 32]
CONTEXTS = [128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32767]
PROMPT = 512
POOL_TOKENS = 1 << 17
WARM_UPS = 3
"""Steps that are not timed: the first one of a kind records its calls."""
PATTERN = 1 << 20
"""Random numbers of which keys and values are copies."""


@dataclasses.dataclass(slots=True)
class Cell:
    """One kind of step: its quickest time, and what it must do."""

    sequences: int
    context: int
    work: Work
    seconds: float = math.inf

    def floor(self, bandwidth: float, rate: float) -> tuple[float, str]:
        """Seconds, and what binds: bytes over GB/s, operations over GFLOP/s."""
        by_bytes, by_flops = self.work.num_bytes / bandwidth / 1e9, self.work.flops / rate / 1e9
        return max((by_bytes, "bytes"), (by_flops, "operations"))


class Steps:
    """An engine's model and sampler, and sequences that are there without having been computed."""

    def __init__(self, form: str, folder: str, pool_tokens: int = POOL_TOKENS) -> None:
        """`pool_tokens` of keys and values are kept, for all sequences."""
        import torch

        from engine.sampling.sampler_cpu import sample
        from engine.start import start_engine

        limits = {"max_batch_total_tokens": pool_tokens, "max_total_tokens": min(pool_tokens, CONTEXTS[-1] + 1)}
        self._core, _ = start_engine(engine_config(form, folder, **limits), None)
        runner: Any = self._core.runner
        self._runner = runner
        self._sample = sample
        self.model = runner._model
        self.programs = runner._programs
        pattern = torch.randn(PATTERN)
        self.cache_tensors = runner.cache_tensors
        self._pool_tokens = pool_tokens
        for tensor in self.cache_tensors:
            for part in tensor.view(-1).split(PATTERN):
                part.copy_(pattern[: len(part)])

    def make(self, num_sequences: int, context: int, num_tokens: int = 1) -> Callable[[], float]:
        """A step of the last `num_tokens` of each context: it returns the seconds that it took."""
        from engine.link.messages import GenerationRequest, SamplingParams
        from engine.scheduling.batch import ScheduledBatch
        from engine.scheduling.sequence import Sequence

        num_blocks, size = self._pool_tokens // self._runner.block_size, -(-context // self._runner.block_size)
        sequences = []
        for index in range(num_sequences):
            ids = [(index + place) % 1000 for place in range(context)]
            sequence = Sequence(GenerationRequest(request_id="", prompt_token_ids=ids, max_new_tokens=1), 0.0)
            first = index * num_blocks // num_sequences
            sequence.block_table = array("i", [(first + place) % num_blocks for place in range(size)])
            sequence.num_computed_tokens = context - num_tokens
            sequences.append(sequence)

        def run() -> float:
            batch = ScheduledBatch()
            for sequence in sequences:
                batch.add(sequence, num_tokens)
            started = time.perf_counter()
            self._sample(
                self._runner.execute(batch).logits, [SamplingParams()] * num_sequences, list(range(num_sequences))
            )
            return time.perf_counter() - started

        return run


def measure(form: str, folder: str, num_rounds: int) -> tuple[list[Cell], float, float]:
    """All cells, the bandwidth in GB/s, and the rate of a prompt in GFLOP/s."""
    steps = Steps(form, folder)
    prompt = matrix_work(steps.model, folder, rows=PROMPT, sequences=1, context=PROMPT)
    compute_prompt = steps.make(1, PROMPT, PROMPT)
    kinds = [(sequences, context) for sequences in SEQUENCES for context in CONTEXTS]
    cells, runs = [], []
    for sequences, context in kinds:
        parts = matrix_work(steps.model, folder, rows=sequences, sequences=sequences, context=context).values()
        work = Work(sum(part.num_bytes for part in parts), sum(part.flops for part in parts))
        cells.append(Cell(sequences, context, work))
        runs.append(steps.make(sequences, context))
    bandwidths, prompt_s = [], [compute_prompt()]
    for round_index in range(num_rounds):
        print(f"{form}: round {round_index + 1} of {num_rounds}", file=sys.stderr, flush=True)
        bandwidths.append(read_bandwidth())
        prompt_s.append(compute_prompt())
        for cell, run in zip(cells, runs, strict=True):
            for _ in range(WARM_UPS if round_index == 0 else 0):
                run()
            cell.seconds = min(cell.seconds, run())
    rate = sum(part.flops for part in prompt.values()) / min(prompt_s) / 1e9
    return cells, max(bandwidths), rate


def counted(num_sequences: int) -> str:
    return f"{num_sequences} sequence{'s'[: num_sequences > 1]}"


def table(cells: list[Cell], bandwidth: float, rate: float) -> list[str]:
    """A row for each context: the milliseconds for each number of sequences, and of which part of them is the floor."""
    lines = [
        f"| context | {' | '.join(counted(count) for count in SEQUENCES)} |",
        "|---" * (len(SEQUENCES) + 1) + "|",
    ]
    for context in CONTEXTS:
        columns = []
        for cell in (cell for cell in cells if cell.context == context):
            floor, bound = cell.floor(bandwidth, rate)
            columns.append(f"{1000 * cell.seconds:.1f}, {floor / cell.seconds:.2f}{'*' * (bound == 'operations')}")
        lines.append(f"| {context:,} | {' | '.join(columns)} |")
    return lines


def plots(form: str, cells: list[Cell], bandwidth: float, rate: float) -> dict[str, str]:
    """File name -> SVG: the step's time over its floor, and what each sequence adds to the time of the shortest."""
    over_floor: dict[str, list[tuple[float, float]]] = {}
    times: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        name = counted(cell.sequences)
        floor, _ = cell.floor(bandwidth, rate)
        over_floor.setdefault(name, []).append((math.log2(cell.context + 1) - 7, cell.seconds / floor))
        times.setdefault(name, []).append((cell.context / 1000, 1000 * cell.seconds))
    x_label = "doublings of a context of 128 tokens"
    return {
        f"roofline-{form}.svg": line_chart(f"{form}: time of a decoding step over its floor", over_floor, x_label),
        f"roofline-{form}-ms.svg": line_chart(f"{form}: milliseconds of a decoding step", times, "thousand tokens"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forms", metavar="FORM", nargs="*", default=FORMS, help=f"default: {' '.join(FORMS)}")
    parser.add_argument("--model", help="model folder (default: the demo model)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write tables and plots into docs/performance.md")
    args = parser.parse_args()
    restart_with_environment()
    folder = args.model or demo_model()
    sections = [measured_on(num_cores(), folder)]
    for form in args.forms:
        cells, bandwidth, rate = measure(form, folder, args.rounds)
        files = plots(form, cells, bandwidth, rate)
        sections += [
            "",
            f"### {form}; {bandwidth:.1f} GB/s, {rate:.0f} GFLOP/s",
            "",
            *table(cells, bandwidth, rate),
            "",
        ]
        for name, svg in files.items():
            sections.append(f"![{name.removesuffix('.svg')}]({name})")
            if args.write:
                (DOCUMENT.parent / name).write_text(svg)
    print_and_write(sections, DOCUMENT if args.write else None, BEGIN, END)


if __name__ == "__main__":
    main()
