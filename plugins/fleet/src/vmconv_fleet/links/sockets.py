"""TCP connections that a library of this process opened without giving access to them."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from contextlib import suppress

from vmconv_fleet.config import join_address

_OPEN = "/proc/self/fd"


def give_up_after(connections: Collection[tuple[str, str]], milliseconds: int) -> int:
    """Makes the kernel end connections whose sent data is not acknowledged within a time (RFC 5482).

    Each is (near, far), HOST:PORT in numbers. Returns the number of connections found.
    """
    found = 0
    for name in os.listdir(_OPEN):
        try:
            # Not of a copy of the descriptor: closing that would end all POSIX locks on the file, if it is one.
            one = socket.socket(fileno=int(name))
        except OSError:
            continue
        try:
            with suppress(OSError):
                if _ends(one) in connections:
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
                    found += 1
        finally:
            one.detach()
    return found


def _ends(one: socket.socket) -> tuple[str, str] | None:
    if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
        return None
    return join_address(*one.getsockname()[:2]), join_address(*one.getpeername()[:2])
