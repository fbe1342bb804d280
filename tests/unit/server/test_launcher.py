"""The launcher's pieces that need no child process; the whole is in tests/e2e/test_life_cycle.py."""

from __future__ import annotations

import socket

import pytest

from server.launcher import LaunchError, bind, snapshot_commit


@pytest.mark.parametrize(
    ("hostname", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("0.0.0.0", "0.0.0.0"),
        ("4f2a9c0d1e", "0.0.0.0"),  # a container's HOSTNAME
    ],
)
def test_what_is_bound(hostname: str, address: str) -> None:
    with bind(hostname, 0) as listener:
        assert listener.getsockname()[0] == address
        port = listener.getsockname()[1]
        with socket.socket(listener.family) as client:
            assert client.connect_ex((address, port)) != 0, "nobody may be let in before the engine is ready"


def test_a_busy_port_is_refused_with_the_mend() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with pytest.raises(LaunchError, match="Address already in use.*give another --port"):
            bind("127.0.0.1", busy.getsockname()[1])


def test_only_a_folder_of_the_hub_has_a_commit() -> None:
    assert snapshot_commit("/data/hub/models--Qwen--Q/snapshots/abc123") == "abc123"
    assert snapshot_commit("/models/mine") is None
