"""A conversion whose target is a block device: what is refused, and what its plan says."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from vmconv.backends.device import HEAD
from vmconv.conversion.results import Results
from vmconv.errors import ImageError, PlanError, UsageError, VmconvError
from vmconv.model.extents import Extents
from vmconv.model.planned import PlannedFile

if TYPE_CHECKING:
    from vmconv.backends.device import DeviceBackend
    from vmconv.conversion.containers import Container
    from vmconv.conversion.request import Request
    from vmconv.io.directory import Directory
    from vmconv.io.opener import Opener
    from vmconv.model.plan import Plan


@contextmanager
def claimed(request: Request, directory: Directory, name: str) -> Iterator[DeviceBackend | None]:
    """Yields the backend of the block device `name`, claimed meanwhile; None for a request that makes files.

    Raises `UsageError` for options that do not apply to a device, `AccessError` if it is in use.
    """
    status = directory.status(name)
    if not request.no_create or (status and stat.S_ISREG(status.st_mode)):
        yield None
        return
    if status is None:
        raise PlanError(f"{request.target}: does not exist", hint="omit -n to make a file")
    if not stat.S_ISBLK(status.st_mode):
        raise PlanError(f"{request.target}: is neither a block device nor a regular file")
    _refuse_options(request)
    from vmconv.backends.device import DeviceBackend
    from vmconv.io.devices import Device

    with Device(directory, name, request.target) as device:
        yield DeviceBackend(device, reads_first=request.target_is_zero)


def _refuse_options(request: Request) -> None:
    if request.target_format is None:
        raise UsageError(
            f"{request.target}: a block device has no suffix that names a format", hint="name the format with -O"
        )
    for given, what in (
        (request.chain, "--chain"),
        (request.in_place, "--in-place"),
        (request.backing_file is not None, "a backing file"),
        (request.mode is not None, "--mode"),
        (request.blank is not None, "a new disk"),
        (request.backend != "auto", f"the backend {request.backend}"),
    ):
        if given:
            raise UsageError(f"-n writes one image into a block device: {what} does not apply")


def on_device(plan: Plan, backend: DeviceBackend, made: Sequence[Container], opener: Opener) -> Plan:
    """Returns the plan with notes on the device. Raises `PlanError` if the device cannot hold the image.

    Takes QEMU's locks on the device, after the source has taken its own.
    """
    device = backend.device
    device.refuse_sources(opener.files)
    if len(plan.files) > 1 or plan.references:
        raise PlanError(
            f"{device.path}: {made[-1].format.name} would need more than the one device",
            hint="choose another -o subformat",
        )
    if plan.files[0].allocation != "holes":
        raise UsageError(f"{device.path}: preallocation does not apply to a block device")
    size = plan.files[0].size
    if size > device.size:
        raise PlanError(f"{device.path}: has {device.size} bytes, and the image needs {size}")
    _refuse_early(made[-1], device.path)
    behind = device.size - size
    if behind:
        _refuse_unreadable(made[-1], behind, opener, device.path)
    return plan._replace(notes=(*plan.notes, *_notes(plan, device.path, behind, reads_first=backend.reads_first)))


def _notes(plan: Plan, path: str, behind: int, *, reads_first: bool) -> Iterator[str]:
    totals = plan.totals
    done = "are read, and zeroed if they are not zero" if reads_first else "are zeroed, and freed if the device can"
    yield (
        f"the content of {path} is lost: {totals.copied + totals.written} bytes are written, {totals.zero} bytes {done}"
    )
    if behind:
        yield f"{path} has {behind} bytes behind the image, which stay as they are"


def _refuse_early(made: Container, path: str) -> None:
    """Raises `PlanError` if the image looks like one before its first bytes are written."""
    table = made.layout.files[-1].table
    begins = np.zeros(1, dtype=np.int64)
    headless = table.replaced(Extents.filled(table.size), begins, begins + min(HEAD, table.size))
    if made.format.probe(PlannedFile(made.name, headless)):
        raise PlanError(
            f"{path}: this {made.format.name} has its signature at its end, and would look complete before it is",
            hint="choose another -o subformat or another format",
        )


def _refuse_unreadable(made: Container, behind: int, opener: Opener, path: str) -> None:
    """Raises `PlanError` if the image, with other bytes behind it, would not be the same disk."""
    table = made.layout.files[-1].table
    longer = table.window(0, table.size + behind)
    try:
        same = _disk(made, longer, table.size, opener) == _disk(made, table, table.size, opener)
        why = None
    except VmconvError as exc:
        same, why = False, exc
    if not same:
        raise PlanError(
            f"{path}: has {behind} bytes behind the image, where {made.format.name} looks for the end of a file",
            hint="make the device as large as the image, or choose another format",
        ) from why


def _disk(made: Container, table: Extents, end: int, opener: Opener) -> Extents:
    """Returns the guest's disk as the format's reader finds it in a file of which `end` bytes are known."""
    file = _Bounded(made.name, table, end)
    image = made.format.read(file, Results(opener.registry))
    return image.guest.through(file, table).window(0, made.disk.size).without_holes()


class _Bounded(PlannedFile):
    """A file whose bytes behind `end` are unknown. Raises `ImageError` if one is read."""

    def __init__(self, path: str, table: Extents, end: int) -> None:
        super().__init__(path, table)
        self._end_of_image = end

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > self._end_of_image:
            raise ImageError(f"{self.name}: the bytes at {offset:#x} are unknown")
        return super().read(offset, length)
