"""How many requests are let in at a time."""

from __future__ import annotations

from types import TracebackType

from server.errors import OverloadedError


class Admission:
    """Permits for waiting and running requests together; nothing waits for a permit (reference 6.1)."""

    def __init__(self, max_concurrent_requests: int) -> None:
        self.num_free = max_concurrent_requests

    def permit(self) -> Permit:
        """To be held until the answer is complete or the client is gone. Raises OverloadedError at once."""
        if self.num_free == 0:
            raise OverloadedError
        self.num_free -= 1
        return Permit(self)


class Permit:
    """One place; given back once, however often it is released."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._is_held = True

    def release(self) -> None:
        if self._is_held:
            self._is_held = False
            self._admission.num_free += 1

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
