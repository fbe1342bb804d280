"""Weights as they are stored and as they run: a file per format, the tables in `quant.config`. Knows no model."""
