"""Weights whose upper bytes are codes: nothing is lost, and a product has the bits of weights as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from quant.base import PackedWeight
from quant.kernels import bfloat16_cpu
from quant.kernels.bfloat16_cpu import MAX_INPUTS, ROW_BLOCK, Bfloat16Cpu
from quant.kernels.bfloat16_ops import INPUTS, OUTPUTS, PAIR_WEIGHTS, ROWS
from quant.kernels.coded_ops import HAS_TABLES, PAIR_BYTES, TABLE_BYTES
from quant.kernels.coded_weights import MAX_MARKED_SHARE, NO_PAIR, CodedWeights, encode
from quant.kernels.simd import enabled_features
from tests.diagonal import long_but

Numbers = npt.NDArray[np.uint16]
needs_tables = pytest.mark.skipif(not HAS_TABLES, reason="the processor has no AVX512-VBMI or no AVX512-BF16")


def bits(n_size: int, k_size: int, seed: int = 0) -> Numbers:
    """Weights of 16 upper bytes, both signs of eight: 2^-7 to almost 2^9."""
    rng = np.random.default_rng(seed)
    upper = rng.integers(0, 2, (n_size, k_size)) << 15 | rng.integers(0x3C, 0x44, (n_size, k_size)) << 8
    return (upper | rng.integers(0, 256, (n_size, k_size))).astype(np.uint16)


def decoded(codes: CodedWeights, num_pairs: int) -> Numbers:
    """[tiles * OUTPUTS, pairs * INPUTS], from what the fields are said to be."""
    pairs = codes.coded.reshape(-1, PAIR_BYTES)
    tables = codes.tables.reshape(-1, TABLE_BYTES)[:, :16]
    low, packed = pairs[:, :PAIR_WEIGHTS], pairs[:, PAIR_WEIGHTS:]
    index = np.concatenate([packed & 15, packed >> 4], axis=1)
    numbers = tables[np.arange(len(pairs))[:, None] // num_pairs, index].astype(np.uint16) << 8 | low
    # of 16 bytes the first eight belong to the first vector of words, the others to the second
    ordered = numbers.reshape(-1, PAIR_WEIGHTS // 16, 2, 8).swapaxes(1, 2).reshape(-1, PAIR_WEIGHTS)
    assert codes.marks[-1] == NO_PAIR
    ordered[codes.marks[:-1]] = codes.raw.reshape(-1, PAIR_WEIGHTS)
    tiles = ordered.reshape(-1, num_pairs, OUTPUTS, INPUTS)
    return tiles.swapaxes(1, 2).reshape(-1, num_pairs * INPUTS)


def coded_bytes(codes: CodedWeights) -> int:
    return sum(array.nbytes for array in codes)


@given(st.data())
def test_nothing_is_lost(data: Any) -> None:
    """Any bits, NaN and infinity among them, any order of outputs, tiles that are not full."""
    n_size, k_size = data.draw(st.integers(1, 3 * OUTPUTS)), 16 * data.draw(st.integers(1, 12))
    w = bits(n_size, k_size, data.draw(st.integers(0, 1000)))
    places = st.integers(0, w.size - 1)
    for place, number in data.draw(st.dictionaries(places, st.integers(0, 0xFFFF), max_size=6)).items():
        w.flat[place] = number
    order = np.array(data.draw(st.permutations(range(n_size))))
    codes = encode(w.reshape(-1), order, k_size, data.draw(st.sampled_from([16, 48, k_size])))
    assume(codes is not None)
    np.testing.assert_array_equal(decoded(codes, k_size // INPUTS)[:n_size], w[order])


def test_six_strange_numbers_in_four_pairs_are_four_marks() -> None:
    w = bits(2 * OUTPUTS, 640)
    strange = [(0, 0), (31, 639), (32, 0), (40, 1), (63, 638), (63, 639)]
    for place in strange:
        w[place] = 0x0001
    codes = encode(w.reshape(-1), np.arange(2 * OUTPUTS), 640, 320)
    assert codes is not None
    assert codes.marks.tolist() == [0, 319, 320, 639, NO_PAIR], "pairs 0 and 319 of each tile"
    assert codes.first_marks.tolist() == [0, 1, 2, 3], "of each tile's two stretches"
    np.testing.assert_array_equal(decoded(codes, 320), w)
    assert 0.75 * w.nbytes < coded_bytes(codes) < 0.78 * w.nbytes


def test_many_different_upper_bytes_are_not_coded() -> None:
    w = np.random.default_rng(0).integers(0, 1 << 16, (OUTPUTS, 640)).astype(np.uint16)
    assert encode(w.reshape(-1), np.arange(OUTPUTS), 640, 640) is None
    w = bits(OUTPUTS, 640)
    num_strange = int(320 * MAX_MARKED_SHARE)
    w[5, : 2 * num_strange : 2] = 1
    assert encode(w.reshape(-1), np.arange(OUTPUTS), 640, 640) is not None
    w[5, 2 * num_strange] = 1
    assert encode(w.reshape(-1), np.arange(OUTPUTS), 640, 640) is None


def test_a_pruned_matrix_has_a_code_for_zero() -> None:
    w = bits(OUTPUTS, 640)
    w[:, ::2] = 0
    w[w >> 8 == 0x3C] = 0x3D00
    codes = encode(w.reshape(-1), np.arange(OUTPUTS), 640, 640)
    assert codes is not None
    assert len(codes.raw) == 0
    np.testing.assert_array_equal(decoded(codes, 320), w)


@needs_tables
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("n_size, k_size", [(32, 48), (48, 896), (96, 896), (64, 2 * MAX_INPUTS + 48)])
def test_a_product_has_the_bits_of_weights_as_they_are(
    n_size: int, k_size: int, is_gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, rng = bits(n_size, k_size), np.random.default_rng(1)
    if k_size > 48:
        w[0, 0] = w[0, min(k_size - 1, MAX_INPUTS)] = w[n_size - 1, k_size - 1] = w[n_size // 2, k_size // 2] = 0x4700
        w[rng.integers(0, n_size, k_size // 99), rng.integers(0, k_size, k_size // 99)] = 0x4700  # 2^15
    weight = torch.from_numpy(w.view(np.int16)).view(torch.bfloat16)
    packed = PackedWeight("dense", weight, torch.randn(n_size), is_gated=is_gated)
    coded = Bfloat16Cpu(packed)
    assert coded.is_coded
    monkeypatch.setattr(bfloat16_cpu, "HAS_TABLES", False)
    plain = Bfloat16Cpu(packed)
    assert not plain.is_coded
    x = torch.randn(ROW_BLOCK + ROWS + 1, k_size, generator=torch.Generator().manual_seed(2))
    for rows in (*range(ROWS + 2), 24, 25, 64, len(x)):
        for kernels in ([coded.__call__, plain.__call__], [coded.gated, plain.gated])[: 1 + (coded.num_gates > 0)]:
            results = [kernel(x[:rows].contiguous()) for kernel in kernels]
            assert results[0].numpy().tobytes() == results[1].numpy().tobytes()


@needs_tables
def test_a_strange_weight_counts() -> None:
    """A marked weight is in the result with every bit, wherever in its tile and stretch it lies."""
    k_size = MAX_INPUTS + 640
    for place in ((0, 0), (5, 1), (31, MAX_INPUTS - 1), (32, MAX_INPUTS), (63, k_size - 1)):
        w = bits(2 * OUTPUTS, k_size)
        w[place] = 0x7149  # 2^99
        packed = PackedWeight("dense", torch.from_numpy(w.view(np.int16)).view(torch.bfloat16))
        x = torch.zeros(ROWS + 1, k_size)
        x[:, place[1]] = 1.0
        result = Bfloat16Cpu(packed)(x)
        assert result[:, place[0]].tolist() == [packed.weight[place].item()] * len(x)


PRODUCT = """
import numpy, sys, torch
from quant.base import PackedWeight
from quant.kernels.bfloat16_cpu import Bfloat16Cpu
bits = numpy.frombuffer(sys.stdin.buffer.read(), numpy.int16).reshape(64, 96).copy()
kernel = Bfloat16Cpu(PackedWeight("dense", torch.from_numpy(bits).view(torch.bfloat16)))
print(kernel.is_coded, kernel(torch.arange(14 * 96.0).sin().view(14, 96)).numpy().tobytes().hex())
"""


@needs_tables
@pytest.mark.parametrize("missing", long_but(["avx512vbmi", "avx512bf16", "avx512vbmi avx512bf16"], "avx512vbmi"))
def test_processors_that_lack_an_instruction_compile_without_it(missing: str, tmp_path: Path) -> None:
    """LLVM ends a process that asks it for an instruction it may not use."""
    features = ",".join(f"+{name}" for name in sorted(enabled_features() - set(missing.split())))
    environ = {
        **os.environ,
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    w = bits(2 * OUTPUTS, 96)
    run = subprocess.run(
        [sys.executable, "-c", PRODUCT], input=w.tobytes(), env=environ, capture_output=True, check=True
    )
    is_coded, result = run.stdout.decode().split()
    kernel = Bfloat16Cpu(PackedWeight("dense", torch.from_numpy(w.view(np.int16)).view(torch.bfloat16)))
    assert (is_coded, kernel.is_coded) == ("False", True)
    assert result == kernel(torch.arange(14 * 96.0).sin().view(14, 96)).numpy().tobytes().hex()
