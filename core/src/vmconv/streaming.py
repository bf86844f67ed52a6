"""Conversion to a stream: the one file of an image, from its first byte to its last, for whoever reads a pipe.

What is sent is laid out beforehand, so its size is known. Its metadata is read back from the layout and compared with
the source before the first byte is sent; what was sent cannot be looked at any more.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from vmconv import checking
from vmconv.arguments import Verify
from vmconv.commit import Progress
from vmconv.containers import Container, Target, lay_out, new_name, parts_of, sources_of
from vmconv.conversion import Conversion, Request, Result
from vmconv.errors import BackendError, PlanError, UsageError, os_errors
from vmconv.opener import Opener
from vmconv.options import parse_options
from vmconv.planned import PlannedFile
from vmconv.planner import Plan, plan_layout
from vmconv.refusals import refuse_copies
from vmconv.registry import Registry, installed
from vmconv.storage import Survey
from vmconv.verify import chosen, refuse_impossible
from vmconv.verify import verify as verify_result
from vmconv.views import ALIGNMENT, View, refuse_changed, refuse_references, refuse_source_kept

TARGET = "-"
"""The name of standard output as a target."""

_STEP = 16 << 20
_PIPE = 1 << 20
_LOOK_EVERY = 10


class Stream(NamedTuple):
    """A conversion to a stream that was planned; its source files are open."""

    conversions: tuple[Conversion]
    plan: Plan
    opener: Opener

    @property
    def containers(self) -> list[Container]:
        """The one image."""
        return list(self.conversions[0].containers)


@contextmanager
def prepared(request: Request) -> Iterator[Stream]:
    """Yields the planned conversion; raises `PlanError` when the image would be more than one file."""
    _refuse(request)
    registry = installed()
    with request.opener(registry) as opener:
        target = _target(request, registry)
        refuse_source_kept(target.format, target.options)
        image = opener.image(request.source, request.source_format, snapshot=request.snapshot)
        image.warnings += tuple(checking.warnings(image, opener))
        (container,) = lay_out(parts_of(image, target, registry, None, chain=False), target, ALIGNMENT, registry, None)
        refuse_references(target.format, container.layout)
        if len(container.layout.files) > 1:
            raise PlanError(
                f"{target.format.name} would be {len(container.layout.files)} files, and a stream is one",
                hint="choose another -o subformat, or convert to a file",
            )
        survey = Survey(1, {id(file): "a stream cannot share blocks with files" for file in sources_of(image)})
        plan = plan_layout(container.layout, target.name, "", "stream", survey, tuple(container.losses()))
        yield Stream((Conversion(request, (container,), plan),), plan, opener)


def run(
    request: Request,
    descriptor: int,
    *,
    verify: bool | Verify = True,
    announce: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
    verifying: Progress | None = None,
) -> Result:
    """Writes the image to a descriptor and returns what was done; raises `BrokenPipeError` when its reader has gone.

    Where it returns, whoever reads a pipe has got all bytes, and no source had changed before that.
    """
    began = time.perf_counter()
    with prepared(request) as ready:
        refuse_copies(request.target, request.zero_copy, ready.plan)
        (made,) = ready.containers
        table = made.layout.files[0].table
        mode, registry = chosen(verify), ready.opener.registry
        refuse_impossible(mode, [made], registry, way="stream")
        if mode:
            verify_result([made], [PlannedFile(made.name, table)], registry, mode, verifying)
        if announce:
            announce(ready.plan)
        _send(View(table), descriptor, progress)
        _wait_until_read(descriptor)
        for file in ready.opener.files:
            refuse_changed(file)
        return Result(
            request.source,
            request.target,
            made.source.format_name,
            made.format.name,
            ready.plan.backend,
            ready.plan.totals,
            ready.plan.copies,
            ready.plan.losses,
            ready.conversions[0].warnings,
            time.perf_counter() - began,
        )


def _refuse(request: Request) -> None:
    if request.target_format is None:
        raise UsageError("a stream has no name that speaks of a format", hint="name the format with -O")
    for given, what in (
        (request.chain, "a chain"),
        (request.in_place or request.keep_undo, "in place"),
        (request.backing_file is not None or request.backing_format is not None, "a backing file"),
        (request.backend != "auto", f"the backend {request.backend}"),
    ):
        if given:
            raise UsageError(f"a stream is one image by itself: {what} makes no sense for it")


def _target(request: Request, registry: Registry) -> Target:
    """Returns what is to be made; formats that write down the name of their file are given the likely one."""
    wanted = registry.format(request.target_format or "")
    options = parse_options(wanted.options(), request.options, wanted.name)
    return Target.of(wanted, options, "", new_name(os.path.basename(request.source.rstrip("/")), wanted, registry))


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
