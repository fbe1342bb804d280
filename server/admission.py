"""How many requests are let in at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from server.errors import OverloadedError


class Admission:
    """Permits for waiting and running requests together; nothing waits for a permit (reference 6.1)."""

    def __init__(self, max_concurrent_requests: int) -> None:
        self._num_free = max_concurrent_requests

    @contextlib.contextmanager
    def permit(self) -> Iterator[None]:
        """Hold a permit until the answer is complete or the client is gone. Raises OverloadedError at once."""
        if self._num_free == 0:
            raise OverloadedError
        self._num_free -= 1
        try:
            yield
        finally:
            self._num_free += 1
