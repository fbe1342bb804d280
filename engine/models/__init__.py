"""Model families: one file each, one table. `blocks.py` and `config.py` have what decoders share.

Beside its own files the room may import `engine.attention`, `engine.layers`, `engine.link`, `parallel` and `quant`.
"""

MODELS: dict[str, str] = {
    "qwen2": "engine.models.qwen2:Qwen2ForCausalLM",
    "qwen2_moe": "engine.models.qwen2_moe:Qwen2MoeForCausalLM",
    "qwen3": "engine.models.qwen3:Qwen3ForCausalLM",
    "qwen3_moe": "engine.models.qwen3_moe:Qwen3MoeForCausalLM",
}
"""`model_type` of config.json -> lazy "module:Class" of an `engine.models.base.CausalLM`."""
