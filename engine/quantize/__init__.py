"""`text-generation-server quantize` and perplexity. Serving never imports this room."""
