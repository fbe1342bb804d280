"""All launches that a model makes, compiled for this card at once: seconds, registers, spills, shared memory."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence

import torch

from benchmarks.gpu_proof.processes import in_processes, num_cores
from benchmarks.gpu_proof.report import Report
from benchmarks.gpu_proof.settings import Settings
from quant.kernels.launch import Launch
from scripts.kernels_aot import (
    CARDS,
    STEPS,
    Card,
    Resources,
    compile_launch,
    complaints_of,
    distinct_launches,
    label_of,
    record_launches,
)

TOY_CARD, TOY_LAUNCHES = "sm_90", 3


@dataclasses.dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler made of a launch."""

    label: str
    seconds: float
    resources: Resources | None
    error: str = ""


def run(settings: Settings, report: Report) -> None:
    card = CARDS[card_name(settings)]
    started = time.monotonic()
    launches = recorded(card.dtype, is_toy=settings.is_toy)
    recorded_s = time.monotonic() - started
    started = time.monotonic()
    compiled = compile_all([launch for launch, _ in launches], card)
    compiled_s = time.monotonic() - started
    spilling = 0
    for result, (_, is_decoding) in zip(compiled, launches, strict=True):
        complaints = [f"does not compile: {result.error}"]
        if result.resources is not None:
            complaints = complaints_of(result.resources, card, is_decoding=is_decoding)
            spilling += result.resources.spilled_bytes > 0
        report.check(result.label, complaints)
    registers = [result.resources.registers for result in compiled if result.resources]
    report.row(
        "Compiling the kernels of Qwen2-7B" if not settings.is_toy else "Compiling kernels",
        target=f"{card.target.backend} {card.target.arch}",
        kernels=len(compiled),
        processes=num_cores(),
        **{"recorded in s": recorded_s, "compiled in s": compiled_s},
        slowest=max(result.seconds for result in compiled),
        **{"registers": f"{min(registers, default=0)} to {max(registers, default=0)}", "with spills": spilling},
    )


def recorded(dtype: torch.dtype, *, is_toy: bool) -> list[tuple[Launch, bool]]:
    """Every distinct launch, and whether decode makes it."""
    if is_toy:
        launches = dict.fromkeys(record_launches("0.5B", "int8", dtype, STEPS["decode 1"]), True)
        return list(launches.items())[:TOY_LAUNCHES]
    return list(distinct_launches(("7B",), dtype).items())


def card_name(settings: Settings) -> str:
    """The architecture of the card that the part `card` has found, or the newest that is older."""
    path = settings.part_file("card")
    facts = json.loads(path.read_text())["facts"] if path.exists() else {}
    major, minor = facts.get("capability", (0, 0))
    if settings.is_interpreted:
        return TOY_CARD
    if not major and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
    names = [name for name in CARDS if name.startswith("sm_") and int(name[3:]) <= 10 * major + minor]
    return names[-1]


def compile_all(launches: Sequence[Launch], card: Card) -> list[Compiled]:
    """Compile on all cores; Triton keeps the results, so that a process that launches them need not compile."""
    return list(in_processes(lambda index: _compile(launches[index], card), len(launches), num_cores()))


def _compile(launch: Launch, card: Card) -> Compiled:
    label = label_of(launch)
    started = time.monotonic()
    try:
        resources = compile_launch(launch, card)
    except Exception as error:  # whatever the compiler says, the other kernels are still of interest
        return Compiled(label, time.monotonic() - started, None, str(error)[:300])
    return Compiled(label, time.monotonic() - started, resources)
