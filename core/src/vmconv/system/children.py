"""Work in child processes beside each other."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Pipe, wait
from typing import Any, Generic, NamedTuple, TypeVar

from vmconv.system.signals import ENDING, Stopped, held

_Piece = TypeVar("_Piece")
_Result = TypeVar("_Result")
_Handlers = Mapping[signal.Signals, Any]


class _Child(NamedTuple):
    """A child process; `place` is that of the piece that it works on."""

    pid: int
    place: int


def run_beside(
    pieces: Sequence[_Piece],
    work: Callable[[_Piece], _Result],
    died: Callable[[_Piece, str], _Result],
    ended: Callable[[_Result], None],
    jobs: int,
) -> None:
    """Calls `work` for each piece in one of at most `jobs` processes, and `ended` with each result.

    `died` makes the result of a piece whose process ended without one, from the words how it ended. A signal that
    interrupts the caller is passed to the processes once; it is raised again when all have ended. The caller has no
    other threads.
    """
    crew = _Crew(pieces, work, died, ended)
    stopped: KeyboardInterrupt | None = None
    while crew.running or crew.waiting:
        try:
            with held():
                crew.fill(jobs)
            ready = wait(crew.running)
            with held():
                for line in ready:
                    crew.receive(line)
        except KeyboardInterrupt as exc:
            if stopped is None:
                stopped = exc
                crew.stop(exc.number if isinstance(exc, Stopped) else signal.SIGINT)
    if stopped:
        raise stopped


class _Crew(Generic[_Piece, _Result]):
    """The processes, each with the line to it, and the places of the pieces that wait."""

    def __init__(
        self,
        pieces: Sequence[_Piece],
        work: Callable[[_Piece], _Result],
        died: Callable[[_Piece, str], _Result],
        ended: Callable[[_Result], None],
    ) -> None:
        self._pieces, self._work, self._died, self._ended = pieces, work, died, ended
        self._handlers = {number: signal.getsignal(number) for number in ENDING}
        self.waiting = list(range(len(pieces)))[::-1]
        self.running: dict[Any, _Child] = {}

    def fill(self, jobs: int) -> None:
        """Starts processes until `jobs` are running, as long as pieces wait."""
        while self.waiting and len(self.running) < jobs:
            pid, line = _begin(self._pieces, self._work, self._handlers, self.running)
            self._give(pid, line)

    def receive(self, line: Any) -> None:
        """Takes a result, or the end of a process; gives the process the next piece, or ends it."""
        child = self.running.pop(line)
        try:
            result: _Result = line.recv()
        except (EOFError, ConnectionResetError):
            self._ended(self._died(self._pieces[child.place], _end(child, line)))
            return
        if self.waiting:
            self._give(child.pid, line)
        else:
            _end(child, line)
        self._ended(result)

    def stop(self, number: int) -> None:
        """Sends a signal to all processes; the waiting pieces are dropped."""
        self.waiting.clear()
        for child in self.running.values():
            os.kill(child.pid, number)

    def _give(self, pid: int, line: Any) -> None:
        self.running[line] = _Child(pid, self.waiting.pop())
        # A process that has ended is noticed when its answer is read.
        with suppress(BrokenPipeError):
            line.send(self.running[line].place)


def _begin(
    pieces: Sequence[_Piece],
    work: Callable[[_Piece], _Result],
    handlers: _Handlers,
    others: Collection[Any],
) -> tuple[int, Any]:
    """Starts a process with these handlers of signals; it works on the pieces whose places it is told."""
    sys.stdout.flush()
    sys.stderr.flush()
    ours, theirs = Pipe()
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    code = 1
    try:
        # The terminal's signals are for the parent, which passes each on once.
        os.setpgid(0, 0)
        # Otherwise no process would notice that the parent was killed.
        for line in (ours, *others):
            line.close()
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
        _serve(pieces, work, theirs)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _serve(pieces: Sequence[_Piece], work: Callable[[_Piece], _Result], line: Any) -> None:
    while True:
        try:
            place = line.recv()
        except (EOFError, ConnectionResetError, KeyboardInterrupt):
            return
        result = work(pieces[place])
        # A parent that was killed takes no result; the next read ends this process.
        with suppress(BrokenPipeError):
            line.send(result)


def _end(child: _Child, line: Any) -> str:
    """Waits for the end of a process, and returns how it ended."""
    line.close()
    _, status = os.waitpid(child.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
