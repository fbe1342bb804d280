"""A model of machines with many cores: what a step takes by threads and sockets, from how threads share its products.

    python benchmarks/sockets.py [--write]

Nothing is measured here. Each product goes to the threads as `quant/kernels/work_split.py` cuts it at first, as if no
thread took over another's pieces, with the tiles of AVX512-VNNI and weights of 8 bits. A thread takes the longer of
reading its weights and doing its operations, and a product as long as its slowest thread, but no less than its bytes
take over the socket's bandwidth. To that come the start of a parallel region for each kernel, and what one thread does
alone. Attention is left out. The machine's numbers are assumptions (`Machine`). Prints the table of docs/scaling.md;
--write puts it there.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.documents import with_part  # noqa: E402
from benchmarks.floors import QWEN2_7B, ModelShape  # noqa: E402
from quant.kernels.integer_ops import INSTRUCTIONS  # noqa: E402
from quant.kernels.work_split import NUM_RECTANGLES, rectangle  # noqa: E402

DOCUMENT = REPOSITORY / "docs" / "scaling.md"
BEGIN, END = "<!-- made by benchmarks/sockets.py -->", "<!-- until here -->"
MODELS = {
    "0.5B": ModelShape(896, 4_864, 24, 14, 2, 64, 151_936),
    "7B": QWEN2_7B,
    "72B": ModelShape(8_192, 29_568, 80, 64, 8, 128, 152_064),
}
ROWS = [1, 8, 512]
THREADS = [1, 8, 16, 32, 48, 64]
SOCKETS = 2
TILE = INSTRUCTIONS[0]
RECTANGLE: Any = rectangle.py_func


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """One socket, and what does not get faster with more of its cores."""

    bandwidth: float = 300e9
    """Bytes per second: eight channels of DDR5."""
    core_bandwidth: float = 20e9
    """What one core reads: 20 to 25 GB/s were measured on Zen 4."""
    core_rate: float = 300e9
    """Operations per second of one core: 600 to 790 GOP/s were measured on two of Zen 4."""
    region_s: float = 5e-6
    """The start of a parallel region on two threads, as measured; it is taken to grow with the doublings."""
    regions_per_layer: int = 5
    serial_s: float = 40e-6
    """A layer's share of what one thread does alone in a step, from the 0.5B model's profile."""
    collective_s: float = 6e-6
    """A sum of a token's numbers over two shards, measured; four a layer where activations are rounded."""
    summed_s: float = 2.4e-9
    """A number of such a sum on one thread, from 1.1 ms for 512 tokens of 896; the threads share them."""


MACHINE = Machine()


def product_s(num_outputs: int, num_inputs: int, num_rows: int, num_threads: int) -> float:
    """Seconds of a product on threads of one socket."""
    tile_outputs = TILE.units * TILE.lanes
    num_tiles = -(-num_outputs // tile_outputs)
    longest = 0.0
    for thread in range(num_threads):
        cells = tiles = 0
        for index in range(NUM_RECTANGLES):
            first, last, row, end = RECTANGLE(index, thread, num_threads, num_tiles, num_rows, TILE.rows)
            cells, tiles = cells + (last - first) * (end - row), tiles + (last - first)
        weights = tile_outputs * num_inputs
        reading, computing = tiles * weights / MACHINE.core_bandwidth, 2 * cells * weights / MACHINE.core_rate
        longest = max(longest, reading, computing)
    return max(longest, num_outputs * num_inputs / MACHINE.bandwidth)


def step_s(shape: ModelShape, num_rows: int, num_threads: int, num_shards: int = 1) -> float:
    """Seconds of a step; each shard has a socket and `num_threads` threads, and an equal part of every matrix."""
    layer = sum(
        product_s(-(-outputs // num_shards), inputs, num_rows, num_threads) for outputs, inputs in shape.layer_matrices
    )
    head = product_s(-(-shape.vocabulary // num_shards), shape.hidden, min(num_rows, 8), num_threads)
    layer += MACHINE.region_s * MACHINE.regions_per_layer * max(1.0, math.log2(num_threads)) + MACHINE.serial_s
    if num_shards > 1:
        layer += 4 * (MACHINE.collective_s + num_rows * shape.hidden * MACHINE.summed_s / num_threads)
    return shape.num_layers * layer + head


def table() -> list[str]:
    """A row for each model and number of rows: milliseconds, and the speed-up over one thread."""
    names = [f"{count}" for count in THREADS] + [f"{SOCKETS} x {THREADS[-1]}"]
    lines = [f"| model | rows | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for name, shape in MODELS.items():
        for rows in ROWS:
            times = [step_s(shape, rows, count) for count in THREADS]
            times.append(step_s(shape, rows, THREADS[-1], SOCKETS))
            columns = [f"{1000 * seconds:,.1f} ({times[0] / seconds:.1f})" for seconds in times]
            lines.append(f"| {name} | {rows} | {' | '.join(columns)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into docs/scaling.md")
    args = parser.parse_args()
    text = "\n".join(table())
    print(text)
    if args.write:
        DOCUMENT.write_text(with_part(DOCUMENT.read_text(), BEGIN, END, text))


if __name__ == "__main__":
    main()
