"""What is fuzzed: each target reads bytes of a stranger's, and may raise nothing but vmconv's own errors.

The input of a target for a format is not the image itself, which is mostly payload and zeros. It is one byte for the
sample of the conformance kit, one for how the file ends and whether checksums are made right, and then the words of the
sample's headers and tables that matter. So a mutation of the input is a change of metadata.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
import tempfile
import threading
import zlib
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import zstandard

from fuzz.machine_targets import HypervTarget, MachineTarget, NvramTarget, VmaTarget, XvaTarget, machine_formats
from fuzz.samples import extra, seal_log
from fuzz.target import Target
from support.kits import kit
from vmconv.errors import AccessError, VmconvError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.model import paths
from vmconv.model.extents import Extents, Kind
from vmconv.model.sources import Blob, File
from vmconv.testing.disks import image_file
from vmconv.testing.malformed import LARGE, Malformed, Sample

if TYPE_CHECKING:
    from vmconv.interface.format import Format
    from vmconv.model.image import Image
    from vmconv.testing import ReaderTests

_MEMORY = ("avml", "elfcore", "kdump", "libvirtsave", "lime", "qevm", "vmem", "vmrs")
_DISKS = ("qcow2", "vmdk", "vhdx", "vhd", "vdi", "parallels", "qed", "ewf", "luks", "qcow", "dmg", "cloop", "bochs")
_FORMATS = (*_DISKS, *_MEMORY)
_READ = 64 << 10
_LARGE = 5 << 20
_WORDS = 2000


_OTHER = image_file(bytes(range(256)) * 256, "other")


class _NoOthers(Opener):
    """An opener for an image in memory: what the image names is one small file, or not there."""

    def related(self, origin: File, reference: str, role: str, *, moved: bool = False) -> File:
        if reference == "other":
            return _OTHER
        # What paths of other systems mean is looked at; the files of this machine are not.
        raise AccessError(f"{origin.name}: {role} {paths.base_of(reference)!r}, {paths.is_foreign(reference)}")

    def named_parent(self, origin: File, reference: str, format_name: str | None, *, moved: bool = False) -> Image:
        return installed().formats["raw"].read(self.related(origin, reference, "backing file"), self)

    def search(self, origin: File, suffix: str) -> Iterator[tuple[str, File]]:
        yield from ()


def read_all(one: Format, file: File) -> None:
    """Does with an image what commands do: read it, its tables, a part of its payload, and check it."""
    try:
        image = one.read(file, _NoOthers(installed()))
    except VmconvError:
        return
    for use in (_look, _guest, _places, _read, one.check):
        with contextlib.suppress(VmconvError):
            use(image)


def _look(image: Image) -> None:
    dict(image.details)
    str(image.warnings), str(image.losses)
    image.disk.model_dump_json()


def _guest(image: Image) -> None:
    assert image.guest.size == image.size


def _places(image: Image) -> None:
    assert image.places.size == image.size


def _read(image: Image) -> None:
    table = image.flat
    assert table.size == image.size
    rows = (row for row in table if row.kind == Kind.DATA)
    for row in islice(rows, 64):
        assert row.source is not None
        row.source.read(row.offset, min(row.length, _READ))


class FormatTarget(Target):
    """The reader of a format, over samples of its conformance test."""

    def __init__(self, name: str) -> None:
        self._name = name

    @cached_property
    def _format(self) -> Format:
        return installed().format(self._name)

    @cached_property
    def _kit(self) -> ReaderTests:
        return kit(self._name)

    @cached_property
    def _samples(self) -> list[_Prepared]:
        samples = [*map(self._kit.sound, self._kit.each_variant()), *extra(self._name)]
        return [one for one in map(_prepared, samples) if len(one.front) <= _LARGE]

    def seeds(self) -> list[bytes]:
        return [
            bytes([number, ending]) + b"".join(one.front[at : at + 4] for at in one.words)
            for number, one in enumerate(self._samples)
            for ending in (0, 1)
        ]

    def run(self, data: bytes) -> None:
        malformed = self._image(data)
        if malformed is not None:
            read_all(self._format, malformed.file())

    def _image(self, data: bytes) -> Malformed | None:
        if len(data) < 2:
            return None
        one = self._samples[data[0] % len(self._samples)]
        ending, changed = data[1], data[2:]
        image = bytearray(one.front)
        for number, at in enumerate(one.words[: len(changed) // 4]):
            image[at : at + 4] = changed[4 * number : 4 * number + 4][: len(image) - at]
        if not ending & 1:
            if self._name == "vhdx":
                seal_log(image)
            self._kit.seal(image)
        if ending & 2:
            return Malformed(bytes(image), LARGE)
        # The rest of the byte cuts the file off.
        size = one.size - (ending >> 2) * one.size // 64
        return Malformed(bytes(image[:size]), size)


class _Prepared(NamedTuple):
    """The part of a sample up to the end of its metadata, the words of it that matter, and the size of the file."""

    front: bytes
    words: list[int]
    size: int


def _prepared(sample: Sample) -> _Prepared:
    end = min(len(sample.data), max(end for _, end in sample.metadata) + 4096)
    return _Prepared(sample.data[:end], sample.words()[:_WORDS], len(sample.data))


class BytesTarget(Target):
    """The reader of a format, over the whole file: for descriptors, which are text."""

    def __init__(self, name: str, suffix: str, seeds: list[bytes]) -> None:
        self._name = name
        self._suffix = suffix
        self._seeds = seeds

    def seeds(self) -> list[bytes]:
        return self._seeds

    def run(self, data: bytes) -> None:
        file = image_file(data, f"image{self._suffix}")
        one = installed().format(self._name)
        one.probe(file)
        read_all(one, file)


class DecompressTarget(Target):
    """A compressed download, as `--decompress` reads it."""

    def seeds(self) -> list[bytes]:
        import bz2
        import gzip
        import io
        import lzma
        import zipfile

        import zstandard

        data = bytes(5000) + bytes(range(256)) * 20
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as writer:
            writer.writestr("disk.raw", data)
        packed = [gzip.compress(data), bz2.compress(data), zstandard.compress(data), lzma.compress(data)]
        return [*packed, lzma.compress(data, lzma.FORMAT_ALONE), archive.getvalue()]

    def run(self, data: bytes) -> None:
        from vmconv.io.decompressing import Spool

        descriptor = os.memfd_create("download")
        with contextlib.closing(File("/download.raw.gz", descriptor)) as file:
            os.pwrite(descriptor, data, 0)
            file.size = len(data)
            with contextlib.suppress(VmconvError):
                Spool(tempfile.gettempdir(), 1 << 24)(file).close()


class PageTarget(Target):
    """Compressed pages of kdump files, behind a byte for their compression: each yields a page, or an error."""

    def seeds(self) -> list[bytes]:
        import cramjam
        import lzallright

        page = bytes(range(256)) * 8 + bytes(2048)
        packed = [zlib.compress(page), lzallright.LZOCompressor().compress(page)]
        packed += [bytes(cramjam.snappy.compress_raw(page)), zstandard.compress(page)]
        return [bytes([number]) + data for number, data in enumerate(packed)]

    def run(self, data: bytes) -> None:
        from vmconv_memory.pages import COMPRESSIONS, unpack

        if data:
            with contextlib.suppress(ValueError):
                flag = list(COMPRESSIONS)[data[0] % len(COMPRESSIONS)]
                assert len(unpack(flag, data[1:], 4096)) == 4096


class ProbeTarget(Target):
    """What decides the format of a file by its content."""

    def seeds(self) -> list[bytes]:
        return [FormatTarget(name)._samples[0].front[:1024] for name in _FORMATS]

    def run(self, data: bytes) -> None:
        for suffix in ("", ".raw", ".vmdk"):
            with contextlib.suppress(VmconvError):
                installed().identify(image_file(data, f"image{suffix}"))


class NbdTarget(Target):
    """The NBD server, from the client's flags on."""

    def seeds(self) -> list[bytes]:
        def option(number: int, data: bytes = b"") -> bytes:
            return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data

        def request(command: int, offset: int, length: int) -> bytes:
            return struct.pack(">IHHQQI", 0x25609513, 0, command, 7, offset, length)

        flags, none = struct.pack(">I", 3), struct.pack(">IH", 0, 0)
        query = struct.pack(">III", 0, 1, 15) + b"base:allocation"
        go = option(8) + option(10, query) + option(7, none)
        ask = [request(command, offset, 512) for command in range(9) for offset in (0, 1 << 20)]
        return [
            flags + go + b"".join(ask),
            flags + option(3) + option(6, none) + option(9, query) + option(2),
            flags + option(1) + request(0, 0, 4096) + request(0, 0, 100_000) + request(2, 0, 0),
            struct.pack(">I", 1) + option(1, b"disk") + request(1, 0, 4) + b"abcd" + request(3, 0, 0),
        ]

    def run(self, data: bytes) -> None:
        from vmconv.model.view import View
        from vmconv_view.connection import Connection

        exports = {b"disk": View(Extents.whole(Blob("disk", bytes(range(256)) * 1024)))}
        ours, theirs = socket.socketpair()
        with ours, theirs:
            client = threading.Thread(target=_talk, args=(theirs, data))
            client.start()
            try:
                with contextlib.suppress(VmconvError, OSError):
                    Connection(ours, exports).serve()
            finally:
                ours.shutdown(socket.SHUT_RDWR)
                client.join()


