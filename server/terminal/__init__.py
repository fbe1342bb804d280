"""`text-generation-server chat`: a conversation in a terminal with any server that has OpenAI's routes.

The address, the model's name and the words of refusals are read as `server/bench/` reads them. Whatever a server writes
reaches the terminal through `visible.py` only. Nothing here knows how this repository's server works.
"""
