"""The modules that both processes share: messages, frames, configuration, errors, logs, environment.

The only room of the engine that the server may import. Standard library and msgspec only: no torch, no numpy."""
