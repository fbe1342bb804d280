"""The metrics of all replicas as one text for Prometheus, each sample with a `replica` label."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")
_COMMENT = re.compile(r"# (?:HELP|TYPE) (\w+)")


def merge_metrics(texts: Iterable[tuple[str, str]]) -> str:
    """`texts` are pairs of a replica and its metrics. A family's comments come once, before all its samples."""
    families: dict[str, tuple[dict[str, None], list[str]]] = {}
    for replica, text in texts:
        name = ""
        for line in text.splitlines():
            if comment := _COMMENT.match(line):
                name = comment[1]
                families.setdefault(name, ({}, []))[0][line] = None
            elif sample := _SAMPLE.fullmatch(line):
                # `_bucket`, `_sum` and `_count` belong to the family whose comments they follow
                name = name if name and sample[1].startswith(name) else sample[1]
                labels = ",".join(filter(None, [f'replica="{replica}"', sample[2]]))
                families.setdefault(name, ({}, []))[1].append(f"{sample[1]}{{{labels}}} {sample[3]}")
    lines = [line for comments, samples in families.values() for line in (*comments, *samples)]
    return "".join(f"{line}\n" for line in lines)
