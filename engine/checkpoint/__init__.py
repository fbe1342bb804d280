"""A model's folder: finding and fetching it, config.json, reading weights into layers.

Beside its own files the room may import `engine.link`, `engine.memory`, `engine.models` and `quant`.
"""
