"""An output that is a pipe: the one file of an image, from its first byte to its last.

Bytes cannot be read back from a pipe. So the execution writes nothing, the result is verified by its planned table,
and then it is sent.
"""

from __future__ import annotations

import errno
import os
import select
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vmconv.backends.planned import PlannedOutput
from vmconv.errors import BackendError, os_errors
from vmconv.interface.backend import DEFAULT_ACCESS, Access, Backend, Capabilities, Output, Survey, Transaction
from vmconv.io.directory import Directory
from vmconv.model.plan import Plan, Progress
from vmconv.model.sources import File
from vmconv.model.view import ALIGNMENT, View, refuse_changed

_STEP = 16 << 20
_PIPE = 1 << 20
_LOOK_EVERY = 10


class StreamBackend(Backend):
    """Writes to one open descriptor; made per conversion, so not registered."""

    name = "stream"
    title = "writes to a pipe"
    automatic = False
    destination = "stream"

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def capabilities(self, directory: str) -> Capabilities:
        return Capabilities(usable=True, shares=False)

    def survey(self, directory: str, sources: Sequence[File]) -> Survey:
        return Survey(ALIGNMENT, {id(file): "a stream cannot share blocks with files" for file in sources})

    def begin(
        self, directory: Directory, *, force: bool = False, durable: bool = True, access: Access = DEFAULT_ACCESS
    ) -> Transaction:
        return self.send(access.sources)

    def send(self, sources: Sequence[File]) -> Transaction:
        """Returns a new transaction, which checks that `sources` do not change until all is sent."""
        return StreamTransaction(self.descriptor, sources)


class StreamTransaction(Transaction):
    """Sends one file after its verification."""

    def __init__(self, descriptor: int, sources: Sequence[File]) -> None:
        self.descriptor = descriptor
        self.sources = sources

    def prepare(self, plan: Plan) -> None:
        (self._file,) = plan.files

    def create(self, name: str, size: int, sources: Sequence[File]) -> Output:
        return PlannedOutput(self._file)

    def deliver(self, progress: Progress | None) -> None:
        """Sends the file. Raises `BrokenPipeError` if the reader has closed the pipe.

        On return, the reader of a pipe has read all bytes, and no source had changed until then.
        """
        _send(View(self._file.table), self.descriptor, progress)
        _wait_until_read(self.descriptor)
        for file in self.sources:
            refuse_changed(file)

    def commit(self) -> None:
        """Does nothing: all bytes are sent."""

    def abort(self) -> None:
        """Does nothing: sent bytes cannot be recalled."""


def _send(view: View, descriptor: int, progress: Progress | None) -> None:
    _enlarge(descriptor)
    for at in range(0, view.size, _STEP):
        with _written():
            view.send(descriptor, at, min(_STEP, view.size - at), _wait_for_room)
        view.refuse_changed()
        if progress:
            progress(min(at + _STEP, view.size), view.size)
    with _written():
        # Network filesystems write when a descriptor is closed, and only then report a full disk.
        os.close(os.dup(descriptor))


def _enlarge(descriptor: int) -> None:
    """Enlarges a pipe. Ignores other descriptors, and refusals: the size is limited per user."""
    import fcntl

    try:
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE)
    except OSError as exc:
        if exc.errno not in (errno.EBADF, errno.EBUSY, errno.EINVAL, errno.ENOMEM, errno.EPERM, errno.ENOSYS):
            raise BackendError(f"standard output: cannot be made a larger pipe: {exc.strerror}") from exc


@contextmanager
def _written() -> Iterator[None]:
    """Turns write errors into `BackendError`, except for `BrokenPipeError`."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise BackendError(f"standard output: cannot be written: {exc.strerror}") from exc


def _wait_for_room(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    poll.poll()


def _wait_until_read(descriptor: int) -> None:
    """Waits until a pipe is empty: sendfile puts the source's pages into it and no copies, so changes would show."""
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        return
    from fcntl import ioctl
    from termios import FIONREAD

    poll = select.poll()
    # Errors only: POLLERR tells that the reader has closed the pipe.
    poll.register(descriptor, 0)
    with os_errors("standard output: its unread bytes cannot be counted"):
        while int.from_bytes(ioctl(descriptor, FIONREAD, bytes(4)), "little"):
            if poll.poll(_LOOK_EVERY):
                break
        else:
            return
    # The reader closed the pipe before the end.
    raise BrokenPipeError
