"""The soak: hours of mixed load on a real server, and a judgement on what is left of it.

    python -m benchmarks.soak [--minutes 480] [--clients 16] [--model FOLDER] [--out FOLDER]

`load` runs the clients, whose kinds `clients` lists; `wire` is their end of HTTP, `bodies` what they ask. `samples`
watches the server's processes and metrics meanwhile, `judging` says what is wrong, `report` writes it down.
It knows the server from outside alone, apart from `probe`, which tells how many asyncio tasks a process has.
"""
