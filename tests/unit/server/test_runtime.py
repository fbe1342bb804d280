"""What a process finds out about its host."""

from __future__ import annotations

import os

import pytest

from server import runtime
from server.runtime import available_cores, describe_runtime, is_ip_address


@pytest.mark.parametrize(
    ("hostname", "expected"),
    [("0.0.0.0", True), ("::", True), ("127.0.0.1", True), ("localhost", False), ("3f2a", False), ("", False)],
)
def test_what_is_an_ip_address(hostname: str, expected: bool) -> None:
    assert is_ip_address(hostname) is expected


def test_cores_are_those_of_the_affinity() -> None:
    assert 1 <= available_cores() <= len(os.sched_getaffinity(0))


def test_a_bug_report_has_versions_and_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "REPORTED_PACKAGES", ("pytgi", "no-such-package"))
    monkeypatch.setenv("PATH", "/nowhere")
    lines = describe_runtime().splitlines()
    assert lines[0].startswith("Target: ") and lines[1].startswith("Python: 3.")
    assert lines[2].startswith("pytgi: ") and lines[3] == "no-such-package: not installed"
    assert lines[4].startswith("Cores: ")
    assert lines[-2:] == ["nvidia-smi:", "N/A"]
