"""Permits of an LLM's requests: batches wait for each other, and nobody waits for a stream."""

from __future__ import annotations

import contextlib
import resource
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pytgi import permits
from pytgi.permits import Permits, max_connections


def never() -> bool:
    return False


def is_free(limited: Permits, count: int) -> bool:
    """Whether a batch would get so many permits at once."""
    with contextlib.suppress(ConnectionError), limited.wait(count, is_over=lambda: True):
        return True
    return False


@pytest.fixture(autouse=True)
def _poll_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permits, "POLL_S", 0.005)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_threads_never_have_more_than_the_limit_together(count: int) -> None:
    limited, lock, running, most = Permits(7), threading.Lock(), 0, 0

    def work(_: int) -> None:
        nonlocal running, most
        with limited.wait(count, never):
            with lock:
                running += count
                most = max(most, running)
            threading.Event().wait(0.001)
            with lock:
                running -= count

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(64)))
    assert count <= most <= 7 and running == 0
    assert is_free(limited, 7)


def test_a_request_for_more_than_there_are_goes_alone() -> None:
    limited = Permits(4)
    with limited.wait(100, never):
        assert not is_free(limited, 1)
    assert is_free(limited, 4)


def test_nobody_waits_for_streams_alone_which_may_never_end() -> None:
    limited = Permits(1)
    with limited.take(), limited.take():
        assert is_free(limited, 1)


def test_a_batch_counts_the_streams_while_another_batch_runs() -> None:
    limited = Permits(3)
    with limited.take(), limited.wait(1, never):
        assert is_free(limited, 1) and not is_free(limited, 2)


def test_permits_come_back_from_what_fails() -> None:
    limited = Permits(1)
    with pytest.raises(KeyboardInterrupt), limited.wait(1, never):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), limited.take():
        raise KeyboardInterrupt
    with limited.wait(1, never):
        assert not is_free(limited, 1)


@pytest.mark.parametrize(("soft", "connections"), [(1024, 512), (1, 1), (resource.RLIM_INFINITY, None)])
def test_half_of_the_descriptors_are_for_requests(
    soft: int, connections: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    assert max_connections() == connections or (connections is None and max_connections() > 1 << 60)
