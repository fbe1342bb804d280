"""Where a step's time goes on a CPU: schedule, inputs, every kernel, sampling, publishing, and all that is between.

    python benchmarks/profile_step.py [FORM ...] [--model FOLDER] [--sequences 1] [--context 128] [--prompt] [--write]

A FORM as in perplexity.py. Sequences of a context decode, as `EngineCore.serve` lets them; with --prompt it is their
prompts that are computed. Bytes and operations of a matrix come from its sizes (floors.py), and the floor is the
bandwidth at which all cores sum an array in the same minute. Other processes only make a part slower: shown is the
time that a tenth of the steps stay below, part by part, and the step is their sum; prompts may take several steps,
which count as one. Prints tables in Markdown; --write puts them into docs/performance.md. Needs `make install`, and a
processor whose cycles a program may read (x86-64).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.documents import measured_on, print_and_write  # noqa: E402
from benchmarks.floors import DENSE, ModelShape, attention_flops, matrix_flops, step_bytes  # noqa: E402
from benchmarks.offline import demo_model, num_cores, read_bandwidth, restart_with_environment  # noqa: E402
from benchmarks.perplexity import engine_config, text_ids  # noqa: E402

DOCUMENT = REPOSITORY / "docs" / "performance.md"
BEGIN, END = "<!-- made by benchmarks/profile_step.py -->", "<!-- until here -->"
FORMS = ["bfloat16", "eetq", "int4"]
KERNEL_MODULES = """
    quant.kernels.bfloat16_amx_cpu quant.kernels.bfloat16_cpu quant.kernels.dense_cpu quant.kernels.integer_cpu
    quant.kernels.packed_cpu engine.layers.cpu engine.attention.cpu engine.sampling.sampler_cpu
""".split()
MATRICES = {
    "QKV": "self_attn.qkv_proj",
    "O": "self_attn.o_proj",
    "gate and up": "mlp.gate_up_proj",
    "down": "mlp.down_proj",
}
"""Name in the table -> place in a layer, in the order of `ModelShape.layer_matrices`."""
HEAD = "head"
SKIPPED_STEPS = 4
"""Steps of a round that warm up."""


@dataclasses.dataclass(slots=True)
class Part:
    """The share of one part in the steps that were measured."""

    seconds: float = 0.0
    calls: int = 0


class Clock:
    """Times parts of a step, each without the parts within it."""

    def __init__(self) -> None:
        self.parts: dict[str, Part] = {}
        self.kernels: set[str] = set()
        self.label: str | None = None
        """What the kernels are called that run now; None: by their functions."""
        self._within = [0.0]
        self._splits: list[Callable[[], Iterator[tuple[str, float]]]] = []

    def call(self, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self._within.append(0.0)
        started = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            seconds = time.perf_counter() - started
            part = self.parts.setdefault(name, Part())
            part.seconds += seconds - self._within.pop()
            part.calls += 1
            self._within[-1] += seconds

    def add(self, seconds: float, split: Callable[[], Iterator[tuple[str, float]]]) -> None:
        """Count kernels that somebody else has timed, within the part that runs now; `split` waits for `take`."""
        self._within[-1] += seconds
        self._splits.append(split)

    def take(self) -> dict[str, Part]:
        """The parts since the last time."""
        for split in self._splits:
            for name, seconds in split():
                self.kernels.add(name)
                part = self.parts.setdefault(name, Part())
                part.seconds += seconds
                part.calls += 1
        self._splits.clear()
        parts, self.parts = self.parts, {}
        return parts


def kernel_name(name: str) -> str:
    """What a compiled function is called in the table."""
    return name.strip("_")


class TimedKernel:
    """Stands for a compiled function that Python calls."""

    def __init__(self, kernel: Any, clock: Clock) -> None:
        self._kernel, self._clock = kernel, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def __call__(self, *args: Any) -> Any:
        name = self._clock.label or kernel_name(self._kernel.__name__)
        self._clock.kernels.add(name)
        return self._clock.call(name, self._kernel, *args)


class TimedProgram:
    """Stands for `Program.run`: every call of a program is timed by the processor's count of cycles."""

    def __init__(self, clock: Clock) -> None:
        from quant.kernels.program_cpu import Program

        self._clock, self._run = clock, Program.run
        self._first: tuple[float, int] | None = None

    def __call__(self, program: Any, parameters: Any, num_rows: Any) -> None:
        import numpy as np

        stamps = np.empty(len(program.names) + 1, np.int64)
        self._run(program, parameters, num_rows, stamps)
        end = time.perf_counter(), int(stamps[-1])
        if self._first is None:  # there is nothing yet to tell the counter's frequency by
            self._first = end
            return
        cycle_s = (end[0] - self._first[0]) / (end[1] - self._first[1])
        self._clock.add(
            int(stamps[-1] - stamps[0]) * cycle_s,
            lambda: zip(self._labels(program.names), (np.diff(stamps) * cycle_s).tolist(), strict=True),
        )

    def _labels(self, names: list[str]) -> Iterator[str]:
        """A layer's matrices come in the order of `MATRICES`, then the head, unless the step has no logits."""
        matrices = itertools.cycle(MATRICES)
        products = [place for place, name in enumerate(names) if name.startswith("_product")]
        has_head = products[-1] > max(place for place, name in enumerate(names) if name == "attend")
        for place, name in enumerate(names):
            if has_head and place == products[-1]:
                yield HEAD
            else:
                yield next(matrices) if name.startswith("_product") else kernel_name(name)


