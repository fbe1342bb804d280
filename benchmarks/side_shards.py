"""pytgi on several shards as one side of a comparison: speaks JSON lines as `sides.Side` expects.

    python side_shards.py FORM FOLDER SIZE COLLECTIVES

FORM as in perplexity.py; COLLECTIVES `shared memory` or `gloo`. This process is rank 0 and starts the others. Started
with the variables of `engine_environment` for its share of the cores.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from benchmarks.offline import Pytgi, num_cores  # noqa: E402
from benchmarks.perplexity import engine_config  # noqa: E402
from engine.device import Device  # noqa: E402
from engine.link.config import EngineConfig  # noqa: E402
from engine.ranks import Ranks  # noqa: E402
from parallel.state import Collectives  # noqa: E402
from parallel.world import World, listen_at, meet  # noqa: E402

KV_TOKENS = 1024


class TimedCollectives:
    """`parallel.state.Collectives` with a clock: how long rank 0 is in them, waiting for the others included."""

    def __init__(self, timed: Collectives) -> None:
        self._timed = timed
        self.name, self.timeout_s = timed.name, timed.timeout_s
        self.seconds, self.count = 0.0, 0

    def give_up(self, cause: str) -> None:
        self._timed.give_up(cause)

    def _clocked(self, call: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = call()
        self.seconds += time.perf_counter() - started
        self.count += 1
        return result

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        reduced: torch.Tensor = self._clocked(lambda: self._timed.all_reduce(x))
        return reduced

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        gathered: torch.Tensor = self._clocked(lambda: self._timed.all_gather(x, widths))
        return gathered

    def gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
        gathered: torch.Tensor | None = self._clocked(lambda: self._timed.gather(x, widths))
        return gathered


class TimedRanks(Ranks):
    """Ranks whose collectives have a clock."""

    timed: TimedCollectives

    def connect(self, device: Device, config: EngineConfig) -> None:
        super().connect(device, config)
        assert self.state.collectives is not None
        self.timed = TimedCollectives(self.state.collectives)
        self.state = dataclasses.replace(self.state, collectives=self.timed)


def start_followers(config: EngineConfig, size: int, port: int) -> list[subprocess.Popen[str]]:
    """Ranks 1 and up; each has its configuration on standard input, and ends when that ends."""
    followers = []
    for rank in range(1, size):
        world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_PORT": str(port)}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "engine"], stdin=subprocess.PIPE, env={**os.environ, **world}, text=True
        )
        assert process.stdin is not None
        process.stdin.write(config.to_json() + "\n")
        process.stdin.flush()
        followers.append(process)
    return followers


def main() -> None:
    form, folder, size, collectives = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    config = engine_config(form, folder, max_batch_total_tokens=KV_TOKENS)
    config = dataclasses.replace(
        config, num_threads=max(1, num_cores() // size), may_share_memory=collectives != "gloo"
    )
    ranks = None
    if size > 1:
        listener = listen_at("127.0.0.1", 0)
        port = listener.getsockname()[1]
        followers = start_followers(config, size, port)
        ranks = TimedRanks(meet(World(size=size, local_size=size, port=port), listener.detach()), timeout_s=60.0)
    engine = Pytgi(config, ranks)
    print(json.dumps({"about": form}), flush=True)
    for line in sys.stdin:
        message = json.loads(line)
        before = (ranks.timed.seconds, ranks.timed.count) if ranks else (0.0, 0)
        ends = engine.run(message["prompt_ids"], 1, message["num_tokens"])
        after = (ranks.timed.seconds, ranks.timed.count) if ranks else (0.0, 0)
        answer = {"seconds": ends[-1], "communication_s": after[0] - before[0], "collectives": after[1] - before[1]}
        print(json.dumps(answer), flush=True)
    if ranks:
        ranks.end()
        for follower in followers:
            follower.wait()


if __name__ == "__main__":
    main()
