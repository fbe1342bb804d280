"""The proof on a card: one command checks and measures everything that only hardware can tell.

    PYTHONPATH=. python3 -m benchmarks.gpu_proof [--device cuda|interpreted] [--toy] [--sanitize] [--parts A,B]

Each part is a process with a deadline, and one that fails ends no other. `__main__` runs them and prints the table;
`parts` lists them. It owns what is measured and how it is judged. It may import the engine and `scripts`, no tests and
nothing of the CPU path: neither Numba nor transformers needs to be there, the part `generate` apart.
"""
