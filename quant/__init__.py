"""Weights as they are stored and as they run: one file per method, one table (below). Knows no layer and no model."""

LINEAR_METHODS: dict[str, str] = {
    "none": "quant.none:DenseMethod",
}
"""Quantisation method -> lazy "module:Class" of a `quant.base.LinearMethod`."""
