"""Decoding steps of a mixture of experts on a CPU: over what they must read, and over one sequence.

    python benchmarks/experts.py [FORM ...] [--layers 4] [--rounds 15] [--write]

FORM is bfloat16 or a value of --quantize. The model has the sizes of Qwen1.5-MoE-A2.7B with fewer layers, a vocabulary
cut in the same proportion, and random weights. A step decodes a token of each of 1 to 16 sequences with 128 tokens of
context: the model and the sampler, without the scheduler. Its floor is what it must read (the weights of the experts
that its tokens chose, all other weights, keys and values) over the bandwidth at which all cores sum an array in the
same round. Each round has every step once; shares of the floor and rates over one sequence are those of a round, and
their medians count. Prints a table in Markdown; --write puts it into docs/performance.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.documents import measured_on, print_and_write  # noqa: E402
from benchmarks.offline import num_cores, read_bandwidth, restart_with_environment  # noqa: E402
from benchmarks.roofline import WARM_UPS, Steps  # noqa: E402

DOCUMENT = REPOSITORY / "docs" / "performance.md"
BEGIN, END = "<!-- made by benchmarks/experts.py -->", "<!-- until here: experts -->"
FORMS = ["bfloat16", "eetq", "int4"]
SEQUENCES = [1, 2, 4, 8, 16]
CONTEXT = 128
POOL_TOKENS = 4096
NUM_LAYERS, VOCABULARY = 24, 151936
"""What the real model has of layers and of tokens."""
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "decoder_sparse_step": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 0,
}


def write_model(folder: Path, num_layers: int) -> None:
    """Weights, config.json and a tokenizer. One layer takes a GB."""
    import torch
    from safetensors.torch import save_file

    from tests.tiny_model import write_tokenizer

    vocabulary = VOCABULARY * num_layers // NUM_LAYERS // 8 * 8
    config = {**CONFIG, "num_hidden_layers": num_layers, "vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    hidden = CONFIG["hidden_size"]

    def matrix(outputs: int, inputs: int = hidden) -> torch.Tensor:
        return torch.empty(outputs, inputs, dtype=torch.bfloat16).normal_(std=inputs**-0.5)

    def gated(prefix: str, inner: int) -> dict[str, torch.Tensor]:
        matrices = {"gate_proj": matrix(inner), "up_proj": matrix(inner), "down_proj": matrix(hidden, inner)}
        return {f"{prefix}.{name}.weight": weight for name, weight in matrices.items()}

    ends = {"model.embed_tokens": matrix(vocabulary), "lm_head": matrix(vocabulary), "model.norm": torch.ones(hidden)}
    save_file({f"{name}.weight": tensor for name, tensor in ends.items()}, folder / "model-ends.safetensors")
    for index in range(num_layers):
        layer = f"model.layers.{index}"
        tensors = {
            f"{layer}.input_layernorm.weight": torch.ones(hidden),
            f"{layer}.post_attention_layernorm.weight": torch.ones(hidden),
            f"{layer}.mlp.gate.weight": matrix(CONFIG["num_experts"]),
            f"{layer}.mlp.shared_expert_gate.weight": matrix(1),
            **gated(f"{layer}.mlp.shared_expert", CONFIG["shared_expert_intermediate_size"]),
        }
        for name in "qkvo":
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = matrix(hidden)
        for name in "qkv":
            tensors[f"{layer}.self_attn.{name}_proj.bias"] = torch.zeros(hidden)
        for expert in range(CONFIG["num_experts"]):
            tensors |= gated(f"{layer}.mlp.experts.{expert}", CONFIG["moe_intermediate_size"])
        save_file(tensors, folder / f"model-{index}.safetensors")


@dataclasses.dataclass(slots=True)
class Row:
    """One kind of step."""

    sequences: int
    run: Callable[[], float]
    num_active: int = 0
    """Experts that have tokens, of all layers together."""
    num_bytes: float = 0
    """What the step must read."""
    seconds: list[float] = dataclasses.field(default_factory=list)
    """One for each round."""


def count_active(ops: Any, programs: Any, run: Callable[[], float]) -> int:
    """How many experts have tokens in a step, of all layers together.

    Only this step counts them, and it is computed call by call: a program would not call what counts.
    """
    route, counts = ops.route, [0]
    programs.is_off = True

    def counting(*args: Any, **options: Any) -> Any:
        routing = route(*args, **options)
        counts[0] += int(routing.groups.active[0])
        return routing

    ops.route = counting
    run()
    ops.route, programs.is_off = route, False
    return counts[0]


def measure(form: str, folder: str, num_rounds: int) -> tuple[list[Row], list[float]]:
    """A row for each number of sequences, and the bandwidth of each round in GB/s."""
    from benchmarks.side_pytgi import num_bytes

    steps = Steps(form, folder, pool_tokens=POOL_TOKENS)
    model = steps.model

    of_experts = sum(num_bytes([layer.mlp.gate_up_proj, layer.mlp.down_proj]) for layer in model.layers)
    beside = num_bytes([model.layers, model.lm_head]) - of_experts
    of_one = of_experts / CONFIG["num_experts"] / len(model.layers)
    kv_bytes = sum(tensor.nbytes for tensor in steps.cache_tensors) / POOL_TOKENS * CONTEXT
    ops = model.layers[0].mlp._ops
    rows = [Row(count, steps.make(count, CONTEXT)) for count in SEQUENCES]
    for row in rows:
        row.num_active = count_active(ops, steps.programs, row.run)
        row.num_bytes = beside + row.num_active * of_one + row.sequences * kv_bytes
    bandwidths = []
    for round_index in range(num_rounds):
        print(f"{form}: round {round_index + 1} of {num_rounds}", file=sys.stderr, flush=True)
        bandwidths.append(read_bandwidth())
        for row in rows:
            for _ in range(WARM_UPS if round_index == 0 else 0):
                row.run()
            row.seconds.append(row.run())
    return rows, bandwidths


def table(rows: list[Row], bandwidths: list[float], num_layers: int) -> list[str]:
    lines = [
        "| sequences | active experts of a layer | MB | ms | GB/s | of the floor | tokens/s over one sequence |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rates = [row.num_bytes / seconds / 1e9 for seconds in row.seconds]
        share = median(rate / bandwidth for rate, bandwidth in zip(rates, bandwidths, strict=True))
        over_one = median(row.sequences * one / own for one, own in zip(rows[0].seconds, row.seconds, strict=True))
        lines.append(
            f"| {row.sequences} | {row.num_active / num_layers:.1f} | {row.num_bytes / 1e6:.0f} "
            f"| {1000 * median(row.seconds):.1f} | {median(rates):.1f} | {share:.2f} | {over_one:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forms", metavar="FORM", nargs="*", default=FORMS, help=f"default: {' '.join(FORMS)}")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    args = parser.parse_args()
    restart_with_environment()
    with tempfile.TemporaryDirectory() as name:
        print(f"Writing a model of {args.layers} layers to {name}", file=sys.stderr, flush=True)
        write_model(Path(name), args.layers)
        sections = [measured_on(num_cores(), f"a random Qwen1.5-MoE-A2.7B of {args.layers} layers")]
        for form in args.forms:
            rows, bandwidths = measure(form, name, args.rounds)
            sections += ["", f"### {form}; {median(bandwidths):.1f} GB/s", "", *table(rows, bandwidths, args.layers)]
    print_and_write(sections, DOCUMENT if args.write else None, BEGIN, END)


if __name__ == "__main__":
    main()
