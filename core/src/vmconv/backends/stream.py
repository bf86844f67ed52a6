"""An output that is a pipe: the one file of an image, from its first byte to its last.

Nothing is written while the plan is executed. The result is verified from its table, which has its metadata and says
where its payload lies; then it is sent. What was sent cannot be looked at any more.
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
    """Writes to one open descriptor; made for it, and so registered nowhere."""

    name = "stream"
    title = "writes to a pipe"
    automatic = False

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
        """Returns a new transaction; `sources` must not change until all is sent."""
        return StreamTransaction(self.descriptor, sources)


class StreamTransaction(Transaction):
    """One file that is sent when it was verified."""

    def __init__(self, descriptor: int, sources: Sequence[File]) -> None:
        self.descriptor = descriptor
        self.sources = sources

    def prepare(self, plan: Plan) -> None:
        (self._file,) = plan.files

    def create(self, name: str, size: int, sources: Sequence[File]) -> Output:
        return PlannedOutput(self._file)

    def deliver(self, progress: Progress | None) -> None:
        """Sends the file; raises `BrokenPipeError` if the reader has gone.

        When it returns, the reader of a pipe has all bytes, and no source had changed before that.
        """
        _send(View(self._file.table), self.descriptor, progress)
        _wait_until_read(self.descriptor)
        for file in self.sources:
            refuse_changed(file)

    def commit(self) -> None:
        """Does nothing: all was sent."""

    def abort(self) -> None:
        """Does nothing: what was sent is out of reach."""


def _send(view: View, descriptor: int, progress: Progress | None) -> None:
    _enlarge(descriptor)
    for at in range(0, view.size, _STEP):
        with _written():
            view.send(descriptor, at, min(_STEP, view.size - at), _wait_for_room)
        view.refuse_changed()
        if progress:
            progress(min(at + _STEP, view.size), view.size)
    with _written():
        # Network filesystems write when any descriptor of a file is closed, and say only then that there is no room.
        os.close(os.dup(descriptor))


def _enlarge(descriptor: int) -> None:
    """Makes a pipe larger; not everything is a pipe, and not everybody may have one of this size."""
    import fcntl

    try:
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE)
    except OSError as exc:
        if exc.errno not in (errno.EBADF, errno.EBUSY, errno.EINVAL, errno.ENOMEM, errno.EPERM, errno.ENOSYS):
            raise BackendError(f"standard output: cannot be made a larger pipe: {exc.strerror}") from exc


@contextmanager
def _written() -> Iterator[None]:
    """Turns the errors of writing into `BackendError`, but for that of a pipe whose reader has gone."""
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
    """Returns when a pipe is empty: until then it may hold pages of the source's file, not copies of them."""
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        return
    from fcntl import ioctl
    from termios import FIONREAD

    poll = select.poll()
    poll.register(descriptor, 0)
    with os_errors("standard output: cannot be asked what was read of it"):
        while int.from_bytes(ioctl(descriptor, FIONREAD, bytes(4)), "little"):
            if poll.poll(_LOOK_EVERY):
                break
        else:
            return
    # Nobody is left to read what is in it.
    raise BrokenPipeError
