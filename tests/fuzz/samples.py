"""Images that the conformance kit does not write: layers on a parent, compressed clusters, a log to be replayed."""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Callable, Iterator

import zstandard

from support import qcow2_images as qcow2
from vmconv.errors import VmconvError
from vmconv.interface.format import Format
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry, installed
from vmconv.model.extents import Extents, Kind
from vmconv.model.image import Image
from vmconv.model.layout import Backing, Placement
from vmconv.testing.disks import disk_of, make_in_memory, patterned, raw_disk
from vmconv.testing.malformed import Sample
from vmconv.testing.memory import MemoryFile

_KIB, _MIB = 1 << 10, 1 << 20


def extra(name: str) -> Iterator[Sample]:
    """Yields further samples of a format."""
    if installed().format(name).supports_backing:
        yield from _layers(name)
    if name == "qcow2":
        yield from _qcow2()
    if name == "vhdx":
        yield from _vhdx()


def _layers(name: str) -> Iterator[Sample]:
    """Yields an empty layer on the parent `other`, and one with some payload of its own."""
    one = installed().formats[name]
    below = _read_again(one, raw_disk(patterned(4 * _MIB, [(0, 4096)])))
    for pieces in ([], [(0, 70_000), (2 * _MIB, 4096)]):
        own = patterned(4 * _MIB, pieces)
        table = raw_disk(own).guest if pieces else Extents.filled(4 * _MIB, Kind.HOLE)
        top = disk_of(table, MemoryFile("top", 0), parent=below)
        with contextlib.suppress(VmconvError):
            layout = one.write(top, one.options()(), Placement(512, "image"), backing=Backing("other", name))
            _, files = make_in_memory(layout, top)
            rows = [row for row in layout.files[-1].table if row.source not in (None, own)]
            yield Sample(files[-1].read(0, files[-1].size), [(row.start, row.start + row.length) for row in rows])


def _read_again(one: Format, image: Image) -> Image:
    """Returns a disk as an image of a format, which has what its children need to know of it."""
    layout = one.write(image, one.options()(), Placement(512, "other"))
    _, files = make_in_memory(layout, image)
    return one.read(files[-1], Opener(Registry({one.name: one})))


def _qcow2() -> Iterator[Sample]:
    raw = b"a cluster that packs well " * (qcow2.CLUSTER // 26 + 1)
    deflate = zlib.compressobj(wbits=-12)
    packed = {
        0: deflate.compress(raw[: qcow2.CLUSTER]) + deflate.flush(),
        1: zstandard.ZstdCompressor().compress(raw[: qcow2.CLUSTER]),
    }
    place = qcow2.PAYLOAD * qcow2.CLUSTER
    for kind, data in packed.items():
        entries = [qcow2.compressed_entry(place, 2), qcow2.compressed_entry(place + 512, 1)]
        image = qcow2.image(l2=entries, payload=data, incompatible_features=qcow2.ZSTD if kind else 0)
        if kind:
            image = image[:104] + b"\1" + image[105:]
        yield _of_clusters(image)
    names = qcow2.feature_name(0, b"dirty bit")
    bitmaps = struct.pack(">IIQQ", 1, 0, 64, 3 * qcow2.CLUSTER)
    extensions = [
        qcow2.extension(qcow2.FEATURE_NAMES, names) + qcow2.extension(qcow2.BITMAPS, bitmaps),
        qcow2.extension(qcow2.ENCRYPTION, struct.pack(">QQ", place, 512)),
        qcow2.extension(qcow2.BACKING_FORMAT, b"raw"),
    ]
    for each in extensions:
        yield _of_clusters(qcow2.image(extensions=each, backing="other", autoclear_features=1))
    # A snapshot: its L1 table is the active one, its entry lies in the payload.
    head = struct.pack(">QIHHIIQII", 3 * qcow2.CLUSTER, 1, 1, 4, 0, 0, 0, 0, 16) + bytes(8)
    snapshot = head + struct.pack(">Q", 16 * qcow2.CLUSTER) + b"1name"
    yield _of_clusters(qcow2.image(payload=snapshot, nb_snapshots=1, snapshots_offset=place))
    yield _of_clusters(
        qcow2.image(
            l2=[qcow2.COPIED],
            payload=b"",
            extensions=qcow2.extension(qcow2.DATA_FILE, b"other"),
            incompatible_features=qcow2.EXTERNAL_DATA,
        )
    )


def _of_clusters(image: bytes) -> Sample:
    starts = range(0, min(len(image), 6 * qcow2.CLUSTER), qcow2.CLUSTER)
    return Sample(image, [(start, min(start + 1024, len(image))) for start in starts])


def _vhdx() -> Iterator[Sample]:
    from support import vhdx_images as kit

    places = [(0, 256), (64 * _KIB, 64 * _KIB + 128), (192 * _KIB, 192 * _KIB + 128), (_MIB, _MIB + 256)]
    places += [(_MIB + 4096, _MIB + 4352), (2 * _MIB, 2 * _MIB + 512), (2 * _MIB + 64 * _KIB, 2 * _MIB + 65 * _KIB)]
    places += [(3 * _MIB, 3 * _MIB + 128)]
    entry: Callable[..., bytes] = kit.entry
    for entries in (
        [(0, entry(5, 0, [(kit.BAT, kit.CLEAR_3)]))],
        [(0, entry(5, 0, [(kit.BAT, 4096)])), (4096, entry(6, 0, [(kit.BAT, kit.CLEAR_BOTH)]))],
        [(_MIB - 4096, entry(5, _MIB - 4096, [(kit.BAT, kit.CLEAR_3)], size=(9 * _MIB, 9 * _MIB)))],
    ):
        yield Sample(kit.dirty(kit.sample(), *entries), places)
    yield Sample(
        kit.differencing(relative_path=".\\other", parent_linkage="{26a21bda-a627-11d7-9931-806e6f6e6963}"), places
    )


def seal_log(image: bytearray) -> None:
    """Makes the checksums of a VHDX log's entries right, as far as their lengths make sense."""
    from support.vhdx_images import sealed

    for at in range(_MIB, 2 * _MIB, 4096):
        if image[at : at + 4] == b"loge":
            (length,) = struct.unpack_from("<I", image, at + 8)
            end = at + min(length, _MIB)
            image[at:end] = sealed(bytes(image[at:end]))
