"""Memory of matrices that lie one after the other: nobody gets what another one has, and what is let go comes back."""

from __future__ import annotations

import threading
import weakref

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quant.kernels.arrays import LINE_BYTES, MIN_SHARED_BYTES, SLAB_BYTES, new_weight

SIZES = st.integers(MIN_SHARED_BYTES // 2, 2 * MIN_SHARED_BYTES) | st.integers(SLAB_BYTES // 4, SLAB_BYTES)


@given(st.lists(SIZES, max_size=12))
def test_matrices_have_memory_of_their_own_that_begins_with_a_line(sizes: list[int]) -> None:
    matrices = [new_weight(size) for size in sizes]
    assert [len(matrix) for matrix in matrices] == sizes
    spans = sorted((matrix.ctypes.data, matrix.ctypes.data + len(matrix)) for matrix in matrices)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    shared = [matrix for matrix in matrices if MIN_SHARED_BYTES <= len(matrix) <= SLAB_BYTES // 2]
    assert all(matrix.ctypes.data % LINE_BYTES == 0 for matrix in shared)


def test_threads_get_different_memory() -> None:
    found: list[np.ndarray] = []

    def take() -> None:
        found.extend(new_weight(MIN_SHARED_BYTES) for _ in range(200))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({matrix.ctypes.data for matrix in found}) == 1600


def test_shared_memory_is_given_back_with_its_last_matrix() -> None:
    first = new_weight(SLAB_BYTES // 2)
    others = [new_weight(SLAB_BYTES // 2) for _ in range(3)]  # the first one's memory is used up by now
    base = first
    while base.base is not None:
        base = base.base
    gone = weakref.ref(base)
    del base, first, others[0]
    new_weight(SLAB_BYTES // 2)
    assert gone() is None
