"""The Serve application: a replica is an actor that owns one whole server, started by our launcher.

Tokens don't pass through Ray. A request leases a replica by a call that stays open as long as the request lives, and
talks HTTP to the replica's server meanwhile. Ray sees calls: it routes, counts, drains and scales by them.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import aiohttp
import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from engine.link.processor import available_cores
from server.launcher.args import LauncherArgs, parse_args
from server.launcher.start import PYTHON

APP_NAME = "pytgi"
DEPLOYMENT_NAME = "Replica"
POLL_S = 0.1
PROBE_TIMEOUT = aiohttp.ClientTimeout(total=5)
STOP_TIMEOUT_S = 15
HEALTH_CHECK_PERIOD_S = 2
TARGET_REQUESTS = 32
"""Requests of a replica on average, above which Serve adds one."""
SPARE_CALLS = 1_000
"""Calls that a replica takes beyond its permits: probes, and requests that its server refuses with 429 at once."""


class Replica:
    """One server in a process tree of its own. It ends with this actor, and this actor with it."""

    async def __init__(self, flags: Sequence[str], host: str | None, directory: str | None) -> None:  # type: ignore[misc]  # Serve awaits it
        """Start the server and wait until it serves. Raises RuntimeError if it ends before.

        It listens at `host`; None: at its node's address, where fronts on other nodes reach it. Relative folders are
        those of `directory`; None: Ray's own.
        """
        host = host or ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
        self._address = f"{host}:{port}"
        self._is_stopping = False
        command = [*PYTHON, "server.replicas.held_launcher", *flags, "--hostname", host, "--port", str(port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=directory)
        while not await self._answers():
            if self._process.poll() is not None:
                raise RuntimeError(f"the launcher ended with {self._process.returncode}; Ray's log has its words")
            await asyncio.sleep(POLL_S)
        threading.Thread(target=self._end_with_server, daemon=True).start()

    async def lease(self, blocks: Sequence[bytes]) -> AsyncGenerator[str]:
        """Where the server is, once; then nothing until the caller cancels. `blocks` are for the router."""
        yield self._address
        await asyncio.Event().wait()

    async def place(self) -> tuple[str, str]:
        """This replica's name, and where its server is."""
        return serve.get_replica_context().replica_id.unique_id, self._address

    async def metrics(self) -> tuple[str, str]:
        """This replica's name, and its metrics."""
        name, address = await self.place()
        async with (
            aiohttp.ClientSession(timeout=PROBE_TIMEOUT) as session,  # Serve hands on what all have given, or nothing
            session.get(f"http://{address}/metrics") as response,
        ):
            return name, await response.text()

    async def check_health(self) -> None:
        """Serve calls this regularly. It replaces a replica where this raises three times in a row."""
        if not await self._answers():
            raise RuntimeError("unhealthy")

    async def __del__(self) -> None:
        """Serve awaits this once all leases have ended, or their time is over."""
        self._is_stopping = True
        self._process.terminate()
        try:
            await asyncio.to_thread(self._process.wait, STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()

    async def _answers(self) -> bool:
        try:
            async with (
                aiohttp.ClientSession(timeout=PROBE_TIMEOUT) as session,
                session.get(f"http://{self._address}/health") as response,
            ):
                return bool(response.status == 200)
        except (aiohttp.ClientError, TimeoutError):
            return False

    def _end_with_server(self) -> None:
        self._process.wait()
        if not self._is_stopping:
            os._exit(1)  # Serve hears at once that its actor is dead, and starts another one


def build_app(args: Mapping[str, Any]) -> Any:
    """The application, for `serve.run` and for `import_path` of a Serve config file.

    `flags` are the launcher's, `replicas` is `N` or `MIN:MAX`, `host` where replicas listen (left out: at their nodes'
    addresses), `directory` where relative folders are; `options` overrides options of the Serve deployment.
    """
    flags = [str(flag) for flag in args["flags"]]
    options = deployment_options(parse_args(flags, os.environ), str(args.get("replicas", 1)))
    return serve.deployment(Replica, **options | dict(args.get("options", {}))).bind(
        flags, args.get("host"), args.get("directory")
    )


def deployment_options(args: LauncherArgs, replicas: str) -> dict[str, Any]:
    """Options of the Serve deployment: how many replicas, what each needs, when it is full, and who routes."""
    min_replicas, _, max_replicas = replicas.partition(":")
    capacity = args.server["max_concurrent_requests"]
    scale: dict[str, Any] = {"num_replicas": int(min_replicas)}
    if max_replicas:
        target = min(TARGET_REQUESTS, capacity)
        scale = {
            "autoscaling_config": {
                "min_replicas": int(min_replicas),
                "max_replicas": int(max_replicas),
                "target_ongoing_requests": target,
            }
        }
    return {
        "name": DEPLOYMENT_NAME,
        **scale,
        "max_ongoing_requests": capacity + SPARE_CALLS,
        "graceful_shutdown_timeout_s": args.graceful_termination_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "request_router_config": RequestRouterConfig(
            request_router_class="server.replicas.router:PrefixRouter", request_router_kwargs={"capacity": capacity}
        ),
        "ray_actor_options": actor_resources(int(max_replicas or min_replicas), args.sharding.size),
        "logging_config": {"enable_access_log": False},
    }


def actor_resources(num_replicas: int, num_shards: int) -> dict[str, Any]:
    """A GPU per shard where the cluster has GPUs, else a part of a host's cores, which may be less than one."""
    cluster = ray.cluster_resources() if ray.is_initialized() else {}
    if cluster.get("GPU"):
        return {"num_gpus": num_shards, "num_cpus": 1}
    cores = available_cores()
    return {"num_cpus": min(cores, cluster.get("CPU", cores)) / num_replicas}
