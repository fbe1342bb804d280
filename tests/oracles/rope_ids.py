"""Greedy ids of `transformers` in float32 on the demo model with other positions: for tests/e2e/test_rope_ids.py.

    python tests/oracles/rope_ids.py MODEL_FOLDER > tests/e2e/rope_ids.json

As reference_ids.py, but with config.json changed as each case says. Takes two minutes and 3 GB.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from reference_ids import reference
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    "sliding window": {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 8},
}
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = {
    "longer than 64": (
        "Shopping: 3 apples, 12 eggs, 2 litres of milk, 5 lemons, 1 loaf of bread, 250 g of butter, 4 onions, "
        "6 carrots, 8 potatoes, 2 cucumbers, 1 kg of flour, 7 tomatoes, 9 bananas, 10 oranges. Sorted by number, "
        "beginning with the smallest:"
    ),
    "chat longer than 64": CHAT.format(
        "Anna has a red car, Ben a blue bicycle, Clara a green boat, David a yellow bus, Emma a white horse, Frank a "
        "black motorbike, Gina a silver train and Henry a golden balloon. Write a short poem about Clara, Gina and "
        "Ben and what they do with what they have on a rainy day."
    ),
    "grows beyond 64": (
        "Monday rain, Tuesday snow, Wednesday sun, Thursday fog, Friday wind, Saturday hail, Sunday storm. The "
        "weather of the week in reverse order, beginning with Sunday, and one word of advice for each day: Sunday"
    ),
}
"""With what follows they have at most the 128 tokens that `dynamic` stretches 64 to."""


def main() -> None:
    folder = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    own_config = json.loads((Path(folder) / "config.json").read_text())
    prompts = {name: tokenizer(text)["input_ids"] for name, text in PROMPTS.items()}
    cases = {}
    for case, changes in CASES.items():
        config = Qwen2Config(**{**own_config, **copy.deepcopy(changes)})  # it writes into what it is given
        model: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
        entries = {}
        for name, prompt_ids in prompts.items():
            model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # `dynamic` remembers longer texts
            entries[name] = reference(model, prompt_ids)
        cases[case] = {"changes": changes, "entries": entries}
    json.dump({"transformers": __import__("transformers").__version__, "cases": cases}, sys.stdout)


if __name__ == "__main__":
    main()
