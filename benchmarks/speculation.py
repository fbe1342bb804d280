"""What n-gram speculation gains: the same requests with drafts and without, on one loaded model, in turns.

    python benchmarks/speculation.py [--quantize eetq] [--lengths 2 4 8] [--pairs 9] [--workloads edit ...]

Every task of a workload is answered without speculation, with each draft length, and with TGI's rule (the first earlier
occurrence of the last token, always drafted), in a random order; again until there are `--pairs` of each. The gain is
the ratio of the times of all pairs, with a 95 % interval of 2,000 bootstrap samples of the pairs. All ways must give
the same answers, token by token. The bound is what the measured step times allow where each draft has just the length
that pays: a replay of the answers that knows what comes. The last line of stdout is JSON. Needs `make install`; takes
an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.offline import demo_model, num_cores, restart_with_environment  # noqa: E402
from engine.link.config import EngineConfig  # noqa: E402

KV_TOKENS = 32768
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
CHAT = SYSTEM + "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
CODE = (
    "a function that merges two sorted lists",
    "a class for a fixed-size ring buffer",
    "a function that parses an INI file into a dictionary",
    "a function that finds all primes below n with a sieve",
    "a binary search over a sorted list",
    "a least recently used cache",
    "a function that converts Roman numerals to integers",
    "a matrix multiplication without libraries",
    "a breadth-first search on an adjacency list",
    "a function that validates an e-mail address",
    "a small HTTP client with retries",
    "a priority queue on a heap",
    "a function that computes the edit distance of two words",
    "a command-line tool that counts words in files",
    "a context manager that measures time",
    "a decorator that caches results",
    "a quicksort",
    "a function that flattens nested lists",
    "a simple tokenizer for arithmetic expressions",
    "a bank account class with deposits and withdrawals",
)
OPEN = (
    "Tell me something about large language models.",
    "Plan a weekend in Lisbon.",
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper.",
    "What should I consider when buying a bicycle?",
    "Explain inflation to a child.",
)
EDITS = (
    ("engine/sampling/sampler.py", "Rename the function `uniform` to `uniform_numbers`"),
    ("engine/scheduling/scheduler.py", "Rename the variable `budget` to `num_left`"),
    ("engine/scheduling/block_manager.py", "Rename the class `BlockManager` to `BlockPool`"),
)
QUESTIONS = (
    "Quote the sentences that say where somebody lives, word by word.",
    "Quote the first three sentences word by word, then say in one sentence what they are about.",
    "Which persons are named? Quote the sentence in which each is named first.",
    "Quote everything that is said about money or rank, word by word.",
)


def edit_tasks() -> list[str]:
    """Return a file of 60 lines with one change."""
    tasks = []
    for path, change in EDITS:
        lines = "\n".join((REPOSITORY / path).read_text().splitlines()[:60])
        tasks.append(f"{change} in this file and return the whole file, nothing else:\n```python\n{lines}\n```")
    return tasks


def quote_tasks() -> list[str]:
    """Questions about a quoted document."""
    text = (REPOSITORY / "benchmarks" / "texts" / "persuasion.txt").read_text()
    paragraphs = [part for part in text.split("\n\n") if 300 < len(part) < 1500]
    documents = ["\n\n".join(paragraphs[start : start + 3]) for start in (2, 8, 14, 20)]
    return [f"{document}\n\n{question}" for document, question in zip(documents, QUESTIONS, strict=True)]


WORKLOADS: dict[str, tuple[Callable[[], list[str]], int, bool]] = {
    "edit": (edit_tasks, 600, False),
    "quote": (quote_tasks, 160, False),
    "code": (lambda: [f"Write {what} in Python." for what in CODE], 96, False),
    "chat": (lambda: list(OPEN), 96, False),
    "batch": (
        lambda: [*edit_tasks(), *quote_tasks(), *(f"Write {what} in Python." for what in CODE[:5]), *OPEN[:4]],
        64,
        True,
    ),
}
"""Tasks, the limit of an answer's tokens, and whether all run together."""


def propose_as_tgi(token_ids: Any, max_tokens: int) -> Any:
    """TGI's rule: what followed the first earlier occurrence of the last token; the beginning where there is none."""
    import numpy as np

    from engine.scheduling.proposal import Proposal

    found = np.flatnonzero(token_ids[:-1] == token_ids[-1])
    start = int(found[0]) + 1 if len(found) else 1
    tokens: list[int] = token_ids[start : start + max_tokens].tolist()
    return Proposal(tokens + tokens[-1:] * (max_tokens - len(tokens)), match_length=1)


