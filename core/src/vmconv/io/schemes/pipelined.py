"""Many requests at once on one connection: what NBD and SFTP have in common."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable

from vmconv.errors import ReadError, VmconvError
from vmconv.interface.scheme import Remote

_AT_ONCE = 64
"""Requests of one read that are sent before their answers are awaited."""


class Request:
    """A buffer that was asked for: how many bytes of it are there, whether that is all, and what went wrong.

    `parts` are the ranges that are there, for a protocol in which they come in any order.
    """

    def __init__(self, offset: int, buffer: memoryview) -> None:
        self.offset = offset
        self.buffer = buffer
        self.filled = 0
        self.parts: list[tuple[int, int]] = []
        self.done = False
        self.error: VmconvError | None = None


class Pipelined(Remote):
    """Reads by requests of at most `unit` bytes, which a server answers in any order. Thread-safe.

    A thread that waits for its answer receives those of others meanwhile. After an error of the connection, all fails.
    """

    unit = 1 << 20

    def __init__(self, shown: str) -> None:
        self.shown = shown
        self._sending = threading.Lock()
        self._receiving = threading.Lock()
        self._waiting: dict[int, Request] = {}
        self._number = 0
        self._broken: VmconvError | None = None

    @abstractmethod
    def send(self, number: int, request: Request) -> None:
        """Sends a request; called by one thread at a time. Raises `OSError` or `VmconvError`."""

    @abstractmethod
    def receive(self) -> None:
        """Receives an answer, or a part of one, and calls `settled`; called by one thread at a time."""

    def expected(self, number: int) -> Request:
        """Returns the request of an answer. Raises `ReadError` if no request has its number."""
        found = self._waiting.get(number)
        if found is None:
            raise ReadError(f"{self.shown}: the server answers the request {number:#x}, which was not made")
        return found

    def settled(self, number: int, error: VmconvError | None = None) -> None:
        """Notes that a request is done."""
        request = self._waiting.pop(number)
        request.error = error
        request.done = True

    def read_into(self, offset: int, buffer: memoryview) -> None:
        parts = [Request(offset + at, buffer[at : at + self.unit]) for at in range(0, len(buffer), self.unit)]
        self.exchange(parts, self.send)

    def exchange(self, parts: list[Request], send: Callable[[int, Request], None]) -> None:
        """Sends requests, and waits for all answers. Raises the first error among them."""
        for begin in range(0, len(parts), _AT_ONCE):
            some = parts[begin : begin + _AT_ONCE]
            for part in some:
                self._send(part, send)
            for part in some:
                self._await(part)
        for part in parts:
            if part.error:
                raise part.error

    def _send(self, part: Request, send: Callable[[int, Request], None]) -> None:
        with self._sending, self._breaking():
            self._number += 1
            self._waiting[self._number] = part
            send(self._number, part)

    def _await(self, part: Request) -> None:
        while not part.done:
            with self._receiving:
                if not part.done:
                    with self._breaking():
                        self.receive()

    def _breaking(self) -> _Breaking:
        if self._broken:
            raise self._broken
        return _Breaking(self)

    def break_off(self, error: VmconvError) -> None:
        """Makes all further reads fail with this error."""
        self._broken = self._broken or error


class _Breaking:
    """Turns an error of the connection into one of all its reads."""

    def __init__(self, remote: Pipelined) -> None:
        self._remote = remote

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, VmconvError):
            self._remote.break_off(error)
        elif isinstance(error, OSError):
            said = "the server is silent" if isinstance(error, TimeoutError) else error.strerror or str(error)
            broken = ReadError(f"{self._remote.shown}: the connection failed: {said}")
            self._remote.break_off(broken)
            raise broken from error
        elif error is not None:
            # An interrupted thread leaves half an answer behind.
            self._remote.break_off(ReadError(f"{self._remote.shown}: reading was interrupted"))
