"""The demo model in other engines on this machine, next to ours: what `make peers` runs.

    python -m benchmarks.peers [--rows 16-bit int8 int4 served] [--peers llama.cpp ...] [--rounds 5] [--write]

`table` lists the peers; each is a program `side_*.py` in an environment of its own, which converts the weights and then
answers with `answers`' protocol. `works` says what is measured and what we demand, `rounds` takes turns, `served` does
the same over HTTP with the load of `load`, `report` writes it down.
"""