class Engines:
    """Several ways to decode with one runner: each has a scheduler and counts of its own."""

    def __init__(self, config: EngineConfig, lengths: Sequence[int], *, has_tgi: bool) -> None:
        from engine.core import EngineCore
        from engine.scheduling.block_manager import BlockManager
        from engine.scheduling.ngram import propose_ngram
        from engine.scheduling.scheduler import Scheduler
        from engine.scheduling.speculate import Speculator
        from engine.scheduling.step_costs import StepCosts, UnusedCosts
        from engine.start import start_engine

        core: Any = start_engine(config)[0]
        block_size = core.runner.block_size
        free = StepCosts({1: 1.0, 2: 1.0})  # TGI drafts always

        def make(speculator: Speculator | None) -> EngineCore:
            blocks = BlockManager(KV_TOKENS // block_size, block_size, is_prefix_caching=False)
            scheduler = Scheduler(
                blocks,
                max_batch_tokens=4096,
                eos_token_ids=core.scheduler.eos_token_ids,
                drafter=speculator,
            )
            costs = self.costs if speculator is not None else UnusedCosts()
            return EngineCore(scheduler, core.runner, core.sampler, core.grammars, core.limit, costs)

        self.costs: StepCosts = core.costs
        self.speculators: dict[str, Speculator] = {}
        self.cores = {"0": make(None)}
        for length in lengths:
            self.speculators[str(length)] = Speculator(propose_ngram, self.costs, length)
            if has_tgi:
                self.speculators[f"tgi {length}"] = Speculator(propose_as_tgi, free, length)
        self.cores |= {name: make(speculator) for name, speculator in self.speculators.items()}

    def answer(self, name: str, prompts: list[list[int]], num_tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds of decoding, without those of steps for prompts, and the answers."""
        from engine.link.messages import GenerationRequest

        core = self.cores[name]
        answers: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            answers[str(index)] = []
            core.take(GenerationRequest(request_id=str(index), prompt_token_ids=prompt, max_new_tokens=num_tokens))
        seconds = 0.0
        while core.scheduler.has_work:
            is_prefill = not all(answers.values())
            started = time.perf_counter()
            for event in core.step():
                answers[event.request_id] += event.token_ids
            if not is_prefill:
                seconds += time.perf_counter() - started
        return seconds, list(answers.values())


def speedup(pairs: Sequence[tuple[float, float]]) -> float:
    """Time without drafts over time with them."""
    return sum(without for without, _ in pairs) / sum(drafted for _, drafted in pairs)


def interval(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """95 % bootstrap interval of the speed-up."""
    chance = random.Random(1)
    found = sorted(speedup(chance.choices(pairs, k=len(pairs))) for _ in range(2000))
    return found[50], found[1949]


def bound(costs: Any, prompt: list[int], answer: list[int], max_draft_tokens: int) -> tuple[float, float]:
    """Seconds of the steps of one answer without drafts, and with the best part of each proposal that comes true."""
    import numpy as np

    from engine.scheduling.ngram import propose_ngram

    tokens = np.array(prompt + answer, np.int32)
    seconds = [costs.seconds(rows) for rows in range(1, max_draft_tokens + 2)]
    num_steps = len(answer) - 1  # the first token comes from the prompt's step
    best = [0.0] * (num_steps + 1)
    for left in range(1, num_steps + 1):
        known = len(tokens) - left
        proposal = propose_ngram(tokens[:known], max_draft_tokens).token_ids
        num_true = 0
        while num_true < min(len(proposal), left - 1) and proposal[num_true] == tokens[known + num_true]:
            num_true += 1
        best[left] = min(seconds[length] + best[left - 1 - length] for length in range(num_true + 1))
    return num_steps * seconds[0], best[num_steps]


def measure(engines: Engines, workload: str, tokenizer: Any, num_pairs: int) -> dict[str, Any]:
    make_tasks, num_tokens, is_batch = WORKLOADS[workload]
    prompts = [tokenizer.encode(CHAT.format(task)).ids for task in make_tasks()]
    groups = [prompts] if is_batch else [[prompt] for prompt in prompts]
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in engines.speculators}
    bounds: dict[str, list[tuple[float, float]]] = {name: [] for name in engines.speculators if name.isdigit()}
    for round_index in range(-(-num_pairs // len(groups))):
        for group in groups:
            expected: Any = None
            seconds: dict[str, float] = {}
            for name in random.Random(round_index).sample(list(engines.cores), len(engines.cores)):
                seconds[name], answers = engines.answer(name, group, num_tokens)
                assert expected in (None, answers), f"speculation {name} changes an answer"
                expected = answers
            for name, measured in pairs.items():
                measured.append((seconds["0"], seconds[name]))
            for name, possible in bounds.items():
                if not is_batch:
                    possible.append(bound(engines.costs, group[0], expected[0], int(name)))
        so_far = ", ".join(f"{name} {speedup(measured):.2f}" for name, measured in pairs.items())
        print(f"{workload}, {(round_index + 1) * len(groups)} pairs: {so_far}", flush=True)
    result: dict[str, Any] = {}
    for name, measured in pairs.items():
        low, high = interval(measured)
        result[name] = {"pairs": len(measured), "speedup": round(speedup(measured), 3)}
        result[name] |= {"low": round(low, 3), "high": round(high, 3)}
        if bounds.get(name):
            result[name]["bound"] = round(speedup(bounds[name]), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder (default: the demo model)")
    parser.add_argument("--quantize", choices=["eetq", "int4"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--pairs", type=int, default=9, help="of each workload and draft length, at least")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--without-tgi", action="store_true", help="leave out TGI's rule, which takes most of the time")
    args = parser.parse_args()
    restart_with_environment()
    folder = args.model or demo_model()

    from tokenizers import Tokenizer

    from engine.link.logs import configure_logging

    configure_logging("info", "engine")
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    config = EngineConfig(
        model_path=folder,
        quantize=args.quantize,
        num_threads=num_cores(),
        max_batch_total_tokens=KV_TOKENS,
        max_draft_tokens=max(args.lengths),
    )
    engines = Engines(config, args.lengths, has_tgi=not args.without_tgi)
    result: dict[str, Any] = {"model": Path(folder).name, "quantize": args.quantize, "cores": num_cores()}
    for workload in args.workloads:
        result[workload] = measure(engines, workload, tokenizer, args.pairs)
    print("| work | draft | speed, 95 % interval | bound | TGI's rule |\n|---|---|---|---|---|")
    for workload in args.workloads:
        for length in map(str, args.lengths):
            ours, tgi = result[workload][length], result[workload].get(f"tgi {length}", {})
            span = f"{ours['speedup']} ({ours['low']} to {ours['high']})"
            print(f"| {workload} | {length} | {span} | {ours.get('bound', '')} | {tgi.get('speedup', '')} |")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
