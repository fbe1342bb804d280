"""The demo model in other engines on this machine, next to ours: what `make peers` runs.

    python -m benchmarks.peers [--rows 16-bit int8 int4 served steady] [--peers llama.cpp ...] [--write]

`table` lists the peers; each is a program `side_*.py` in an environment of its own, which converts the weights and then
answers with `answers`' protocol. `works` says what is measured and what we demand, `rounds` takes turns, `engines` has
the rows without HTTP, `served` those of the programs in `servers`, `steady` those without a peer, `report` the tables.
"""
