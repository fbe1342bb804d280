"""The small operations between matrix products, one implementation per device behind one protocol (`base.Ops`)."""

OPS: dict[str, str] = {
    "cpu": "engine.layers.cpu:CpuOps",
    "torch": "engine.layers.torch:TorchOps",
    "triton": "engine.layers.triton:TritonOps",
}
"""Name -> lazy "module:Class" of an `engine.layers.base.Ops`."""