def _talk(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 20):
            pass


class JournalTarget(Target):
    """A journal, as `recover` reads it: the body, under a digest that is right."""

    def seeds(self) -> list[bytes]:
        import numpy as np

        from vmconv.inplace.journal import Journal, Leftover

        ranges = np.array([[0, 512], [4096, 8]], dtype=np.int64)
        pieces = np.array([[1 << 30, 4096, 0], [1 << 31, 4096, 8192]], dtype=np.int64)
        begun = Journal("disk.raw", "disk.qcow2", 1 << 20, 1 << 21, 1, ranges, bytes(520), ranges[1:], ranges)
        return [
            _body_of(journal.encode(_no_mark), _JOURNAL_HEAD)
            for journal in (
                begun,
                begun._replace(made=("disk.qcow2.vmconv-undo",), undo="disk.qcow2.vmconv-undo", mtime=5, replace=True),
                begun._replace(pieces=pieces, later=ranges, new=bytes(520), leftovers=(Leftover("x.vmdk", 9, 7),)),
                begun._replace(made=("disk.qcow2",), carried=False, owner=1000),
            )
        ]

    def run(self, data: bytes) -> None:
        from vmconv.inplace import journal

        name = "disk.raw.vmconv-journal"
        digest = hashlib.blake2b(data, digest_size=32).digest()
        whole = journal.MAGIC + struct.pack("<Q", len(data)) + digest + bytes(32) + data + digest
        for content in (whole, data):
            with _in_memory(content) as descriptor, contextlib.suppress(VmconvError):
                head = journal.read_head(descriptor, name)
                if head is not None:
                    journal.read(descriptor, name, head, name)