class LabelledMatrix:
    """Stands for a matrix: says which one the kernels belong to that it calls."""

    def __init__(self, kernel: Any, label: str, clock: Clock) -> None:
        self._kernel, self._label, self._clock = kernel, label, clock

    def __call__(self, x: Any) -> Any:
        with self._labelled():
            return self._kernel(x)

    def gated(self, x: Any, reader: Any) -> Any:
        with self._labelled():
            return self._kernel.gated(x, reader._kernel if isinstance(reader, LabelledMatrix) else reader)

    @contextlib.contextmanager
    def _labelled(self) -> Iterator[None]:
        self._clock.label = self._label
        try:
            yield
        finally:
            self._clock.label = None


@contextlib.contextmanager
def timed_kernels(model: Any, clock: Clock) -> Iterator[None]:
    """Time every compiled function that Python or a program calls. All of them must have been compiled."""
    from numba.core.dispatcher import Dispatcher

    from quant.kernels.program_cpu import Program

    matrices = label_matrices(model, clock)
    owners = [*(sys.modules[name] for name in KERNEL_MODULES if name in sys.modules), *matrices]
    kept: list[tuple[Any, str, Any]] = [(Program, "run", Program.run)]
    timed_program = TimedProgram(clock)
    Program.run = lambda *args: timed_program(*args)  # type: ignore[method-assign]
    for owner in owners:
        for name, value in list(vars(owner).items()):
            if isinstance(value, Dispatcher):
                kept.append((owner, name, value))
                setattr(owner, name, TimedKernel(value, clock))
    yield
    for owner, name, value in kept:
        setattr(owner, name, value)


def label_matrices(model: Any, clock: Clock) -> list[Any]:
    """Let every matrix say its name; all of their kernels."""
    found = []
    for layer in model.layers:
        for label, place in MATRICES.items():
            block, matrix = place.split(".")
            linear = getattr(getattr(layer, block), matrix)
            kernels = linear._matrix_kernels
            found += kernels
            kernels[:] = [LabelledMatrix(kernel, label, clock) for kernel in kernels]
            if linear._gated_kernel is not None:
                linear._gated_kernel = kernels[0]
    head = model.lm_head
    if hasattr(head, "_head"):
        found.append(head._head)
        head._head = LabelledMatrix(head._head, HEAD, clock)
    else:
        found += head._matrix_kernels
        head._matrix_kernels[:] = [LabelledMatrix(kernel, HEAD, clock) for kernel in head._matrix_kernels]
    return found


def summed(steps: list[dict[str, Part]]) -> dict[str, Part]:
    """Several steps as one: a prompt may take more than one."""
    total: dict[str, Part] = {}
    for name, part in (item for step in steps for item in step.items()):
        whole = total.setdefault(name, Part())
        whole.seconds += part.seconds
        whole.calls += part.calls
    return total


