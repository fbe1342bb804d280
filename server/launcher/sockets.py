"""The launcher's sockets: the port of HTTP and the place where the ranks meet, held before anything loads."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
from collections.abc import Iterator

from server.launcher.errors import LaunchError
from server.launcher.host import is_ip_address
from server.launcher.sharding import Sharding

logger = logging.getLogger("launcher")


def bind(hostname: str, port: int) -> socket.socket:
    """The socket of HTTP, bound and not yet listening: a busy port fails before the weights load."""
    hostname = "127.0.0.1" if hostname == "localhost" else hostname.strip("[]")
    if not is_ip_address(hostname):
        logger.warning("Invalid hostname, defaulting to 0.0.0.0")
        hostname = "0.0.0.0"
    return bound_socket(hostname, port, "Cannot listen", "--hostname", "--port")


def bound_socket(
    address: str, port: int, complaint: str, address_flag: str, port_flag: str, *, is_listening: bool = False
) -> socket.socket:
    """A socket at an IP address. Raises LaunchError with the complaint and the flag that fixes it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.ExitStack() as stack:
        try:
            listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            if is_listening:
                listener.listen()
        except OSError as error:
            flag = port_flag if error.errno in (errno.EADDRINUSE, errno.EACCES) else address_flag
            place = f"[{address}]" if family == socket.AF_INET6 else address
            raise LaunchError(f"{complaint} on {place}:{port} ({error.strerror}): give another {flag}") from error
        stack.pop_all()
        return listener


def describe_address(listener: socket.socket) -> str:
    """Where clients find the server, as the log has it."""
    address = listener.getsockname()
    return address if isinstance(address, str) else f"port {address[1]}"


@contextlib.contextmanager
def rendezvous_socket(sharding: Sharding) -> Iterator[socket.socket | None]:
    """The socket where the ranks will meet, listening already. None: another process holds it, or there is one rank."""
    if sharding.size == 1 or 0 not in sharding.ranks or sharding.is_torchrun:
        yield None
        return
    address = ip_address_of(sharding.address)
    flags = "--master-addr", "--master-port"
    with bound_socket(address, sharding.port, "The shards can't meet", *flags, is_listening=True) as listener:
        yield listener


def ip_address_of(address: str) -> str:
    """The IP address of a host's name, version 4 if it has one. Raises LaunchError."""
    try:
        addresses = socket.getaddrinfo(address.strip("[]"), None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise LaunchError(
            f"--master-addr {address} can't be resolved ({error.strerror}): give an IP address"
        ) from error
    return str(min(addresses, key=lambda info: info[0] != socket.AF_INET)[4][0])
