"""Greedy ids of the real demo model equal those of `transformers` in float32, however they are computed.

Ids are compared up to the first position where transformers' own two best logits are closer than 1e-4; how
many comparisons were cut short is printed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.diagonal import long_but
from tests.e2e.launched import LaunchedServer, launched

NEAR_TIE = 1e-4
ENTRIES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "reference_ids.json").read_text())["entries"]

PREEMPTING_WINDOW = 384
SERVERS = {
    "default": (),
    "preempting": ("--max-total-tokens", str(PREEMPTING_WINDOW), "--max-batch-total-tokens", str(PREEMPTING_WINDOW)),
}
"""The last one's cache holds the prompts of all short entries at once, but not what follows them. It is for the slow
tests: `tests/contract/test_greedy_ids.py` preempts tiny models."""
ALONE = {"default": ("one token", "emoji", "chat code", "long"), "preempting": ("chat code",)}
NUM_ALONE = 16
"""Entries that come once more, alone, and so many of their tokens, each of which costs a step of its own."""


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(demo_model / "tokenizer.json"))


@pytest.fixture(scope="module", params=long_but([*SERVERS], "default"))
def server(request: pytest.FixtureRequest, demo_model: Path, tmp_path_factory: Any) -> Iterator[LaunchedServer]:
    logs = tmp_path_factory.mktemp("logs")
    with launched(demo_model, logs, "--dtype", "float32", *SERVERS[request.param]) as server:
        yield server


def generated_ids(
    server: LaunchedServer, tokenizer: Tokenizer, entry: dict[str, Any], max_new_tokens: int | None = None
) -> list[int]:
    """As many as the entry has, unless `max_new_tokens` says less."""
    prompt = tokenizer.decode(entry["prompt_ids"], skip_special_tokens=False)
    assert tokenizer.encode(prompt).ids == entry["prompt_ids"], "the prompt does not survive its text form"
    answer = server.generate(prompt, max_new_tokens=max_new_tokens or len(entry["ids"]))
    return [token["id"] for token in answer["details"]["tokens"]]


def check(name: str, entry: dict[str, Any], ids: list[int]) -> int:
    """Compare; 1 if a near-tie cut the comparison short, else 0."""
    num_compared = next((i for i, gap in enumerate(entry["gaps"]) if gap < NEAR_TIE), len(entry["ids"]))
    assert ids[:num_compared] == entry["ids"][:num_compared], name
    return int(num_compared < len(entry["ids"]))


def check_ids(server: LaunchedServer, tokenizer: Tokenizer, alone: Collection[str] = ENTRIES) -> dict[str, list[int]]:
    """All at once, then those of `alone` one by one with the prefix cache warm; returns the ids."""
    window = server.info()["max_total_tokens"]
    entries = {name: e for name, e in ENTRIES.items() if len(e["prompt_ids"]) + len(e["ids"]) <= window}
    assert len(entries) >= len(ENTRIES) - 1
    with ThreadPoolExecutor(len(entries)) as pool:
        together = list(pool.map(lambda entry: generated_ids(server, tokenizer, entry), entries.values()))
    assert (server.metrics()["pytgi_preemptions"] > 0) == (window == PREEMPTING_WINDOW)
    num_cut = sum(check(name, entry, ids) for (name, entry), ids in zip(entries.items(), together, strict=True))
    found = dict(zip(entries, together, strict=True))
    for name in [name for name in alone if name in entries]:
        ids = found[name][:NUM_ALONE]
        assert generated_ids(server, tokenizer, entries[name], len(ids)) == ids, f"{name}: company changed the ids"
    print(f"{num_cut} of {len(entries)} comparisons were cut short by a near-tie")
    return found


@pytest.fixture(scope="module")
def known() -> dict[str, list[int]]:
    """The ids of entries that a server has generated."""
    return {}


def test_ids_equal_transformers(
    server: LaunchedServer, tokenizer: Tokenizer, known: dict[str, list[int]], request: pytest.FixtureRequest
) -> None:
    """Beyond a near-tie the ids of one server are those of the other."""
    ids = check_ids(server, tokenizer, ALONE[request.node.callspec.params["server"]])
    assert {**known, **ids} == {**ids, **known}
    known.update(ids)
