"""Attention over the paged KV cache: one backend per file, one table.

Beside its own files the room may import `engine.layers` and `quant`.
"""

ATTENTION_BACKENDS: dict[str, str] = {
    "cpu": "engine.attention.cpu:CpuAttention",
    "torch": "engine.attention.torch:TorchAttention",
    "triton": "engine.attention.triton:TritonAttention",
}
"""Name -> lazy "module:Class" of an `engine.attention.base.AttentionBackend`."""
