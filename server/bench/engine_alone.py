"""An engine alone, in a process of its own: TGI's three tables of prefill and decode by batch size."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.link.environment import engine_environment
from server.bench.errors import BenchmarkError
from server.bench.machine import machine, now
from server.bench.options import BATCH_SIZES, sampling_of
from server.bench.progress import Progress
from server.bench.reports import Report, Table
from server.bench.statistics import PERCENTILES, percentile

SAMPLING_FIELDS = {
    "watermark": "is_watermarked",
    "frequency_penalty": "relative_frequency_penalty",
    "top_n_tokens": "num_top_tokens",
}
"""TGI's name of a parameter -> the engine's, where it is another."""
COLUMNS = ["Average", "Lowest", "Highest", *(f"p{percent}" for percent in PERCENTILES)]


@dataclass(frozen=True)
class Run:
    batch_size: int
    prefill_s: float
    decode_s: Sequence[float]
    """Seconds of each step."""


def measure_engine(args: argparse.Namespace) -> tuple[Report, bool]:
    """The report, and whether it is whole. Raises BenchmarkError if the engine can't start."""
    runs: list[Run] = []
    progress = Progress()
    is_whole = True
    try:
        for run in _runs(_task(args), progress):
            runs.append(run)
    except KeyboardInterrupt:
        is_whole = False
    progress.end()
    return report_of(args, runs), is_whole


def _task(args: argparse.Namespace) -> dict[str, Any]:
    given = sampling_of(args)
    is_sampling = given.pop("do_sample", False) or given.keys() & {"temperature", "top_k", "top_p", "typical_p"}
    sampling = {SAMPLING_FIELDS.get(name, name): value for name, value in given.items()}
    return {
        "model": args.tokenizer_name,
        "revision": args.revision,
        "batch_sizes": args.batch_size or BATCH_SIZES,
        "sequence_length": args.sequence_length.length,
        "decode_length": args.decode_length.length,
        "runs": args.runs,
        "warmups": args.warmups,
        "sampling": {**sampling, **({"seed": args.seed} if is_sampling else {})},
        "seed": args.seed,
        "num_threads": len(os.sched_getaffinity(0)),
    }


def _runs(task: Mapping[str, Any], progress: Progress) -> Iterator[Run]:
    environ = {**os.environ, **engine_environment(task["num_threads"], dict(os.environ))}
    command = [sys.executable, "-P", "-m", "engine.bench"]
    pipe = subprocess.PIPE
    progress.begin(f"loading {task['model']}", 1)
    with subprocess.Popen(command, env=environ, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            batch_size = 0
            for line in process.stdout:
                result = json.loads(line)
                if "error" in result:
                    raise BenchmarkError(result["error"])
                if result["batch_size"] != batch_size:
                    batch_size = result["batch_size"]
                    progress.begin(f"batch size {batch_size}", task["warmups"] + task["runs"])
                progress.advance()
                if not result.pop("is_warm_up"):
                    yield Run(**result)
            if process.wait() != 0:
                raise BenchmarkError(f"the engine ended with exit code {process.returncode}; its log is above")
        finally:
            process.kill()


def report_of(args: argparse.Namespace, runs: Sequence[Run]) -> Report:
    parameters = {
        "Model": args.tokenizer_name,
        "Sequence Length": args.sequence_length.length,
        "Decode Length": args.decode_length.length,
        "N Runs": args.runs,
        "Warmups": args.warmups,
        **sampling_of(args),
        "Seed": args.seed,
        "Date": now(),
        "Machine": machine(),
    }
    by_size = {size: [run for run in runs if run.batch_size == size] for size in {run.batch_size: 0 for run in runs}}
    latencies, throughputs = [], []
    for size, group in by_size.items():
        prefills = [run.prefill_s for run in group]
        totals = [sum(run.decode_s) for run in group]
        rows = {
            "Prefill": prefills,
            "Decode (token)": [s for run in group for s in run.decode_s],
            "Decode (total)": totals,
        }
        latencies += [(name, size, [1000 * value for value in values]) for name, values in rows.items() if values]
        throughputs.append(("Prefill", size, [size * args.sequence_length.length / value for value in prefills]))
        rates = [size * len(run.decode_s) / sum(run.decode_s) for run in group if run.decode_s]
        throughputs += [("Decode", size, rates)] if rates else []
    tables = [
        Table("Parameters", ["Parameter", "Value"], [[name, str(value)] for name, value in parameters.items()]),
        Table("Latency in ms", ["Step", "Batch Size", *COLUMNS], [_row(*each) for each in latencies]),
        Table(
            "Throughput in tokens/secs", ["Step", "Batch Size", *COLUMNS[:3]], [_row(*each)[:5] for each in throughputs]
        ),
    ]
    data = {"parameters": parameters, "runs": [vars(run) for run in runs]}
    return Report(data, tables)


def _row(step: str, batch_size: int, values: Sequence[float]) -> list[str]:
    ordered = sorted(values)
    numbers = [statistics.fmean(values), ordered[0], ordered[-1], *(percentile(ordered, p) for p in PERCENTILES)]
    return [step, str(batch_size), *(f"{number:.2f}" for number in numbers)]
