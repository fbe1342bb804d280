"""Speed of the engine without HTTP: one sequence decoding, a batch decoding, a prompt; alone or against transformers.

    python benchmarks/offline.py [--compare transformers] [--model FOLDER] [--rounds 5] [--tokens 64]

Needs `make install`. With --compare, rounds of both are interleaved on the same machine and medians are compared. The
last line of standard output is JSON. Without --model the demo model is used (built on first use).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.ranks import Ranks

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from engine.link.config import EngineConfig  # noqa: E402
from engine.link.environment import engine_environment  # noqa: E402

PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "Explain in detail how a compiler turns source code into machine code.<|im_end|>\n<|im_start|>assistant\n"
)


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def restart_in_venv(variables: Mapping[str, str] | None = None) -> None:
    """Start over once, in `.venv` and with `variables`, unless that is how it was started."""
    virtual = REPOSITORY / ".venv" / "bin" / "python"
    if variables or (virtual.exists() and Path(sys.prefix) != REPOSITORY / ".venv"):
        python = str(virtual) if virtual.exists() else sys.executable
        os.execve(python, [python, *sys.argv], {**os.environ, **(variables or {})})


def restart_with_environment() -> None:
    """Start over once, in `.venv` and with the variables that Numba and torch read on import."""
    restart_in_venv(engine_environment(num_cores(), dict(os.environ)))


def demo_model() -> str:
    command = [sys.executable, str(REPOSITORY / "scripts" / "demo_model.py")]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()[-1]


class Pytgi:
    """Our engine in this process; with `ranks` its rank 0."""

    def __init__(self, config: EngineConfig, ranks: Ranks | None = None) -> None:
        from engine.start import start_engine

        self._core, _ = start_engine(config, ranks)

    @property
    def model(self) -> Any:
        return self._core.runner._model  # type: ignore[attr-defined]

    def run(self, prompt_ids: list[int], num_sequences: int, num_tokens: int) -> list[float]:
        """Times at which each step ended, counted from the first step's start."""
        from engine.link.messages import FinishReason, GenerationRequest

        for index in range(num_sequences):
            request = GenerationRequest(request_id=str(index), prompt_token_ids=prompt_ids, max_new_tokens=num_tokens)
            self._core.take(request)
        started = time.perf_counter()
        ends = []
        while self._core.scheduler.has_work:
            for event in self._core.step():
                assert event.finish_reason is not FinishReason.EOS_TOKEN, "the prompt must not end early"
            ends.append(time.perf_counter() - started)
        return ends

    def generate(self, prompts: Sequence[list[int]], num_tokens: int, report: Callable[[int, int], None]) -> None:
        """Decode so many tokens after each of the prompts, past every end, and report each."""
        from engine.link.messages import GenerationRequest

        for index, prompt in enumerate(prompts):
            request = GenerationRequest(
                request_id=str(index), prompt_token_ids=prompt, max_new_tokens=num_tokens, is_ignoring_eos=True
            )
            self._core.take(request)
        while self._core.scheduler.has_work:
            for event in self._core.step():
                for token_id in event.token_ids:
                    report(int(event.request_id), token_id)

    def decode_rate(self, prompt_ids: list[int], num_tokens: int) -> float:
        ends = self.run(prompt_ids, 1, num_tokens)
        return (num_tokens - 1) / (ends[-1] - ends[-num_tokens])


class Transformers:
    """`transformers` generate in one dtype."""

    def __init__(self, folder: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self._model = loaded.eval()

    def decode_rate(self, prompt_ids: list[int], num_tokens: int) -> float:
        """Tokens per second after the first: the time of one token is taken off the time of all."""
        self._torch.set_num_threads(num_cores())
        first = self._timed(prompt_ids, 1)
        rate = (num_tokens - 1) / (self._timed(prompt_ids, num_tokens) - first)
        self._torch.set_num_threads(1)
        return rate

    def _timed(self, prompt_ids: list[int], num_tokens: int) -> float:
        ids = self._torch.tensor([prompt_ids])
        started = time.perf_counter()
        self._model.generate(
            ids,
            attention_mask=self._torch.ones_like(ids),
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            do_sample=False,
        )
        return time.perf_counter() - started


def interleaved(rates: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """One warm-up, then `rounds` rounds in which every side has a turn."""
    results: dict[str, list[float]] = {name: [] for name in rates}
    for round_index in range(rounds + 1):
        for name, rate in rates.items():
            value = rate()
            if round_index:
                results[name].append(value)
                print(f"round {round_index}: {name:24s} {value:7.2f} tokens/s", flush=True)
    return results


def large_array() -> Any:
    """A tensor of 1 GiB. Zeros would never be written, and read as one and the same page."""
    import torch

    return torch.ones(1 << 28)


def read_bandwidth(array: Any = None) -> float:
    """GB/s at which all cores together sum a `large_array`, new unless given: what decoding is measured against."""
    import torch

    torch.set_num_threads(num_cores())
    array = large_array() if array is None else array
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        array.sum()
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(1)
    return float(array.nbytes / min(seconds) / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", choices=["transformers"])
    parser.add_argument("--model", help="model folder (default: the demo model)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded per round")
    args = parser.parse_args()
    restart_with_environment()
    folder = args.model or demo_model()

    from tokenizers import Tokenizer

    prompt_ids = Tokenizer.from_file(str(Path(folder) / "tokenizer.json")).encode(PROMPT).ids
    from benchmarks.side_pytgi import weight_bytes  # which imports this module

    result: dict[str, Any] = {"model": Path(folder).name, "dtype": args.dtype, "cores": num_cores()}
    result["cpu"] = platform.processor() or platform.machine()
    result["read_bandwidth_gb_s"] = round(read_bandwidth(), 1)
    config = EngineConfig(model_path=folder, dtype=args.dtype, num_threads=num_cores(), is_prefix_caching=False)
    ours = Pytgi(config)
    rates: dict[str, Callable[[], float]] = {"pytgi": functools.partial(ours.decode_rate, prompt_ids, args.tokens)}
    if args.compare:
        for dtype in ("bfloat16", "float32"):
            rates[f"transformers {dtype}"] = functools.partial(
                Transformers(folder, dtype).decode_rate, prompt_ids, args.tokens
            )
    measured = interleaved(rates, args.rounds)
    medians = {name: statistics.median(values) for name, values in measured.items()}
    result["decode_tokens_per_s"] = {name: round(value, 2) for name, value in medians.items()}
    read_bytes = weight_bytes(ours.model)["read_bytes"]
    result["share_of_bandwidth_floor"] = round(medians["pytgi"] * read_bytes / 1e9 / result["read_bandwidth_gb_s"], 2)
    if args.compare:
        better = max(value for name, value in medians.items() if name != "pytgi")
        result["speedup"] = round(medians["pytgi"] / better, 2)
    else:
        result["prefill_512_tokens_per_s"] = round(512 / ours.run((prompt_ids * 16)[:512], 1, 1)[-1], 1)
        batch = ours.run(prompt_ids, 8, args.tokens)
        result["decode_8_tokens_per_s"] = round(8 * (args.tokens - 1) / (batch[-1] - batch[-args.tokens]), 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
