"""Raw memory: the offset of a byte in the file is its physical address.

`pmemsave` of QEMU, dd of /dev/mem and many tools write it. The holes of the file may be zeros, or addresses without
RAM: the file does not tell, and both read as zero.
"""

from __future__ import annotations

from vmconv.plugin import Extents, File, Image, Kind, Layout, OutFile, PlanError, UsageError

_LOW = 2 << 30
"""No machine with less RAM has a gap in it, bytes."""
_DEVICES, _ABOVE = 0xFEC00000, 1 << 32
"""Where PCs have no RAM: interrupt controllers and firmware below 4 GiB."""


def read(file: File, *, snapshot: str | None = None) -> Image:
    """Returns the memory in `file`, with a warning if it may be concatenated ranges."""
    if snapshot is not None:
        raise UsageError(f"{file.name}: raw memory has no snapshots, {snapshot!r} was requested")
    return Image(
        "ram",
        file,
        file.size,
        lambda: Extents.whole(file),
        kind="memory",
        warnings=tuple(_warnings(file)),
        details=lambda: {"format-specific": {"type": "ram", "data": {"machine-state": "none"}}},
    )


def _warnings(file: File) -> list[str]:
    """Returns a warning for a file that may hold the RAM below and above a gap without the gap."""
    gap = file.data_ranges(_DEVICES, min(_DEVICES + (1 << 20), file.size)) if file.size > _DEVICES else []
    if file.size <= _LOW or (file.size > _ABOVE and not gap):
        return []
    return [
        f"{file.name}: offsets are taken for addresses; if the file is RAM without the gap below 4 GiB, as of "
        "Firecracker or a memory backend, the addresses above the gap are wrong"
    ]


def write(image: Image) -> Layout:
    """Returns the layout whose only file is the memory; offsets are addresses, so the placement has no effect."""
    table = image.stored
    if not (table.kind != Kind.HOLE).any():
        raise PlanError(f"{image.file.name}: has no RAM")
    return Layout((OutFile(table.without_holes()),))