class Engine:
    """An engine in this process whose steps are timed, and a reader of what it publishes."""

    def __init__(self, form: str, folder: str, num_tokens: int, num_steps: int) -> None:
        """`num_tokens` is what the KV cache must hold, and what a step may compute; a round has up to `num_steps`."""
        from engine.link.ipc import EngineEndpoint
        from engine.start import start_engine

        limits = {"max_batch_total_tokens": num_tokens, "max_batch_prefill_tokens": num_tokens}
        self.core, _ = start_engine(engine_config(form, folder, **limits), None)
        self.clock = Clock()
        self._num_steps = num_steps
        self._reader, engine_end = socket.socketpair()
        self._reader.setblocking(False)
        self._endpoint = EngineEndpoint(engine_end)
        self.model = self.core.runner._model  # type: ignore[attr-defined]
        for part, owner, name in [
            ("schedule", self.core.scheduler, "schedule"),
            ("inputs", self.core.runner, "inputs"),
            ("model outside kernels", self.core.runner, "run"),
            ("sampling outside kernels", self.core.sampler, "sample"),
            ("update", self.core.scheduler, "update"),
            ("publish", self._endpoint, "send"),
        ]:
            setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: self.clock.call(part, function, *args, **options)

    def round(self, prompts: list[list[int]], num_new: int, *, is_prompt: bool) -> list[dict[str, Part]]:
        """Let the prompts be continued.

        Returns the parts of each step in which all sequences decode, or of all steps that compute prompts together.
        """
        from engine.link.messages import GenerationRequest

        for index, prompt in enumerate(prompts):
            request = GenerationRequest(
                request_id=str(index), prompt_token_ids=prompt, max_new_tokens=num_new, is_ignoring_eos=True
            )
            self.core.take(request)
        steps = []
        while self.core.has_work:
            self.clock.take()
            self.clock.call("rest of the loop", self._step)
            report = self.core.report
            is_whole = is_prompt or report.num_sequences == len(prompts)
            is_measured = report.is_prefill == is_prompt and is_whole
            steps += [self.clock.take()] if is_measured else []
            with contextlib.suppress(BlockingIOError):
                while self._reader.recv(1 << 20):
                    pass
        return [summed(steps)] if is_prompt else steps[SKIPPED_STEPS:][: self._num_steps]

    def _step(self) -> None:
        """As `EngineCore.serve` does."""
        from engine.link.messages import StepOutput

        events = self.core.step()
        self._endpoint.send(StepOutput(events=events, stats=self.core.scheduler.stats(), reports=[self.core.report]))


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """The bytes that a part must move in a step, and its operations."""

    num_bytes: int = 0
    flops: int = 0


