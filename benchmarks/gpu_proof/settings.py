"""What every part of the proof is told, in a form that travels to its process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """One run of the proof."""

    device: str = "cuda"
    """Key of `engine.device.DEVICES`: `cuda`, or `interpreted` on a CPU."""
    is_toy: bool = False
    """Whether sizes are so small that all of it takes a minute in the interpreter: nothing is measured then."""
    seed: int = 0
    out: str = "build/gpu-proof"
    """The folder of results."""

    @property
    def is_interpreted(self) -> bool:
        return self.device == "interpreted"

    def dump(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def load(cls, text: str) -> Settings:
        return cls(**json.loads(text))

    def part_file(self, name: str) -> Path:
        """The file in which the part leaves what it found, while the run lasts."""
        return Path(self.out) / f"{name}.json"
