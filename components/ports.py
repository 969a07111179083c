"""Ports on the loopback address: a free one, or a clear sentence when the wanted one is taken."""

from __future__ import annotations

import socket

from couturier.components.errors import CouturierError

LOOPBACK = "127.0.0.1"


def free_port() -> int:
    """A port on loopback that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def is_free(port: int) -> bool:
    """Whether a server could listen on that port of loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def wanted_port(port: int, *, option: str, purpose: str) -> int:
    """``port`` if it is free.

    Raises:
        CouturierError: somebody listens there.
    """
    if not is_free(port):
        raise CouturierError(
            f"port {port} on {LOOPBACK} is in use, and {purpose} wants it. Stop what listens there, or choose another "
            f"with {option} (0 takes any free one)."
        )
    return port
