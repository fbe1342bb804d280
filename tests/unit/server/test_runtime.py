"""What a process finds out about its host."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.link import processor
from engine.link.processor import available_cores
from server.launcher import host as runtime
from server.launcher.host import describe_runtime, is_ip_address


@pytest.mark.parametrize(
    ("hostname", "expected"),
    [("0.0.0.0", True), ("::", True), ("127.0.0.1", True), ("localhost", False), ("3f2a", False), ("", False)],
)
def test_what_is_an_ip_address(hostname: str, expected: bool) -> None:
    assert is_ip_address(hostname) is expected


def test_cores_are_those_of_the_affinity() -> None:
    assert 1 <= available_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {}, []),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000"}, []),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000"}, [2]),
        ("0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "50000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, [1]),
        (
            "5:cpu,cpuacct:/docker/abc\n0::/\n",
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            [3],
        ),
        ("1:cpu:/\n", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "9"}, []),
    ],
)
def test_quotas_of_control_groups(tmp_path: Path, cgroup: str, files: dict[str, str], expected: list[int]) -> None:
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(processor._quotas(tmp_path)) == expected


def test_a_bug_report_has_versions_and_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "REPORTED_PACKAGES", ("pytgi", "no-such-package"))
    monkeypatch.setenv("PATH", "/nowhere")
    lines = describe_runtime().splitlines()
    assert lines[0].startswith("Target: ") and lines[1].startswith("Python: 3.")
    assert lines[2].startswith("pytgi: ") and lines[3] == "no-such-package: not installed"
    assert lines[4].startswith("Cores: ")
    assert lines[-2:] == ["nvidia-smi:", "N/A"]
