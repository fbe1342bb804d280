"""A container without an engine: namespaces, mounts and chroot, with the environment and the entry point of the image.

As under Docker the launcher is process 1, the network is the container's own, and nothing of the host is seen but what
is mounted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What follows `docker run` before the image."""

    volumes: Mapping[Path, str] = dataclasses.field(default_factory=dict)
    """Folder here -> folder in the container, with `:ro` if nobody may write there."""
    environ: Mapping[str, str] = dataclasses.field(default_factory=dict)
    user: str = "0:0"
    is_read_only: bool = False
    """`--read-only --tmpfs /tmp`."""
    shm_size: str = "64m"
    entrypoint: Sequence[str] = ()
    """In place of the image's."""


@dataclasses.dataclass(frozen=True)
class Container:
    process: subprocess.Popen[bytes]
    log_path: Path
    environ: dict[str, str]
    started: float

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def first(self) -> psutil.Process:
        """Process 1 of the container."""
        (first,) = psutil.Process(self.process.pid).children()
        return first

    def wait_for_log(self, text: str) -> float:
        """Seconds from the start until the log has that text."""
        while text not in self.log:
            assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.log}"
            assert time.monotonic() < self.started + START_TIMEOUT_S, f"no {text!r}:\n{self.log}"
            time.sleep(0.05)
        return time.monotonic() - self.started

    def curl(self, path: str, body: Mapping[str, Any] | None = None, port: int = 80) -> str:
        """What curl prints in the container's network. Fails unless the status is one of success."""
        command = ["nsenter", "--net", "--target", str(self.first.pid), "curl", "-sS", "--fail-with-body", "-m", "120"]
        command.append(f"http://localhost:{port}{path}")
        if body is not None:
            command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{self.log}"
        return done.stdout

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """`docker exec`."""
        enter = ["nsenter", "--target", str(self.first.pid), "--mount", "--pid", "--net", "--root", "--wd"]
        words = [*enter, "/usr/bin/env", "-i", *(f"{name}={value}" for name, value in self.environ.items()), *command]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    def stop(self) -> int:
        """`docker stop`: the exit code after SIGTERM."""
        self.first.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_TIMEOUT_S)


def setup(root: Path, options: Options) -> str:
    """The mounts of a container, as commands of sh in a mount namespace of its own."""
    places = [f"{root}{place.partition(':')[0]}" for place in options.volumes.values()]
    commands = [f"mount --bind {root} {root}", shlex.join(["mkdir", "-p", *places])]
    if options.is_read_only:
        commands.append(f"mount -o remount,bind,ro {root}")
        commands.append(f"mount -t tmpfs -o mode=1777 tmpfs {root}/tmp")
    for source, place in options.volumes.items():
        folder, _, mode = place.partition(":")
        commands.append(f"mount --bind {shlex.quote(str(source))} {root}{folder}")
        commands += [f"mount -o remount,bind,ro {root}{folder}"] if mode == "ro" else []
    commands += [f"mount -t proc proc {root}/proc", f"mount --rbind /sys {root}/sys", f"mount --rbind /dev {root}/dev"]
    commands.append(f"mount -t tmpfs -o mode=1777,size={options.shm_size} tmpfs {root}/dev/shm")
    # As Docker does: port 80 is for every user of the container.
    network = ["ip link set lo up", "echo 0 > /proc/sys/net/ipv4/ip_unprivileged_port_start"]
    return "\n".join([*commands, *network])


@contextlib.contextmanager
def running(
    root: Path, configuration: Mapping[str, Any], log_path: Path, arguments: Sequence[str], options: Options
) -> Iterator[Container]:
    """Run the image whose files are in `root`; at the end of the block nothing of it is left."""
    environ = dict(pair.split("=", 1) for pair in configuration["Env"]) | {"HF_HUB_OFFLINE": "1", **options.environ}
    inside = ["/usr/bin/env", "-i", "-C", configuration["WorkingDir"]]
    inside += [f"{name}={value}" for name, value in environ.items()]
    inside += [*(options.entrypoint or configuration["Entrypoint"]), *arguments]
    enter = ["chroot", f"--userspec={options.user}", "--groups=", str(root)]
    script = f"{setup(root, options)}\nexec {shlex.join([*enter, *inside])}"
    command = "unshare --mount --pid --net --ipc --uts --fork --kill-child sh -ec".split()
    with log_path.open("wb") as log:
        started = time.monotonic()
        process = subprocess.Popen([*command, script], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    container = Container(process, log_path, environ, started)
    try:
        yield container
    finally:
        if process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess, ValueError):
                container.first.kill()
            process.wait(STOP_TIMEOUT_S)
