"""Greedy ids of `transformers` in float32 on the demo model: the ground truth of tests/e2e/test_reference_ids.py.

    python tests/oracles/reference_ids.py MODEL_FOLDER > tests/e2e/reference_ids.json

Each entry stores the prompt's ids, the ids that follow, and the gap between the two largest logits at each of them, so
that a test can tell a near-tie (a gap below 1e-4) from a mistake. Takes a few minutes and 3 GB.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_NEW_TOKENS = 32
LONG_PROMPT_TOKENS = 2000

PROMPTS = {
    "one token": "The",
    "english": "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "chinese": "请用三句话介绍一下大语言模型是如何训练的。",
    "code": "def quicksort(items: list[int]) -> list[int]:\n    ",
    "emoji": "Translate into plain words: 👩‍👩‍👧‍👦🏳️‍🌈 🚀🔥 = ",
    "json": '{"name": "Ada", "born": 1815, "fields": ["mathematics", ',
    "accents": "Le cœur déçu mais l'âme plutôt naïve, Louÿs rêva de crapaüter en canoë",
}
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
CHAT_PROMPTS = {
    "chat english": "Tell me something about large language models.",
    "chat chinese": "北京有哪些值得去的地方?",
    "chat code": "Write a Python function is_prime(n).",
}


def long_prompt(tokenizer: Any) -> list[int]:
    """2,000 tokens that do not repeat: a table of squares, then a request."""
    lines = "\n".join(f"The square of {n} is {n * n}, and its cube is {n**3}." for n in range(1, 200))
    ids: list[int] = tokenizer(lines)["input_ids"][: LONG_PROMPT_TOKENS - 8]
    return ids + tokenizer("\nIn short, the table above shows")["input_ids"]


def reference(model: Any, prompt_ids: list[int]) -> dict[str, Any]:
    out = model.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.stack(out.logits).squeeze(1).topk(2).values
    return {
        "prompt_ids": prompt_ids,
        "ids": out.sequences[0, len(prompt_ids) :].tolist(),
        "gaps": [round(gap, 6) for gap in (best[:, 0] - best[:, 1]).tolist()],
    }


def main() -> None:
    folder = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = {name: tokenizer(text)["input_ids"] for name, text in PROMPTS.items()}
    prompts |= {name: tokenizer(CHAT.format(text))["input_ids"] for name, text in CHAT_PROMPTS.items()}
    prompts["long"] = long_prompt(tokenizer)
    entries = {name: reference(model, prompt_ids) for name, prompt_ids in prompts.items()}
    json.dump({"transformers": __import__("transformers").__version__, "entries": entries}, sys.stdout)


if __name__ == "__main__":
    main()
