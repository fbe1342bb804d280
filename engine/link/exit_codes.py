"""Exit codes by which the launcher tells which process failed first."""

from __future__ import annotations

PEER_GONE_EXIT_CODE = 3
"""Exit code of a process that ended because the other end of its socket closed: it is not the cause."""
ENGINE_HUNG_EXIT_CODE = 4
"""Exit code of the HTTP process when the engine is there but silent: the engine is the cause."""
START_FAILED_EXIT_CODE = 5
"""Exit code of an engine that could not start; its log says why."""
RANK_LOST_EXIT_CODE = 6
"""Exit code of an engine rank that has lost another one, which is the cause; its log says which."""
