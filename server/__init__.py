"""The HTTP process and the launcher. May import `engine.link` and no other room of the engine; never torch or numba."""
