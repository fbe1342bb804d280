"""A server with many adapters, as users start it, on two shards: named at the start, and loaded while it serves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.contract.harness import oracle_greedy
from tests.contract.test_adapter import ATTENTION, MLP, merged_by_hand
from tests.contract.test_lora import write_adapter
from tests.e2e.launched import LaunchedServer, launched
from tests.tiny_model import write_tiny_qwen2

NUM_ADAPTERS, NUM_IN_MEMORY, NUM_TOKENS = 64, 8, 6
TEXT = "one is a number"


def ids_of(server: LaunchedServer, adapter: str | None) -> list[int]:
    """The tokens of an answer by `adapter`."""
    answer = server.generate(TEXT, max_new_tokens=NUM_TOKENS, adapter_id=adapter)
    return [token["id"] for token in answer["details"]["tokens"]]


def test_a_thousand_loads_leave_nothing_behind(tmp_path: Path) -> None:
    """Neither open files nor mapped ones, nor memory: an adapter is closed once another one has its name."""
    base = tmp_path / "base"
    write_tiny_qwen2(base)
    folders = [write_adapter(tmp_path / f"a{n}", base, [*ATTENTION, *MLP], rank=4, seed=n) for n in range(2)]
    with launched(base, tmp_path, "--dtype", "float32", "--allow-runtime-lora-updating") as server:
        engine, sizes = server.child("engine"), []
        for number in range(1000):
            body = {"lora_name": "hot", "lora_path": str(folders[number % 2]), "load_inplace": True}
            assert httpx.post(f"{server.url}/v1/load_lora_adapter", json=body).status_code == 200
            if number % 100 == 99:
                assert len(ids_of(server, "hot")) == NUM_TOKENS
                maps = len(engine.memory_maps(grouped=False))
                sizes.append((engine.memory_info().rss >> 20, maps, engine.num_fds()))
    first, last = sizes[1], sizes[-1]
    assert all(after <= before + 8 for before, after in zip(first, last, strict=True)), sizes


def test_sixty_four_adapters_eight_in_memory_and_one_that_comes_late(tmp_path: Path) -> None:
    base, modules = tmp_path / "base", [*ATTENTION, *MLP]
    write_tiny_qwen2(base)
    folders = [write_adapter(tmp_path / f"a{n}", base, modules, rank=4, seed=n) for n in range(NUM_ADAPTERS + 1)]
    *known, late = folders
    flags = ["--num-shard", "2", "--dtype", "float32", "--max-loras", str(NUM_IN_MEMORY)]
    names = ",".join(f"{folder.name}={folder}" for folder in known)
    with launched(base, tmp_path, *flags, "--lora-adapters", names, "--allow-runtime-lora-updating") as server:
        prompt = [token["id"] for token in httpx.post(f"{server.url}/tokenize", json={"inputs": TEXT}).json()]
        merged = [
            merged_by_hand(base, folder, tmp_path / f"merged-{folder.name}", dict.fromkeys(modules, 4.0))
            for folder in folders
        ]
        expected = [oracle_greedy(folder, prompt, NUM_TOKENS)[0] for folder in merged]
        plain = oracle_greedy(base, prompt, NUM_TOKENS)[0]
        assert len({tuple(ids) for ids in expected}) > NUM_ADAPTERS // 2, "adapters that agree prove little"
        with ThreadPoolExecutor(16) as pool:  # twice: what has made place comes back
            chosen = [*(folder.name for folder in known), None] * 2
            assert list(pool.map(lambda name: ids_of(server, name), chosen)) == [*expected[:-1], plain] * 2
        body = {"lora_name": "late", "lora_path": str(late)}
        assert httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=60).status_code == 200
        assert ids_of(server, "late") == expected[-1]
        assert httpx.post(f"{server.url}/v1/unload_lora_adapter", json=body).status_code == 200
        refused = httpx.post(f"{server.url}/generate", json={"inputs": TEXT, "parameters": {"adapter_id": "late"}})
        assert refused.status_code == 422
        assert ids_of(server, None) == plain
