"""Permits: a limit to the requests that wait and run."""

from __future__ import annotations

from server.errors import OverloadedError


class Admission:
    """The permits of one server, for waiting and running requests together. Nothing waits for a permit."""

    def __init__(self, max_concurrent_requests: int) -> None:
        self.num_free = max_concurrent_requests

    def permit(self, num_places: int) -> Permit:
        """A permit, to be held until the answer is complete or the client is gone. Raises OverloadedError at once."""
        if self.num_free < num_places:
            raise OverloadedError
        self.num_free -= num_places
        return Permit(self, num_places)


class Permit:
    """A place for each sequence of a request; given back once, however often it is released."""

    def __init__(self, admission: Admission, num_places: int) -> None:
        self._admission = admission
        self._num_held = num_places

    def release(self) -> None:
        self._admission.num_free += self._num_held
        self._num_held = 0
