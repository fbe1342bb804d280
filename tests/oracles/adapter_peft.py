"""Adapters that `peft` writes otherwise than as two matrices for each of a model's, for tests/contract/test_adapter.py.

    python -m venv peft && peft/bin/pip install --no-deps peft==0.21.2 accelerate
    PYTHONPATH=.:peft/lib/python3.11/site-packages .venv/bin/python tests/oracles/adapter_peft.py

Writes tests/oracles/adapters: per case the files of `save_pretrained`, and expected.json with greedy ids of the
model of `peft` in float32. The base models are those of `write_base`, whose random numbers a test makes again.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.tiny_model import write_tiny_qwen2, write_tiny_qwen2_moe, write_tiny_qwen3_moe

FOLDER = Path(__file__).parent / "adapters"
PROMPT = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100]
NUM_TOKENS = 16
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 48}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """An adapter, and its base model."""

    settings: Mapping[str, Any]
    """Arguments of `LoraConfig`."""
    write: Callable[..., None] = write_tiny_qwen2
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Changes of the base model's config.json."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of `save_pretrained`."""
    is_tied: bool = False


def tied(**settings: Any) -> Case:
    return Case({"target_modules": ["q_proj"], **settings}, is_tied=True)


SAVED = ["embed_tokens", "lm_head"]
CASES: dict[str, Case] = {
    "saved-along": Case({"target_modules": ["q_proj"]}, options={"save_embedding_layers": True}),
    "on-embeddings": Case({"target_modules": ["q_proj", "embed_tokens"]}),
    "experts": Case(
        {
            "target_modules": ["q_proj"],
            "target_parameters": BOTH,
            "rank_pattern": {"experts.down_proj": 3},
            "alpha_pattern": {"gate_up_proj": 5},
        },
        write_tiny_qwen2_moe,
        EXPERTS,
    ),
    "experts-by-modules": Case(
        {"target_modules": "q_proj gate_proj up_proj down_proj gate".split()}, write_tiny_qwen3_moe, EXPERTS
    ),
    "one-parameter": Case(
        {"target_modules": [], "target_parameters": [BOTH[0], "gate.weight"], "use_rslora": True},
        write_tiny_qwen3_moe,
        EXPERTS,
    ),
    "saved-modules": Case({"target_modules": ["q_proj"], "modules_to_save": [*SAVED, "norm"]}),
    "saved-router": Case({"target_modules": ["q_proj"], "modules_to_save": ["gate"]}, write_tiny_qwen3_moe, EXPERTS),
    "tied-saved": tied(modules_to_save=SAVED),
    "tied-saved-table": tied(modules_to_save=SAVED[:1]),
    "tied-saved-as-one": tied(modules_to_save=SAVED, ensure_weight_tying=True),
    "tied-table": tied(target_modules=["q_proj", "embed_tokens"]),
    "tied-head": tied(target_modules=["q_proj", "lm_head"]),
    "tied-as-one": tied(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    "added-biases": Case({"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "saved-biases": Case({"target_modules": ["q_proj"], "bias": "all"}),
}


def write_base(name: str, folder: Path) -> None:
    case = CASES[name]
    sizes = {"hidden_size": 32, "intermediate_size": 64, **case.changes}
    case.write(folder, dtype=torch.float16, is_tied=case.is_tied, **sizes)


def write_case(name: str, base: Path) -> dict[str, Any]:
    """The adapter of a case, made over the model in float16, and what `peft` says with it in float32."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    case = CASES[name]
    config = LoraConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM", init_lora_weights=False, **case.settings)
    torch.manual_seed(list(CASES).index(name))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16), config)
    train_whole_tensors(model)
    model.save_pretrained(FOLDER / name, **case.options)
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


def train_whole_tensors(model: torch.nn.Module) -> None:
    """Change what training would, where `init_lora_weights` has left it as it was."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("modules_to_save" in name or name.endswith("bias")):
            noise = torch.randn(parameter.shape) * 0.1
            parameter.data += noise.to(parameter.dtype)


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    answers = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as root:
            write_base(name, Path(root) / "base")
            answers[name] = write_case(name, Path(root) / "base")
    expected = {"peft": importlib.metadata.version("peft"), "prompt_ids": PROMPT, "answers": answers}
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
