"""Adapters that `peft` writes with tensors of the base model beside their own, for tests/contract/test_adapter.py.

    python -m venv peft && peft/bin/pip install --no-deps peft==0.21.2 accelerate
    PYTHONPATH=.:peft/lib/python3.11/site-packages .venv/bin/python tests/oracles/adapter_peft.py

Writes tests/oracles/adapters: per case the files of `save_pretrained`, and expected.json with greedy ids of the
model of `peft` in float32. The base model is `write_base`, whose random numbers a test makes again.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.tiny_model import write_tiny_qwen2

FOLDER = Path(__file__).parent / "adapters"
CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "saved-along": (["q_proj"], {"save_embedding_layers": True}),
    "on-embeddings": (["q_proj", "embed_tokens"], {}),
}
"""Name -> modules that are changed, and options of `save_pretrained`."""
PROMPT = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100]
NUM_TOKENS = 16


def write_base(folder: Path) -> None:
    write_tiny_qwen2(folder, dtype=torch.float16, is_tied=False, hidden_size=32, intermediate_size=64)


def write_case(name: str, base: Path) -> dict[str, Any]:
    """The adapter of a case, made over the model in float16, and what `peft` says with it in float32."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    targets, options = CASES[name]
    config = LoraConfig(r=2, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(list(CASES).index(name))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16), config)
    model.save_pretrained(FOLDER / name, **options)
    (FOLDER / name / "README.md").unlink()
    path = FOLDER / name / "adapter_config.json"
    path.write_text(path.read_text().replace(str(base), "base"))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), FOLDER / name)
    out = model.generate(
        input_ids=torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(out.logits)[:, 0].topk(2, dim=-1).values
    return {
        "ids": out.sequences[0, len(PROMPT) :].tolist(),
        "smallest_gap": round(float((best[:, 0] - best[:, 1]).min()), 5),
    }


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    with tempfile.TemporaryDirectory() as root:
        base = Path(root) / "base"
        write_base(base)
        answers = {name: write_case(name, base) for name in CASES}
    expected = {"peft": importlib.metadata.version("peft"), "prompt_ids": PROMPT, "answers": answers}
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
