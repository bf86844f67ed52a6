"""Internal snapshots of a qcow2 image: taken, deleted, applied.

Each edit changes the snapshot table and the header, and copies an L1 table. The reference counts follow from the tables
(`vmconv_qcow2.refcounts`).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

import numpy as np

from vmconv.plugin import Draft, Image, PlanError, SnapshotChange, Structure, UsageError
from vmconv_qcow2 import structs
from vmconv_qcow2.header import Header, Snapshot, read_header, read_snapshots
from vmconv_qcow2.refcounts import Space, opened, settle

_MOST_NAME = 255
"""QEMU's limit, bytes."""


def change_snapshots(image: Image, change: SnapshotChange) -> Draft:
    """Returns the file after a change of its internal snapshots."""
    header, draft = read_header(image.file), Draft(image.file)
    _refuse(header)
    snapshots, space = list(read_snapshots(header)), opened(draft, header.size)
    entries = _entries(header, snapshots)
    if change.verb == "create":
        _write_table(draft, header, space, [*entries, _new_entry(draft, header, space, snapshots, change)])
    elif change.verb == "delete":
        found = _named(header, snapshots, change.name, by_id_first=False)
        _write_table(
            draft, header, space, [entry for entry, one in zip(entries, snapshots, strict=True) if one != found]
        )
    else:
        _apply(draft, header, space, _named(header, snapshots, change.name, by_id_first=True))
    settle(draft, space, read_header(draft).size)
    return draft


def _refuse(header: Header) -> None:
    name = header.file.name
    if header.incompatible & structs.EXTERNAL_DATA:
        raise PlanError(f"{name}: an image with a data file has no internal snapshots: its clusters are not counted")
    if header.incompatible & structs.CORRUPT:
        raise PlanError(f"{name}: is marked corrupt", hint=f"vmconv check -r all {header.file.path}")


def _named(header: Header, snapshots: Sequence[Snapshot], wanted: str, *, by_id_first: bool) -> Snapshot:
    """Returns the snapshot with this name or id; as in qemu-img, which of both comes first depends on the verb."""
    names, ids = ([one for one in snapshots if getattr(one, field) == wanted] for field in ("name", "id"))
    found = [*ids, *names] if by_id_first else [*names, *ids]
    if not found:
        have = ", ".join(f"{one.id} ({one.name})" for one in snapshots[:20]) or "none"
        raise UsageError(f"{header.file.name}: no snapshot {wanted!r}", hint=f"its snapshots: {have}")
    return found[0]


# -- the table


def _entries(header: Header, snapshots: Sequence[Snapshot]) -> list[bytes]:
    """Returns the entries of the snapshot table as they are, whatever their extra data is."""
    entries, at = [], header.snapshots_offset
    for one in snapshots:
        entries.append(header.file.read(at, one.end - at))
        at = -(-one.end // 8) * 8
    return entries


def _write_table(draft: Draft, header: Header, space: Space, entries: Sequence[bytes]) -> None:
    """Writes a snapshot table to another place. The old one must stay until it is not referred to."""
    table = b"".join(entry + bytes(-len(entry) % 8) for entry in entries)
    for count, most, what in (
        (len(entries), structs.MAX_SNAPSHOTS, "snapshots"),
        (len(table), structs.MAX_SNAPSHOT_TABLE, "bytes of snapshot table"),
    ):
        if count > most:
            raise PlanError(f"{header.file.name}: {count} {what}, {most} at most")
    offset = 0
    if table:
        offset = space.take(-(-len(table) // header.cluster_size))
        draft.write(offset, table.ljust(-(-len(table) // header.cluster_size) * header.cluster_size, b"\0"))
    place = Structure(draft, structs.HeaderV2).offset_of("nb_snapshots")
    draft.write(place, struct.pack(">IQ", len(entries), offset))


def _new_entry(
    draft: Draft, header: Header, space: Space, snapshots: Sequence[Snapshot], change: SnapshotChange
) -> bytes:
    name = os.fsencode(change.name)
    if not 0 < len(name) <= _MOST_NAME:
        raise UsageError(f"{header.file.name}: a snapshot name of {len(name)} bytes, 1 to {_MOST_NAME} are possible")
    number = str(
        1 + max((int(one.id) for one in snapshots if one.id.isascii() and one.id.isdigit()), default=0)
    ).encode()
    seconds, nanoseconds = divmod(change.time, 10**9)
    head = {
        "l1_table_offset": _copied_l1(draft, header.l1_offset, header.l1_size, space),
        "l1_size": header.l1_size,
        "id_size": len(number),
        "name_size": len(name),
        "date_sec": seconds & 0xFFFFFFFF,
        "date_nsec": nanoseconds,
        "vm_clock_nsec": 0,
        "vm_state_size": 0,
        "extra_data_size": structs.SNAPSHOT_EXTRA_LENGTH + 8,
    }
    extra = structs.SnapshotExtra.build({"vm_state_size": 0, "disk_size": header.size})
    icount = structs.NO_ICOUNT.to_bytes(8, "big")
    return b"".join([structs.SnapshotHeader.build(head), extra, icount, number, name])


def _copied_l1(draft: Draft, offset: int, size: int, space: Space) -> int:
    """Returns the offset of a copy of an L1 table. Its tables have several references then, so none is COPIED."""
    if not size:
        return 0
    if size * 8 > structs.MAX_L1_BYTES:
        raise PlanError(f"{draft.name}: an L1 table of {size} entries, {structs.MAX_L1_BYTES // 8} at most")
    raw = np.frombuffer(draft.read(offset, size * 8), dtype=">u8")
    data = (raw & np.uint64(~structs.COPIED & 0xFFFFFFFFFFFFFFFF)).astype(">u8").tobytes()
    clusters = -(-len(data) // space.cluster)
    place = space.take(clusters)
    draft.write(place, data.ljust(clusters * space.cluster, b"\0"))
    return place


def _apply(draft: Draft, header: Header, space: Space, chosen: Snapshot) -> None:
    if header.bitmaps is not None and header.bitmaps.nb_bitmaps:
        raise PlanError(
            f"{header.file.name}: its bitmaps would not have what a snapshot changes", hint="vmconv bitmap --remove"
        )
    if chosen.l1_size < -(-chosen.disk_size // (header.cluster_size * header.l2_entries)):
        raise PlanError(f"{header.file.name}: the L1 table of snapshot {chosen.name!r} is too short for its disk")
    head = Structure(draft, structs.HeaderV2)
    draft.write(head.offset_of("size"), chosen.disk_size.to_bytes(8, "big"))
    draft.write(head.offset_of("l1_size"), chosen.l1_size.to_bytes(4, "big"))
    place = _copied_l1(draft, chosen.l1_offset, chosen.l1_size, space)
    draft.write(head.offset_of("l1_table_offset"), place.to_bytes(8, "big"))
