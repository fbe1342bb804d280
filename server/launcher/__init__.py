"""The console script: flags, child processes, their order. Standard library, `engine.link` and `server.config` only:
it starts before anything is installed or loaded."""
