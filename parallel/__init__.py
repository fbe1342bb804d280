"""Tensor parallelism: who holds which part of a layer. Knows no engine and no server."""
