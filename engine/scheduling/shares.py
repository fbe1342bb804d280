"""Who of the prompts gets how much of a step: the order in which they take up its room.

Prompts are computed first come, first served, as that gives all of them together their first tokens soonest, with one
exception: a prompt that takes more than a step leaves half of each step to those that are much shorter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from engine.scheduling.sequence import Sequence
from engine.scheduling.step_times import Chunk

MUCH_SHORTER = 2
"""Factor by which a prompt must lack fewer tokens than the one before it, so that it need not wait for that one.

Two that take turns both end as late as the later one, so that those of about the same length don't.
"""
MAX_LOOKED_AT = 16
"""Waiting prompts of which a step looks at what they lack."""
OLDEST_SHARE = 0.5
"""Part of a step's room that is the oldest prompt's own if much shorter ones come after it."""


class Turn(NamedTuple):
    """A prompt may take up `share` of the room."""

    sequence: Sequence
    share: float


def missing_chunks(
    under_way: Iterable[Sequence], waiting: Iterable[Sequence], num_findable: Callable[[Sequence], int]
) -> Iterator[Chunk]:
    """What each prompt lacks, of those `under_way` and the first that wait, whether or not there is a place for them.

    `num_findable` counts the tokens of one that waits which the prefix cache has: a long prompt takes it a while.
    """
    for sequence in under_way:
        yield Chunk(sequence.num_uncomputed_tokens, sequence.num_computed_tokens)
    for sequence in itertools.islice(waiting, MAX_LOOKED_AT):
        num_found = num_findable(sequence)
        yield Chunk(sequence.num_tokens - num_found, num_found)


def turns(prompts: SequenceOf[Sequence], num_missing: Callable[[Sequence], int]) -> Iterator[Turn]:
    """The turns of `prompts`, which are in the order of their arrival, until the room is full.

    `num_missing` counts the tokens that a prompt still lacks. At each turn the caller takes as many of them as fit: a
    prompt that lacks tokens after the last of its turns has filled the room.
    """
    for index, oldest in enumerate(prompts):
        yield Turn(oldest, OLDEST_SHARE)
        missing = num_missing(oldest)
        if not missing:
            continue
        lacking = [(num_missing(sequence), sequence) for sequence in prompts[index + 1 :]]
        shorter = [(count, sequence) for count, sequence in lacking if MUCH_SHORTER * count <= missing]
        for _, sequence in sorted(shorter, key=lambda pair: pair[0]):
            yield Turn(sequence, 1.0)
        yield Turn(oldest, 1.0)
        if num_missing(oldest):
            return
