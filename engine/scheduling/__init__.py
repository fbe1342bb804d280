"""The room that decides who runs next, on which KV blocks, with which draft: plain Python over token counts.

It knows no torch, no HTTP and no text. Beside its own files it may import `engine.link`.
"""
