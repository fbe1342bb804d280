"""Two hosts on one machine: each with a network and processes of its own, and a switch between them.

Every host is a network namespace; what runs on it gets a process namespace as well, so that it can't see the other
host's processes. Interfaces exist only in the namespaces, and their names are new each time: two runs don't collide.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from tests.e2e.documents import read_blocks
from tests.e2e.launched import STOP_TIMEOUT_S, LaunchedServer

DOCUMENT = Path(__file__).parents[2] / "docs" / "deployment.md"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
"""Addresses of the hosts. The first one is that of docs/deployment.md."""
CLONE_NEWNET = 0x40000000


def why_not() -> str | None:
    """The reason why no hosts can be made here, or None."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    missing = [program for program in ("ip", "ss", "unshare") if shutil.which(program) is None]
    return f"there is no program {missing[0]}" if missing else None


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The names of the namespaces: of the switch, and of each host."""

    switch: str
    names: tuple[str, str]

    @contextlib.contextmanager
    def clients(self, count: int) -> Iterator[ThreadPoolExecutor]:
        """Threads on the first host, from which their connections go out."""
        with ThreadPoolExecutor(count, initializer=_enter, initargs=(self.names[0],)) as pool:
            yield pool

    def listening(self, host: int) -> set[str]:
        """The addresses at which somebody on this host can be reached, over TCP or UDP."""
        command = ["ip", "netns", "exec", self.names[host], "ss", "-Hltun"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return {line.split()[4].rpartition(":")[0] for line in lines}

    def take_down(self, host: int) -> None:
        """Take the host's own interface down, which its kernel notices."""
        ip("-n", self.names[host], "link", "set", "eth0", "down")

    def cut_in_silence(self) -> None:
        """Let the switch forward nothing any more. Every interface stays up, and no host notices."""
        ip("-n", self.switch, "link", "set", "port1", "nomaster")


def _enter(name: str) -> None:
    """Move this thread to a network namespace."""
    fd = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        code = ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET)
        assert code == 0, os.strerror(ctypes.get_errno())
    finally:
        os.close(fd)


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Make the namespaces, and remove them whatever happens."""
    run = f"pytgi-{os.getpid()}-{secrets.token_hex(4)}"
    hosts = Hosts(f"{run}-switch", (f"{run}-0", f"{run}-1"))
    with contextlib.ExitStack() as stack:
        for name in (hosts.switch, *hosts.names):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
        ip("-n", hosts.switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", hosts.switch, "link", "set", "bridge", "up")
        for index, (name, address) in enumerate(zip(hosts.names, ADDRESSES, strict=True)):
            port = f"port{index}"
            ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", hosts.switch)
            ip("-n", hosts.switch, "link", "set", port, "master", "bridge", "up")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                ip("-n", name, "link", "set", interface, "up")
        yield hosts


class HostServer(LaunchedServer):
    """A launcher on one of the hosts. `process` is the program that has made its process namespace."""

    @property
    def launcher(self) -> psutil.Process:
        (launcher,) = psutil.Process(self.process.pid).children()
        return launcher

    def terminate(self) -> None:
        self.launcher.send_signal(signal.SIGTERM)


def pairs(flags: Sequence[str]) -> dict[str, str]:
    return dict(zip(flags[::2], flags[1::2], strict=True))


def documented_flags(host: int, changes: Mapping[str, str]) -> list[str]:
    """The flags of the command that docs/deployment.md has for this host, with some values changed or added."""
    blocks = read_blocks(DOCUMENT.read_text(), DOCUMENT.name)
    texts = [block.text.replace("\\\n", " ") for block in blocks if block.text.startswith("text-generation-launcher ")]
    (command,) = [text for text in texts if f"--node-rank {host} " in text]
    return [part for pair in {**pairs(shlex.split(command)[1:]), **changes}.items() for part in pair]


@contextlib.contextmanager
def launched_on(hosts: Hosts, host: int, model: Path, log_dir: Path, *flags: str) -> Iterator[HostServer]:
    """Run the documented command on one of the hosts; at the end of the block nothing of it is left."""
    log_path = log_dir / f"host-{host}-{len(list(log_dir.iterdir()))}.log"
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "ip", "netns", "exec", hosts.names[host]]
    command += [sys.executable, "-P", "-m", "server.launcher"]
    command += documented_flags(host, {"--model-id": str(model), "--hostname": ADDRESSES[0], **pairs(flags)})
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    server = HostServer(process, 8080, log_path, ADDRESSES[0])
    try:
        yield server
    finally:
        if process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess, ValueError):
                server.launcher.kill()  # the first of its namespace: the kernel ends all others with it
            deadline = time.monotonic() + STOP_TIMEOUT_S
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            process.kill()
            process.wait()