class UndoTarget(Target):
    """An undo file, as `undo` reads it: the body and the old bytes, under digests that are right."""

    def seeds(self) -> list[bytes]:
        import numpy as np

        from vmconv.inplace.undofile import Sibling, Undo

        ranges = np.array([[0, 512], [4096, 8]], dtype=np.int64)
        undo = Undo("disk.raw", "disk.qcow2", "raw", 1 << 20, 5, ranges, (), (), ranges)
        siblings = (Sibling("disk.vmdk", 0o644, 300),)
        old = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(820))
        return [
            _body_of(each.head(_no_mark), _UNDO_HEAD) + old
            for each in (undo, undo._replace(siblings=siblings, made=("disk-flat.vmdk",)))
        ]

    def run(self, data: bytes) -> None:
        from vmconv.inplace import undofile

        name = "disk.qcow2.vmconv-undo"
        # The old bytes begin where zstandard's magic is.
        length = data.find(b"\x28\xb5\x2f\xfd") % (len(data) + 1)
        digest = hashlib.blake2b(data[:length], digest_size=32).digest()
        stamp = undofile.Stamp(1 << 21, 5, bytes(32)).encode()
        whole = undofile.MAGIC + stamp + struct.pack("<Q", length) + digest + bytes(32) + data
        for content in (whole, data):
            with _in_memory(content) as descriptor, contextlib.suppress(VmconvError):
                head = undofile.read_head(descriptor, name)
                undofile.read_stamp(descriptor, name)
                undo = undofile.read(descriptor, name, head, name)
                with undofile.unpacked(descriptor, name, head) as following:
                    following(min(undo.restored, 1 << 20))


