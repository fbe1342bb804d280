"""The real demo model on two shards gives what one gives."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.e2e.launched import launched

PROMPTS = ["def fibonacci(n):", "从前有座山,", "Write a haiku about the sea.\n" * 12]
Tokens = list[tuple[int, float]]


def answers(model: Path, log_dir: Path, num_shards: int, *flags: str) -> list[Tokens]:
    """Ids and logprobs of 32 tokens for each prompt; all prompts run together."""
    with (
        launched(model, log_dir, "--num-shard", str(num_shards), *flags) as server,
        ThreadPoolExecutor(len(PROMPTS)) as pool,
    ):
        generated = list(pool.map(lambda prompt: server.generate(prompt, max_new_tokens=32), PROMPTS))
    return [[(token["id"], token["logprob"]) for token in answer["details"]["tokens"]] for answer in generated]


def ids(tokens: list[Tokens]) -> list[list[int]]:
    return [[token_id for token_id, _ in of_prompt] for of_prompt in tokens]


def test_int8_gives_the_same_bits(demo_model: Path, tmp_path: Path) -> None:
    one, two = (answers(demo_model, tmp_path, num_shards, "--quantize", "eetq") for num_shards in (1, 2))
    assert two == one