def matrix_work(model: Any, folder: str, *, rows: int, sequences: int, context: int) -> dict[str, Work]:
    """Name in the table -> its work in one step."""
    from benchmarks.side_pytgi import num_bytes

    shape = ModelShape.of(json.loads((Path(folder) / "config.json").read_text()))
    work = {}
    flops = matrix_flops(shape, queries=rows, num_rows=sequences)
    for (label, place), num_flops in zip(MATRICES.items(), flops, strict=True):
        block, matrix = place.split(".")
        stored = sum(num_bytes(getattr(getattr(layer, block), matrix)) for layer in model.layers)
        work[label] = Work(stored, num_flops)
    head = getattr(model.lm_head, "_head", model.lm_head)
    work[HEAD] = Work(num_bytes(head), 2 * sequences * shape.vocabulary * shape.hidden)
    kv = step_bytes(shape, DENSE, DENSE, context=context, batch=sequences).kv
    work["attend"] = Work(kv, sequences * attention_flops(shape, context=context, queries=rows // sequences))
    return work


def undisturbed(values: list[float]) -> float:
    """A tenth of the values is below this one."""
    return sorted(values)[len(values) // 10]


def table(steps: list[dict[str, Part]], kernels: set[str], work: dict[str, Work], bandwidth: float) -> list[str]:
    """A row for each part, the kernels first; GB/s and the share of the floor where a part moves weights or KV."""
    names = list(dict.fromkeys(name for step in steps for name in step))
    seconds = {name: undisturbed([step[name].seconds for step in steps if name in step]) for name in names}
    calls = {name: statistics.median(step[name].calls for step in steps if name in step) for name in names}
    total = sum(seconds.values())

    def row(name: str, value: float, num_calls: float | None, done: Work) -> str:
        cells = [name, "" if num_calls is None else f"{num_calls:.0f}", f"{1000 * value:.3f}"]
        cells.append(f"{100 * value / total:.1f} %")
        rate = done.num_bytes / value / 1e9
        moved = [f"{done.num_bytes / 1e6:.1f}", f"{rate:.1f}", f"{rate / bandwidth:.2f}"]
        cells += moved if done.num_bytes else [""] * 3
        cells.append(f"{done.flops / value / 1e9:.0f}" if done.flops else "")
        return f"| {' | '.join(cells)} |"

    lines = [
        "| part | calls | ms | of the step | MB | GB/s | of the floor | GFLOP/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(names, key=lambda name: (name not in kernels, -seconds[name])):
        lines.append(row(name, seconds[name], calls[name], work.get(name, Work())))
    inside = [name for name in names if name in kernels]
    lines.append(row("**outside kernels**", total - sum(seconds[name] for name in inside), None, Work()))
    everything = Work(sum(done.num_bytes for done in work.values()), sum(done.flops for done in work.values()))
    lines.append(row("**step**", total, sum(calls[name] for name in inside), everything))
    return lines


def profile(form: str, folder: str, args: argparse.Namespace) -> str:
    """The table of one form under its heading."""
    # Prompts come one after the other, so that the first sequences go on for a while before the last one begins.
    num_new = 1 if args.prompt else args.tokens + SKIPPED_STEPS + 2 * args.sequences
    ids = itertools.cycle(text_ids(folder))  # many sequences may be longer than the text
    prompts = [list(itertools.islice(ids, args.context)) for _ in range(args.sequences)]
    engine = Engine(form, folder, args.sequences * (args.context + num_new + 32), args.tokens)
    rows = args.sequences * (args.context if args.prompt else 1)
    context = args.context if args.prompt else args.context + num_new // 2
    work = matrix_work(engine.model, folder, rows=rows, sequences=args.sequences, context=context)
    engine.round(prompts, num_new, is_prompt=args.prompt)
    steps, bandwidths = [], []
    with timed_kernels(engine.model, engine.clock):
        for _ in range(args.rounds):
            bandwidths.append(read_bandwidth())
            steps += engine.round(prompts, num_new, is_prompt=args.prompt)
    if not steps:
        sys.exit(
            f"{form}: the first sequence ended before the last of {args.sequences} prompts was read: give more --tokens"
        )
    kind = f"a prompt of {args.context}" if args.prompt else f"decoding after {args.context} tokens"
    name = f"{form}, {args.sequences} sequence{'s'[: args.sequences != 1]}, {kind}; {max(bandwidths):.1f} GB/s"
    return "\n".join([f"### {name}", "", *table(steps, engine.clock.kernels, work, max(bandwidths))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forms", metavar="FORM", nargs="*", default=FORMS, help=f"default: {' '.join(FORMS)}")
    parser.add_argument("--model", help="model folder (default: the demo model)")
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--context", type=int, default=128, help="tokens of every prompt")
    parser.add_argument("--tokens", type=int, default=48, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", action="store_true", help="profile what computes the prompts instead of decoding")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/performance.md")
    args = parser.parse_args()
    restart_with_environment()
    folder = args.model or demo_model()
    if "num_experts" in json.loads((Path(folder) / "config.json").read_text()):
        parser.error(f"{folder} has experts, of which this knows nothing: benchmarks/experts.py measures them")
    sections = [measured_on(num_cores(), folder)]
    for form in args.forms:
        sections += ["", profile(form, folder, args)]
    print_and_write(sections, DOCUMENT if args.write else None, BEGIN, END)


if __name__ == "__main__":
    main()
