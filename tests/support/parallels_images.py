"""Builds the bytes of small Parallels images and bundles by hand, sound or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np

from vmconv.testing import random_bytes
from vmconv_parallels import structs


def build(
    payload: dict[int, bytes], bat: list[int], *, tracks: int = 8, magic: bytes = structs.MAGIC_V2, **fields: Any
) -> bytes:
    """Returns an image as other software may write it: `payload` by byte offset in the file."""
    header: dict[str, Any] = {
        "magic": magic,
        "version": 2,
        "heads": 16,
        "cylinders": 1,
        "tracks": tracks,
        "nb_bat_entries": len(bat),
        "nb_sectors": len(bat) * tracks,
        "in_use": 0,
        "data_off": 0,
        "flags": 0,
        "ext_off": 0,
    }
    image = bytearray(structs.Header.build(header | fields) + np.array(bat, dtype="<u4").tobytes())
    for at in sorted(payload):
        image = image.ljust(at, b"\xee") + payload[at]
    return bytes(image)


BASE, MIDDLE, TOP = (f"{{{UUID(int=n)}}}" for n in (1, 2, 3))

NONE = f"{{{UUID(int=0)}}}"


def descriptor(
    storages: list[tuple[int, int, list[tuple[str, str, str]]]],
    shots: list[tuple[str, str]],
    *,
    top: str | None = TOP,
    parameters: str = "",
    size: int | None = None,
) -> str:
    """Returns a descriptor: storages as `(first sector, end, [(GUID, type, file)])`, shots as `(GUID, parent)`."""
    stored = "".join(
        f"<Storage><Start>{start}</Start><End>{end}</End><Blocksize>8</Blocksize>"
        + "".join(f"<Image><GUID>{g}</GUID><Type>{kind}</Type><File>{file}</File></Image>" for g, kind, file in images)
        + "</Storage>"
        for start, end, images in storages
    )
    tree = "".join(f"<Shot><GUID>{g}</GUID><ParentGUID>{parent}</ParentGUID></Shot>" for g, parent in shots)
    tree = (f"<TopGUID>{top}</TopGUID>" if top else "") + tree
    return (
        "<?xml version='1.0' encoding='UTF-8'?>\n<Parallels_disk_image Version='1.0'>\n<Disk_Parameters>"
        f"<Disk_size>{storages[-1][1] if size is None else size}</Disk_size><Cylinders>1</Cylinders><Heads>2</Heads>"
        f"<Sectors>16</Sectors>{parameters or '<Padding>0</Padding>'}</Disk_Parameters>\n"
        f"<StorageData>{stored}</StorageData>\n<Snapshots>{tree}</Snapshots>\n</Parallels_disk_image>\n"
    )


CHAIN = [(BASE, NONE), (MIDDLE, BASE), (TOP, MIDDLE)]


def bundle(directory: Path, base: str = "Plain") -> tuple[Path, list[bytes]]:
    """Writes a disk of four clusters in three layers; returns its descriptor and the states from base to top."""
    directory.mkdir(exist_ok=True)
    layers = [[random_bytes(4096, 10 * layer + n) for n in range(4)] for layer in range(3)]
    root = b"".join(layers[0])
    if base == "Compressed":
        root = build({4096: root}, [1, 2, 3, 4])
    (directory / "base.hds").write_bytes(root)
    # Not at the place where a run of as many clusters from 0 would end: dissect 3.21 takes both for one run.
    (directory / "middle.hds").write_bytes(build({8 * 4096: layers[1][1], 9 * 4096: layers[1][2]}, [0, 8, 9, 0]))
    (directory / "top.hds").write_bytes(build({8 * 4096: layers[2][2]}, [0, 0, 8, 0]))
    images = [(BASE, base, "base.hds"), (MIDDLE, "Compressed", "middle.hds"), (TOP, "Compressed", "top.hds")]
    path = directory / "DiskDescriptor.xml"
    path.write_text(descriptor([(0, 32, images)], CHAIN))
    states, state = [], list(layers[0])
    for replaced in ({}, {1: layers[1][1], 2: layers[1][2]}, {2: layers[2][2]}):
        state = [replaced.get(n, block) for n, block in enumerate(state)]
        states.append(b"".join(state))
    return path, states
