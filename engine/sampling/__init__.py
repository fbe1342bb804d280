"""The room between logits and tokens: penalties, grammar masks, the draw. It works on whole batches and keeps no text.

Beside its own files it may import `engine.link`, `engine.scheduling` and `quant`.
"""
