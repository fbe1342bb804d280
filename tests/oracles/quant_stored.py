"""The stored quantised checkpoints and where each came from: one entry per checkpoint in provenance.json."""

from __future__ import annotations

import fcntl
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
PROVENANCE = CHECKPOINTS / "provenance.json"


def work_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / "pytgi-oracles"
    folder.mkdir(exist_ok=True)
    return folder


def describe(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def note(name: str, **facts: Any) -> None:
    """Add facts about one checkpoint to provenance.json; None removes one."""
    with (work_folder() / "provenance.lock").open("w") as lock:  # two tools may run at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = json.loads(PROVENANCE.read_text()) if PROVENANCE.exists() else {}
        entry = {**entries.get(name, {}), **facts}
        entries[name] = {key: value for key, value in entry.items() if value is not None}
        PROVENANCE.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n")
