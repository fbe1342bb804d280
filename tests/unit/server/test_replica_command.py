"""The command `pytgi serve --replicas` and its Ray, which a fake plays here."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from server.launcher.errors import LaunchError
from server.replicas import command


class FakeRayError(Exception):
    """The base of Ray's own errors, which are of no kind that Python has."""


class FakeRay(ModuleType):
    """As much of Ray as starting and ending it takes."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.exceptions = SimpleNamespace(RayError=FakeRayError)
        self.serve = SimpleNamespace(shutdown=lambda: self.calls.append("serve.shutdown"))
        self.calls: list[str] = []
        self.options: dict[str, Any] = {}

    def init(self, **options: Any) -> None:
        self.options = options
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # as Ray does

    def shutdown(self) -> None:
        self.calls.append("shutdown")

    def get_runtime_context(self) -> SimpleNamespace:
        return SimpleNamespace(gcs_address="127.0.0.1:1")


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield fake
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("address", [None, ""])
def test_without_an_address_ray_is_ours_whatever_runs_on_this_host(
    ray: FakeRay, address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with command._ray() as is_own:
        assert is_own and ray.options["address"] == "local"
    assert ray.calls == ["serve.shutdown", "shutdown"]


def test_a_ray_that_has_an_address_is_joined_and_left_running(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with command._ray() as is_own:
        assert not is_own and not {"address", "object_store_memory"} & ray.options.keys()
    assert ray.calls == ["shutdown"]


@pytest.mark.parametrize("error", [FakeRayError, ConnectionError, RuntimeError, ValueError])
def test_a_ray_that_cannot_be_reached_is_refused_in_its_words(
    ray: FakeRay, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> None:
        raise error("Invalid address format: abc")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(LaunchError, match="^There is no Ray: Invalid address format: abc$"), command._ray():
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["init", "get_runtime_context", "deployment"])
def test_a_signal_before_the_front_serves_ends_with_0(
    ray: FakeRay, moment: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call_and_get_signal(**options: Any) -> Any:
        answer = original(**options)
        signal.raise_signal(number)
        return answer

    if moment != "deployment":
        original = getattr(ray, moment)
        monkeypatch.setattr(ray, moment, call_and_get_signal)
    with pytest.raises(SystemExit) as stopped, command._ray():
        signal.raise_signal(number)
    assert stopped.value.code == 0
