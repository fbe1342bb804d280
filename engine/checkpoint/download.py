"""How far the files of a model are that are fetched one after the other."""

from __future__ import annotations

import dataclasses

from engine.link.progress import StartProgress


@dataclasses.dataclass(slots=True)
class Download:
    """Some files of one model."""

    progress: StartProgress
    num_bytes: int = 0
    """Bytes of all of them; 0: not known."""
    num_whole_bytes: int = 0
    """Bytes of those that are there."""

    def report(self, num_bytes: float, text: str) -> None:
        """Report that so many bytes of the next file are there, which is `text` in words."""
        done = min(1.0, (self.num_whole_bytes + num_bytes) / self.num_bytes) if self.num_bytes else None
        self.progress.advance(done, f"Download: {text}")