_JOURNAL_HEAD = 64 + 8 + 32 + 32
_UNDO_HEAD = 128 + 80 + 8 + 32 + 32


def _no_mark(_: bytes) -> bytes:
    return bytes(32)


def _body_of(encoded: bytes, head: int) -> bytes:
    return encoded[head:]


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[int]:
    """Yields the descriptor of a file with this content."""
    descriptor = os.memfd_create("fuzz")
    try:
        os.write(descriptor, content)
        yield descriptor
    finally:
        os.close(descriptor)


_VMDK = [
    b'# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType="%s"\n\n# Extent description\n'
    b'%s\n\n# The Disk Data Base\n#DDB\n\nddb.adapterType = "ide"\nddb.geometry.cylinders = "16"\n'
    b'ddb.geometry.heads = "16"\nddb.geometry.sectors = "63"\nddb.longContentID = "0123456789abcdef0123456789abcdef"\n'
    % (kind, extents)
    for kind, extents in (
        (b"monolithicFlat", b'RW 128 FLAT "other" 0'),
        (b"twoGbMaxExtentFlat", b'RW 64 FLAT "other" 0\nRW 64 FLAT "other" 64'),
        (b"twoGbMaxExtentSparse", b'RW 128 SPARSE "other"\nRW 10 ZERO'),
        (b"vmfs", b'RW 128 VMFS "other"'),
        (b"vmfsSparse", b'parentFileNameHint="other"\nRW 128 VMFSSPARSE "other"'),
        (b"custom", b'RDONLY 128 FLAT "../other" 0\nNOACCESS 1 FLAT "other"'),
    )
]

_PARALLELS = [
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Parallels_disk_image Version="1.0"><Disk_Parameters><Disk_size>128'
    b"</Disk_size><Cylinders>1</Cylinders><PhysicalSectorSize>4096</PhysicalSectorSize><LogicSectorSize>512"
    b"</LogicSectorSize><Heads>16</Heads><Sectors>32</Sectors><Padding>0</Padding><Encryption><Engine>{0}</Engine>"
    b"<Data></Data></Encryption><UID>{1}</UID><Name>x</Name></Disk_Parameters><StorageData><Storage><Start>0</Start>"
    b"<End>128</End><Blocksize>8</Blocksize><Image><GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID><Type>%s</Type>"
    b"<File>other</File></Image></Storage></StorageData><Snapshots><Shot><GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}"
    b"</GUID><ParentGUID>{00000000-0000-0000-0000-000000000000}</ParentGUID></Shot></Snapshots></Parallels_disk_image>"
    % kind
    for kind in (b"Plain", b"Compressed")
]


def targets() -> dict[str, Target]:
    """Returns all targets by name."""
    found: dict[str, Target] = {name: FormatTarget(name) for name in _FORMATS}
    found["vmdk-descriptor"] = BytesTarget("vmdk", ".vmdk", _VMDK)
    found["parallels-descriptor"] = BytesTarget("parallels", ".xml", _PARALLELS)
    found["kdump-page"] = PageTarget()
    found["decompress"] = DecompressTarget()
    found["probe"] = ProbeTarget()
    found["nbd"] = NbdTarget()
    found["journal"] = JournalTarget()
    found["undo"] = UndoTarget()
    found |= {f"machine-{name}": MachineTarget(name) for name in machine_formats()}
    found["nvram"] = NvramTarget()
    found["vma-sealed"] = VmaTarget()
    found["xva-summed"] = XvaTarget()
    found["hyperv-sealed"] = HypervTarget()
    return found
