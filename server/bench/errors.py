"""The error that ends a benchmark before it has numbers."""

from __future__ import annotations


class BenchmarkError(Exception):
    """Nothing can be measured; the text says of which server, model or length, and why."""
