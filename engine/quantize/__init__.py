"""`text-generation-server quantize` and perplexity. It may import the engine up to `engine.start`, and `quant`.

Serving never imports this room.
"""
