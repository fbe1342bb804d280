"""The console script: flags, child processes, their order.

It may import the standard library, `engine.link` and `server.config`: it starts before anything is installed or loaded.
"""
