"""Floating-point operations per second of the dense CPU product on one core, over the peak of its multiply-adds.

`python benchmarks/dense_product.py` prints a row for each matrix of Qwen2 0.5B and 1.5B and each number of rows. The
peak is what a loop of nothing but independent multiply-adds reaches in the same minute, those of the kernel. With
--rounded it is the kernel that rounds activations to bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.ir as ir
import numba
import torch
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quant.base import PackedWeight  # noqa: E402
from quant.kernels import bfloat16_ops  # noqa: E402
from quant.kernels.bfloat16_cpu import Bfloat16Cpu  # noqa: E402
from quant.kernels.dense_cpu import DenseCpu  # noqa: E402
from quant.kernels.dense_ops import WIDTH  # noqa: E402
from quant.kernels.simd import F32, I32, fold_sum, vector_call  # noqa: E402

SHAPES = {
    "0.5B qkv": (1152, 896),
    "0.5B gate and up": (9728, 896),
    "0.5B down": (896, 4864),
    "1.5B qkv": (2048, 1536),
    "1.5B gate and up": (17920, 1536),
    "1.5B down": (1536, 8960),
}
"""Outputs and inputs."""
CHAINS = 12
"""Independent sums: more than a processor's latency times its units."""
LOOPS = 1_000_000


def make_peak_loop(lanes: int, *, is_paired: bool) -> Callable[[int], Any]:
    """A function of a count: so many multiply-adds, of floats or of pairs, to each of some independent sums."""

    @intrinsic  # type: ignore[untyped-decorator]
    def multiply_adds(typing_context: Any, count: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            sums = ir.VectorType(F32, lanes)
            kind = ir.VectorType(I32, lanes) if is_paired else sums
            x = cgutils.alloca_once_value(builder, ir.Constant(kind, [1] * lanes))
            chains = [cgutils.alloca_once_value(builder, ir.Constant(sums, [0.0] * lanes)) for _ in range(CHAINS)]
            with cgutils.for_range(builder, args[0]):
                for chain in chains:
                    value, total = builder.load(x), builder.load(chain)
                    if is_paired:
                        total = bfloat16_ops.add_pair(builder, value, value, total)
                    else:
                        total = vector_call(builder, "fma", value, value, total)
                    builder.store(total, chain)
            total = builder.load(chains[0])
            for chain in chains[1:]:
                total = builder.fadd(total, builder.load(chain))
            return fold_sum(builder, total)

        return types.float32(types.intp), codegen

    @njit(nogil=True)  # type: ignore[untyped-decorator]
    def peak_loop(count: int) -> Any:
        return multiply_adds(count)

    loop: Callable[[int], Any] = peak_loop
    return loop


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The median of the processor's time, which neighbours on a loaded machine lengthen least."""
    work()
    taken = []
    for _ in range(repeats):
        start = time.thread_time()
        work()
        taken.append(time.thread_time() - start)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 512, 4096])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounded", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    numba.set_num_threads(1)
    is_paired = arguments.rounded and bfloat16_ops.HAS_PAIRS
    kernel_class = Bfloat16Cpu if arguments.rounded else DenseCpu
    lanes, products = (bfloat16_ops.LANES, bfloat16_ops.INPUTS) if is_paired else (WIDTH, 1)
    peak_loop = make_peak_loop(lanes, is_paired=is_paired)
    peak = 2 * products * lanes * CHAINS * LOOPS / seconds(lambda: peak_loop(LOOPS), 9)
    print(f"peak of {lanes} lanes, {products} inputs each: {peak / 1e9:.0f} GFLOP/s\n")
    print("| matrix | rows | GFLOP/s | of the peak |\n|---|---|---|---|")
    for name, (num_outputs, num_inputs) in SHAPES.items():
        weight = torch.randn(num_outputs, num_inputs).to(getattr(torch, arguments.dtype))
        packed = PackedWeight("dense", weight)
        if reasons := kernel_class.why_not(packed):
            sys.exit(f"dense_product.py: {'; '.join(reasons)}")
        kernel = kernel_class(packed)
        for rows in arguments.rows:
            x = torch.randn(rows, num_inputs)
            rate = 2 * rows * weight.numel() / seconds(lambda: kernel(x), arguments.repeats)  # noqa: B023
            print(f"| {name} | {rows} | {rate / 1e9:.0f} | {rate / peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
