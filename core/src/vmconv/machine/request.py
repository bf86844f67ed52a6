"""The request of a machine's conversion, its plan and its result."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from vmconv.errors import UsageError
from vmconv.interface.arguments import Cache, FilePath, FilePaths, Mode, Names, WriterOptions, ZeroCopy
from vmconv.model.plan import CopyReason, Totals

if TYPE_CHECKING:
    from vmconv.interface.machines import Substitution

Uuid = Literal["guest", "text"]


class MachineRequest(NamedTuple):
    """What to convert and how; the fields are named as the command line's options.

    `source` is a configuration, `target` the new configuration, or with `target_format` its directory. `options` are
    those of the machine format's writer, `disk_options` those of the disk format's.

    `chain` makes one image for each layer of a disk, instead of flattening it.

    `in_place` turns the source's own disks into the target's; their configuration stays. `keep_undo` keeps an undo file
    for each disk.

    `uuid` chooses between the UUID that the guest sees and the one that the source shows, where they differ.
    `new_identity` gives the machine a new UUID and new MAC addresses, for a clone. `strict` refuses any loss, `keep`
    losses of these fields. `from_snapshot` reads configuration and disks from a snapshot of their filesystem.

    `confined` is as in `conversion.request.Request`.
    """

    source: FilePath
    target: FilePath
    source_format: str | None = None
    target_format: str | None = None
    options: WriterOptions = MappingProxyType({})
    disk_format: str | None = None
    disk_options: WriterOptions = MappingProxyType({})
    uuid: Uuid = "guest"
    new_identity: bool = False
    chain: bool = False
    in_place: bool = False
    keep_undo: bool = False
    strict: bool = False
    keep: Names = ()
    backend: str = "auto"
    zero_copy: ZeroCopy = "auto"
    cache: Cache = "writeback"
    force: bool = False
    force_share: bool = False
    allow_external: FilePaths = ()
    mode: Mode | None = None
    from_snapshot: str | None = None
    confined: bool = False

    def located(self) -> MachineRequest:
        """Returns the request with the path of the configuration in the snapshot that it is read from."""
        if self.from_snapshot is None:
            return self
        if self.in_place:
            raise UsageError("--in-place: a snapshot is never changed", hint="omit --from-snapshot or --in-place")
        from vmconv.io.snapshots import in_snapshot

        return self._replace(source=in_snapshot(self.source, self.from_snapshot).path, from_snapshot=None)


class Loss(NamedTuple):
    """A stated field that the target does not get: its path, its value in words, and the reason."""

    path: str
    value: str
    reason: str


class MachinePlan(NamedTuple):
    """What becomes of each setting, and of each disk.

    `carried` are paths of fields that stay as they are. `opened` are the real paths of the source's files. `digested`
    are bytes of payload that are read for the digests of a package.
    """

    source_format: str
    target_format: str
    directory: str
    carried: tuple[str, ...]
    substitutions: tuple[Substitution, ...]
    losses: tuple[Loss, ...]
    disks: tuple[DiskPlan, ...]
    files: tuple[str, ...]
    backend: str
    totals: Totals
    copies: tuple[CopyReason, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()
    opened: tuple[str, ...] = ()
    digested: int = 0


class DiskPlan(NamedTuple):
    """One disk: its file in the source, the new file, their formats, and the bytes by action."""

    source: str
    source_format: str
    target: str
    target_format: str
    totals: Totals
    losses: tuple[str, ...]


class MachineResult(NamedTuple):
    """The outcome of a conversion: its plan, the new configuration, and seconds."""

    source: str
    target: str
    plan: MachinePlan
    seconds: float
