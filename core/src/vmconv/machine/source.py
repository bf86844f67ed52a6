"""The source of a machine's conversion: its configuration, and the images of its disks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from vmconv.errors import PlanError, UsageError
from vmconv.inplace.settling import refuse_interrupted, settle
from vmconv.inspect import checking
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.machine.firmware import with_secure_boot
from vmconv.machine.formats import claimants, identify, refuse_result
from vmconv.machine.members import Members
from vmconv.machine.model import Disk, Machine
from vmconv.machine.secrets import without_secrets

if TYPE_CHECKING:
    from vmconv.interface.machines import MachineFormat, Manifest
    from vmconv.machine.request import Loss, MachineRequest
    from vmconv.model.extents import Extents
    from vmconv.model.image import Image
    from vmconv.model.sources import File


class Source(NamedTuple):
    """A machine that was read. `disks` opens the images of its disks; `opener` has opened all files.

    `manifest` are the digests that a package states. `secrets` are those that were left out of the machine.
    """

    machine: Machine
    format: MachineFormat
    file: File
    opener: Opener
    disks: Opener
    manifest: Manifest | None = None
    secrets: tuple[Loss, ...] = ()
    compression: str | None = None
    """How a package is compressed, whose members were not decoded yet."""

    def bytes_of(self, image: Image) -> Extents:
        """Returns the table of the file of an image: the file's own bytes, in the package if it is in one."""
        from vmconv.model.extents import Extents

        table = Extents.whole(image.file)
        return self.disks.in_package(table) if isinstance(self.disks, Members) else table

    def image(self, disk: Disk) -> Image | None:
        """Returns the image of a disk; None for a physical device, which is only named."""
        if disk.file is not None:
            image = self.disks.disk(self.file, disk.file, disk.format)
            image.warnings += tuple(checking.warnings(image, self.opener))
            return image
        if disk.device is not None:
            return None
        if disk.capacity is None:
            raise PlanError(f"{self.file.name}: a disk has neither a file nor a size")
        return _empty(self.file, disk.capacity)

    def images(self) -> list[Image | None]:
        """Returns the image of each disk. Raises `PlanError` if two disks are one file."""
        found = [self.image(disk) for disk in self.machine.disks]
        seen: dict[tuple[int, int], int] = {}
        for number, image in enumerate(found):
            for file in self._own_files(image) if image is not None else ():
                first = seen.setdefault((file.stamp.device, file.stamp.inode), number)
                if first != number:
                    # Each would become a disk of its own: what the guest writes to one would not be in the other.
                    raise PlanError(
                        f"{self.file.name}: disks[{first}] and disks[{number}] are the same file, {file.path}",
                        hint="remove one of them from a copy of the configuration",
                    )
        return found

    def _own_files(self, image: Image) -> Sequence[File]:
        """Returns the files of the top layer. Layers below may be those of several disks."""
        if self.format.is_package:
            return (image.file,)
        from vmconv.model.sources import File

        files = [image.file, *(each for each in image.guest.sources if isinstance(each, File))]
        below = {id(layer.file) for layer in image.chain() if layer is not image}
        return [file for file in files if id(file) not in below]


def _empty(file: File, capacity: int) -> Image:
    """Returns an image without content, for a disk that the configuration only describes."""
    from vmconv.model.extents import Extents
    from vmconv.model.image import Image
    from vmconv.model.planned import PlannedFile

    table = Extents.filled(capacity)
    return Image("raw", PlannedFile(f"{file.path}: empty disk", table), capacity, lambda: table)


def machine_format_of(path: str, allow_external: Iterable[str] = (), *, confined: bool = False) -> str | None:
    """Returns the name of the machine format of a configuration; None if no installed format claims its content.

    Raises `ImageError` if several formats claim it. Reads a configuration that another process writes, too.
    """
    with Opener(installed(), allow_external=tuple(allow_external), force_share=True, confined=confined) as opener:
        file = opener.referring(path)
        return identify(file, None).name if claimants(file) else None


@contextmanager
def opened(
    path: str,
    format_name: str | None = None,
    *,
    allow_external: tuple[str, ...] = (),
    force_share: bool = False,
    confined: bool = False,
) -> Iterator[Source]:
    """Yields the machine of a configuration; its files are open until the block ends.

    Raises `UsageError` if the format has no reader, `ImageError` if the configuration is damaged.
    """
    registry = installed()
    with Opener(
        registry,
        allow_external=allow_external,
        force_share=force_share,
        settle=refuse_interrupted if confined else settle,
        confined=confined,
    ) as opener:
        file = opener.referring(path)
        found = identify(file, format_name)
        if not found.can_read:
            raise UsageError(f"{found.name}: machines of this format cannot be read, only written")
        machine = found.read(file, opener)
        refuse_result(machine, Machine, found.name, "reader")
        disks = Members(registry, file, found.members(file)) if found.is_package else opener
        compression = found.compression(file) if found.is_package else None
        yield Source(machine, found, file, opener, disks, _manifest(found, file, opener), compression=compression)


def _manifest(found: MachineFormat, file: File, opener: Opener) -> Manifest | None:
    from vmconv.interface.machines import Manifest

    manifest: Any = found.manifest(file, opener)
    if manifest is not None:
        refuse_result(manifest, Manifest, found.name, "manifest")
    return cast("Manifest | None", manifest)


@contextmanager
def source_of(request: MachineRequest) -> Iterator[Source]:
    """Yields the source of a request, without secrets; its files are open until the block ends."""
    with opened(
        request.source,
        request.source_format,
        allow_external=tuple(request.allow_external),
        force_share=request.force_share,
        confined=request.confined,
    ) as source:
        machine, secrets = without_secrets(source.machine)
        yield with_secure_boot(source._replace(machine=machine, secrets=secrets))
