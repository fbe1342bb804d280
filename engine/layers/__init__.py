"""The small operations between matrix products: one implementation per file, one table; norms and rotary positions.

Beside its own files the room may import `engine.link`, `parallel` and `quant`.
"""

OPS: dict[str, str] = {
    "cpu": "engine.layers.cpu:CpuOps",
    "torch": "engine.layers.torch:TorchOps",
    "triton": "engine.layers.triton:TritonOps",
}
"""Name -> lazy "module:Class" of an `engine.layers.base.Ops`."""
