"""Logits of quantised folders as `transformers` with gptqmodel computes them; tests/slow/test_quantized_elsewhere.py.

    python tests/oracles/load_quantized.py OUTPUT.npz FOLDER...    (environment: tests/e2e/environments/gptqmodel.txt)

For every folder, under its name: float32 logits [tokens, vocab_size] of fixed token ids, computed in float16.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # read on import; it dies on two cores without
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # it would compile each matrix anew

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

BACKENDS = {"gptq": "torch", "awq": "torch_awq"}
TOKEN_IDS = [7 * number % 250 for number in range(48)]


@torch.inference_mode()
def logits(folder: Path) -> torch.Tensor:
    config = transformers.AutoConfig.from_pretrained(folder)
    # The default on CPUs is a kernel for four bits that rounds what it multiplies to bfloat16.
    config.quantization_config["backend"] = BACKENDS[config.quantization_config["quant_method"]]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float16, device_map="cpu"
    )
    kind = type(model.model.layers[0].mlp.up_proj)
    assert kind.__module__.startswith("gptqmodel"), f"{folder} was not loaded as a quantised model but as {kind}"
    computed: torch.Tensor = model(torch.tensor([TOKEN_IDS])).logits[0].float()
    return computed


def main() -> None:
    folders = [Path(argument) for argument in sys.argv[2:]]
    np.savez(sys.argv[1], **{folder.name: logits(folder).numpy() for folder in folders})


if __name__ == "__main__":
    main()
