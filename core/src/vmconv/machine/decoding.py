"""Compressed packages: decoded once into files without a name, which the new disks share or are copied from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from vmconv.errors import os_errors
from vmconv.io.registry import installed
from vmconv.machine.firmware import with_secure_boot
from vmconv.machine.members import Members
from vmconv.model.plan import CopyReason
from vmconv.model.sources import File, stamp_of

if TYPE_CHECKING:
    from vmconv.io.directory import Directory
    from vmconv.machine.request import MachinePlan
    from vmconv.machine.source import Source
    from vmconv.model.plan import Progress, Totals


class NewFile(File):
    """A sparse file without a name that a package is decoded into; it vanishes when it is closed."""

    def __init__(self, path: str, descriptor: int, size: int) -> None:
        with os_errors("cannot be made this large", where=path):
            os.ftruncate(descriptor, size)
        super().__init__(path, descriptor)
        # Sharing its blocks writes them; nobody else needs them to be durable.
        self.settled = True

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Writes bytes inside the file; raises `BackendError` if storage fails or is full."""
        view = memoryview(data)
        with os_errors("cannot be written", where=f"{self.path} at {offset:#x}"):
            while view:
                done = os.pwrite(self.descriptor, view, offset)
                view, offset = view[done:], offset + done

    def finish(self) -> None:
        """Ends writing: from now on the file counts as changed if anybody writes to it."""
        self.stamp = stamp_of(os.fstat(self.descriptor))


@contextmanager
def decoded(source: Source, directory: Directory, progress: Progress | None) -> Iterator[Source]:
    """Yields the source with the members of a compressed package decoded, into files on the storage of `directory`.

    Raises `ImageError` if the package is damaged, `BackendError` if storage is full.
    """
    with ExitStack() as stack:

        def create(name: str, size: int) -> NewFile:
            with os_errors("no file can be made in it", where=directory.path):
                descriptor = directory.create_scratch()
            file = NewFile(os.path.join(source.file.path, name), descriptor, size)
            stack.callback(file.close)
            files.append(file)
            return file

        files: list[NewFile] = []
        members = source.format.decode(source.file, create, progress)
        for file in files:
            file.finish()
        yield with_secure_boot(source._replace(disks=Members(installed(), source.file, members)))


def undecoded_notes(source: Source, plan: MachinePlan, directory: str) -> MachinePlan:
    """Returns the plan of a compressed package before it is decoded, with what is not known yet.

    `directory` is an existing one on the storage of the target.
    """
    size = source.file.size
    text = (
        f"{source.file.name} is compressed ({source.compression}): its {size} bytes will be decoded once. What of the "
        "disks is zero is known only then, so the plan counts all bytes of the disks"
    )
    warnings = (*plan.warnings, text)
    if why := _why_twice(plan, directory):
        warnings += (f"{why}, so payload will be written twice",)
    return plan._replace(warnings=warnings)


def _why_twice(plan: MachinePlan, directory: str) -> str | None:
    """Returns why new files cannot share blocks with decoded ones; None if they can."""
    if plan.backend == "compress":
        return "the new archive is compressed"
    found = (each.capabilities(directory) for each in installed().backends.values() if each.automatic)
    return None if any(each.usable and each.shares for each in found) else f"{plan.directory} cannot share blocks"


def decoded_plan(source: Source, plan: MachinePlan) -> MachinePlan:
    """Returns the plan of a package that was decoded: shared blocks are blocks that were written then."""
    name, shared = source.file.name, plan.totals.shared
    reason = CopyReason(f"the archive is compressed ({source.compression})", shared, len(plan.disks), name, 0)
    notes = plan.notes
    if plan.totals.copied:
        notes += (
            f"payload is written twice: decoded into files without a name in {plan.directory}, and from there into the "
            "new files, which cannot share it",
        )
    return plan._replace(
        totals=_copied(plan.totals),
        disks=tuple(disk._replace(totals=_copied(disk.totals)) for disk in plan.disks),
        copies=((reason, *plan.copies) if shared else plan.copies),
        notes=notes,
    )


def _copied(totals: Totals) -> Totals:
    return totals._replace(shared=0, copied=totals.copied + totals.shared)
