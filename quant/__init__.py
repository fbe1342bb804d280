"""Weights as they are stored and as they run: a file for each format, the tables in `quant.config`. Knows no model."""
