"""The parts of a run and the seconds that each should take, from nominal speeds of an engine on two cores."""

from __future__ import annotations

import argparse

from benchmarks.peers.engines import NUM_TRIALS
from benchmarks.peers.progress import Part
from benchmarks.peers.results import Results
from benchmarks.peers.served import SERVED_WORKS
from benchmarks.peers.servers import SERVERS
from benchmarks.peers.steady import FORMS, LABEL
from benchmarks.peers.table import PEERS
from benchmarks.peers.works import LONG_ROUNDS, OURS, WORKS, Work

PROMPT_TOKENS_PER_S = {"16-bit": 300.0, "int8": 500.0, "int4": 500.0}
STEP_S, SEQUENCE_S = 0.03, 0.004
"""Seconds of a decoding step, and what each of its sequences adds."""
ENGINE_START_S, SERVER_START_S = 8.0, 30.0
STEADY_TURN_S = 20.0


def planned_parts(args: argparse.Namespace, results: Results) -> dict[Part, float]:
    """Part -> seconds, of what is asked for and not there yet."""
    parts: dict[Part, float] = {}
    for group in args.rows:
        parts |= {"served": _served_parts, "steady": _steady_parts}.get(group, _engine_parts)(group, args, results)
    return parts


def _engine_parts(form: str, args: argparse.Namespace, results: Results) -> dict[Part, float]:
    settings = 1 + sum(len(PEERS[name].settings) for name in args.peers if form in PEERS[name].forms)
    sides = 1 + sum(form in PEERS[name].forms for name in args.peers)
    works = [work for work in WORKS if not results.has(form, work.labels)]
    costs: dict[Part, float] = {
        (form, work): sides * work.num_rounds(args.rounds) * turn_s(form, work) for work in works
    }
    if works:
        costs[form, works[0]] += settings * (ENGINE_START_S + NUM_TRIALS * turn_s(form, WORKS[0]))
    return costs


def turn_s(form: str, work: Work) -> float:
    prompts_s = work.num_sequences * work.prompt_tokens / PROMPT_TOKENS_PER_S[form]
    return prompts_s + work.num_new * (STEP_S + work.num_sequences * SEQUENCE_S)


def _served_parts(group: str, args: argparse.Namespace, results: Results) -> dict[Part, float]:
    names = {OURS, *args.peers}
    works = [work for work in SERVED_WORKS if not results.has("16-bit", work.labels.values())]
    rounds = min(args.rounds, LONG_ROUNDS)
    costs: dict[Part, float] = {
        (group, work.label): rounds * len(names & set(work.servers)) * work.turn_s for work in works
    }
    if works:
        costs[group, works[0].label] += len(names & set(SERVERS)) * SERVER_START_S
    return costs


def _steady_parts(group: str, args: argparse.Namespace, results: Results) -> dict[Part, float]:
    forms = [form for form in FORMS if not results.has(form, [LABEL])]
    return {(group, form): ENGINE_START_S + min(args.rounds, LONG_ROUNDS) * STEADY_TURN_S for form in forms}
