"""From the bytes of a body to a `GenerationRequest`: wire models, refusals, limits, grammars.

Wire models do not leave this room. May import `server.text` beside its own files."""
