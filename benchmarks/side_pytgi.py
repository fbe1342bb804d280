"""pytgi as one side of a comparison: speaks JSON lines as `sides.Side` expects.

    python side_pytgi.py FORM FOLDER [KV_TOKENS]

FORM as in perplexity.py. Started with the variables of `engine_environment`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.offline import Pytgi  # noqa: E402
from benchmarks.peers.answers import Generate, serve  # noqa: E402
from benchmarks.perplexity import engine_config  # noqa: E402

KV_TOKENS = 1024


def memory_of(thing: object) -> dict[int, int]:
    """Address -> size in bytes of every array that `thing` reaches; two views of one memory count once."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [thing]
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, torch.Tensor):
            found[part.data_ptr()] = max(part.nbytes, found.get(part.data_ptr(), 0))
        elif isinstance(part, np.ndarray):
            found[part.ctypes.data] = max(part.nbytes, found.get(part.ctypes.data, 0))
        else:
            waiting += _parts(part)
    return found


def _parts(thing: object) -> Iterator[object]:
    if isinstance(thing, dict):
        yield from thing.values()
    elif isinstance(thing, list | tuple):
        yield from thing
    elif type(thing).__module__.startswith(("engine.models", "engine.layers.norm", "parallel.", "quant.")):
        yield from getattr(thing, "__dict__", {}).values()
        yield from (getattr(thing, name) for name in getattr(type(thing), "__slots__", ()) if hasattr(thing, name))


def num_bytes(thing: object) -> int:
    """The size of every array that `thing` reaches."""
    return sum(memory_of(thing).values())


def weight_bytes(model: Any) -> dict[str, int]:
    """Bytes of the weights, and bytes of them that a token reads: of the table only a row, unless it is the head."""
    head = memory_of(getattr(model.lm_head, "_head", model.lm_head))
    read = {**memory_of([model.layers, model.norm]), **head}
    return {"weight_bytes": sum({**read, **memory_of(model.embed_tokens)}.values()), "read_bytes": sum(read.values())}


def peak_bytes() -> int:
    """The most memory this program had; getrusage would count what the parent had before it started us, too."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    form, folder = sys.argv[1:3]
    kv_tokens = int(sys.argv[3]) if len(sys.argv) > 3 else KV_TOKENS

    def start() -> tuple[dict[str, Any], Generate]:
        started = time.monotonic()
        engine = Pytgi(engine_config(form, folder, max_batch_total_tokens=kv_tokens))
        return {"load_s": time.monotonic() - started, **weight_bytes(engine.model)}, engine.generate

    serve(start, lambda: {"peak_bytes": peak_bytes()})


if __name__ == "__main__":
    main()
