"""The errors of the engine, for the engine itself and for the HTTP process.

EngineError
 ├─ StartError        the engine cannot start: one sentence that names the fix; exit code 1, no traceback
 ├─ GenerationError   one request failed, the others go on
 ├─ EngineDeadError   the engine process is gone; every open request fails
 └─ EngineHungError   the engine process is there but says nothing; every open request fails
"""

from __future__ import annotations

from pathlib import Path


def fetch_again(path: Path) -> str:
    """What to do about a damaged file, which is the model's or an adapter's."""
    return f"fetch the {'adapter' if path.name.startswith('adapter_') else 'model'} again"


class EngineError(Exception):
    """Base of the tree above; `str()` of each is fit to show to a user."""


class StartError(EngineError):
    """A flag, file or shape stops the start."""

    @classmethod
    def of_file(cls, path: Path, error: OSError) -> StartError:
        """For a file or folder of the model that the system does not let us read."""
        return cls(f"{path} cannot be read ({error.strerror or error}): fix that, or {fetch_again(path)}")


class GenerationError(EngineError):
    """One request could not be finished."""


class EngineDeadError(EngineError):
    """The engine closed its socket."""


class EngineHungError(EngineError):
    """Nothing was heard of the engine for a long time."""
