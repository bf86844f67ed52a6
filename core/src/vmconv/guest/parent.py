"""The parent's side: starts the confined child, reads the disks for it, and does not believe what it answers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmconv.errors import printable
from vmconv.guest.facts import Facts, Problem
from vmconv.guest.protocol import ANSWER, LENGTH, MAX_ANSWER, MAX_PIECE, READ, REFUSED, REQUEST, Task

if TYPE_CHECKING:
    from vmconv.model.extents import Extents

MAX_READ = 1 << 30
"""Bytes that the child may read of all disks together. An initramfs has 20 to 150 MB for each kernel."""

_PATIENCE = 600
"""Seconds without a request after which the child is ended. Its CPU time is limited, but it may sleep."""

CHILD = (sys.executable, "-P", "-m", "vmconv.guest.child")


def look(disks: Sequence[Extents], task: Task, *, command: Sequence[str] = CHILD) -> Facts:
    """Returns what is inside the volumes of `task`, with the reason for each that could not be read.

    A child that crashes or breaks the rules is one problem among the facts. Raises the error of the storage if a disk
    cannot be read.
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            silent = subprocess.DEVNULL
            child = subprocess.Popen(list(command), stdin=theirs.fileno(), stdout=silent, stderr=silent, cwd="/")
        ours.settimeout(_PATIENCE)
        try:
            answer = _serve(ours, disks, task)
        except (TimeoutError, ConnectionError, EOFError, ValueError) as exc:
            child.kill()
            return Facts(problems=(Problem("", _end(child, exc)),))
        finally:
            child.kill()
            child.wait()
    return answer


def _serve(sock: socket.socket, disks: Sequence[Extents], task: Task) -> Facts:
    wanted = json.dumps(task).encode()
    sock.sendall(LENGTH.pack(len(wanted)) + wanted)
    left = MAX_READ
    while True:
        kind, disk, offset, length = REQUEST.unpack(_exactly(sock, REQUEST.size))
        if kind == ANSWER and length <= MAX_ANSWER:
            return _facts(_exactly(sock, length))
        if kind != READ or disk >= len(disks) or length > MAX_PIECE or offset + length > disks[disk].size:
            raise ValueError("asked for what is not on the disks")
        left -= length
        sock.sendall(LENGTH.pack(REFUSED) if left < 0 else LENGTH.pack(length) + disks[disk].read(offset, length))


def _exactly(sock: socket.socket, length: int) -> bytes:
    found = bytearray()
    while len(found) < length:
        piece = sock.recv(min(length - len(found), MAX_PIECE))
        if not piece:
            raise EOFError
        found += piece
    return bytes(found)


def _facts(answer: bytes) -> Facts:
    """Returns the facts of an answer; raises `ValueError` if it is invalid."""
    from pydantic import TypeAdapter

    # pydantic's error is a ValueError with many lines.
    try:
        return TypeAdapter(Facts).validate_json(answer, strict=True)
    except ValueError as exc:
        raise ValueError("gave an answer of another form") from exc


def _end(child: subprocess.Popen[bytes], exc: Exception) -> str:
    """Returns why there is no answer."""
    if isinstance(exc, TimeoutError):
        return f"their reader did not answer within {_PATIENCE} s"
    if isinstance(exc, ValueError):
        return printable(f"their reader {exc}")
    status = child.wait()
    if status < 0:
        import signal

        return f"their reader was ended by {signal.Signals(-status).name}"
    return f"their reader ended with status {status}"
