"""Addresses that are listened on: whether they can be had, ports that nobody has, and where a gateway is."""

from __future__ import annotations

import errno
import random
import socket
from pathlib import Path

from gateway.config import Config


def port_in_use(host: str, port: int) -> bool:
    """Whether somebody has it."""
    error = _refused(host, port)
    return error is not None and error.errno == errno.EADDRINUSE


def why_not(host: str, port: int, key: str) -> str:
    """Why the address cannot be listened on, and what to do; an empty string where it can. ``key`` is the
    setting that names the port, such as ``gateway.port``."""
    if (error := _refused(host, port)) is None:
        return ""
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use; stop what listens there, or set {key} to another"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} on {host} may not be listened on ({error.strerror}); set {key} above 1023"
    section = key.rpartition(".")[0]
    return f"port {port} on {host} cannot be listened on ({error.strerror}); correct {section}.host"


def _refused(host: str, port: int) -> OSError | None:
    """What the system says to whoever would listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        return error
    return None


def free_port(host: str, together: int = 1) -> int:
    """The first of so many ports in a row that nobody listens on.

    They lie below those that the system gives to outgoing connections (``ip_local_port_range``): one of these
    may be somebody's connection by the time that it is listened on.
    """
    first = _first_ephemeral_port()
    while True:
        port = random.randrange(min(10_000, first // 2), first - together)
        if not any(port_in_use(host, port + more) for more in range(together)):
            return port


def _first_ephemeral_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()[0])
    except (OSError, ValueError, IndexError):
        return 32_768


def address(config: Config) -> str:
    """Where a gateway of this configuration can be reached from its own machine."""
    gateway = config.gateway
    scheme = "https" if gateway.tls_certificate else "http"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(gateway.host, gateway.host)
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{gateway.port}"
