"""Who runs next, on which KV blocks, with which draft. Plain Python over token counts: no torch, no text.

May import `engine.link` beside its own files."""
