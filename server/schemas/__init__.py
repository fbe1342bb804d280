"""JSON schemas as people's programs write them, made into what llguidance can hold a model to.

Plain dictionaries and lists; knows no HTTP, no grammars and no llguidance. The order: `spelling`, `opening`, `closing`,
and `repair` for what llguidance refuses still. May import the standard library only.
"""
