"""VMA archives, written field by field as Proxmox's `vma_spec.txt` describes them; shares no code with the plugin."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

UUID = bytes(range(16, 32))
CONF = """#web, from the shop
name: web
boot: order=scsi0;net0
cores: 2
memory: 2048
ostype: l26
smbios1: uuid=421f245c-7fa8-60fa-1122-334455667788
net0: virtio=BC:24:11:01:02:03,bridge=vmbr0
scsihw: virtio-scsi-pci
scsi0: local-lvm:vm-100-disk-0,size=1M
"""


def conf_of(text: str, *keys: str) -> bytes:
    """Returns a qemu-server.conf with the lines that Proxmox adds in a backup."""
    lines = (f"#qmdump#map:{key}:{device_of(key)}:local-lvm:raw:\n" for key in keys)
    return (text + "".join(lines)).encode()


def device_of(key: str) -> str:
    return f"drive-{key}-backup" if key.startswith("tpmstate") else f"drive-{key}"


@dataclass
class Archive:
    """An archive to write. `order` are the clusters, as pairs of device number and cluster; by default all in turn."""

    disks: dict[str, bytes]
    configs: dict[str, bytes] = field(default_factory=dict)
    order: list[tuple[int, int]] | None = None
    per_extent: int = 59
    keep_zeros: bool = False
    header_padding: int = 0

    def names(self) -> list[str]:
        return list(self.disks)

    def written(self) -> bytes:
        return self.header() + b"".join(self.extents())

    def header(self) -> bytes:
        blobs = bytearray(b"\0")

        def add(data: bytes) -> int:
            at = len(blobs)
            blobs.extend(struct.pack("<H", len(data)) + data)
            return at

        names, contents, devices = [0] * 256, [0] * 256, [(0, 0)] * 256
        for number, (name, data) in enumerate(self.configs.items()):
            names[number], contents[number] = add(name.encode() + b"\0"), add(data)
        for number, (name, data) in enumerate(self.disks.items(), start=1):
            devices[number] = (add(name.encode() + b"\0"), len(data))
        blobs.extend(bytes(-len(blobs) % 512 + self.header_padding))
        head = b"VMA\0" + struct.pack(">I", 1) + UUID + struct.pack(">Q", 1_700_000_000) + bytes(16)
        head += struct.pack(">III", 12288, len(blobs), 12288 + len(blobs)) + bytes(1984)
        head += b"".join(struct.pack(">I", each) for each in names)
        head += b"".join(struct.pack(">I", each) for each in contents) + bytes(4)
        head += b"".join(struct.pack(">IIQQQ", name, 0, size, 0, 0) for name, size in devices)
        return sealed(head + bytes(blobs), 32)

    def extents(self) -> Iterable[bytes]:
        order = self.order or [
            (number, cluster)
            for number, data in enumerate(self.disks.values(), start=1)
            for cluster in range(-(-len(data) // 65536))
        ]
        for first in range(0, len(order), self.per_extent):
            yield self.extent(order[first : first + self.per_extent])

    def extent(self, clusters: list[tuple[int, int]]) -> bytes:
        entries, payload = [], bytearray()
        for number, cluster in clusters:
            data = self.disks[self.names()[number - 1]][cluster * 65536 : (cluster + 1) * 65536]
            mask = 0
            for block in range(16):
                piece = data[block * 4096 : (block + 1) * 4096]
                if piece and (self.keep_zeros or any(piece)):
                    mask |= 1 << block
                    payload += piece.ljust(4096, b"\0")
            entries.append((mask, number, cluster))
        return extent(entries, bytes(payload))


def extent(entries: list[tuple[int, int, int]], payload: bytes, *, count: int | None = None) -> bytes:
    """Returns an extent of entries: mask, device, cluster."""
    count = len(payload) // 4096 if count is None else count
    head = b"VMAE" + struct.pack(">HH", 0, count) + UUID + bytes(16)
    for number in range(59):
        mask, device, cluster = entries[number] if number < len(entries) else (0, 0, 0)
        head += struct.pack(">HBBI", mask, 0, device, cluster)
    return sealed(head, 24) + payload


def sealed(data: bytes, at: int) -> bytes:
    """Returns a header with its MD5 at the given offset."""
    blank = data[:at] + bytes(16) + data[at + 16 :]
    return data[:at] + hashlib.md5(blank).digest() + data[at + 16 :]


def disks_of(data: bytes) -> dict[str, bytes]:
    """Returns the disks in an archive, block by block."""
    size = struct.unpack(">I", data[56:60])[0]
    blobs = data[struct.unpack(">I", data[48:52])[0] :]
    found: dict[int, tuple[str, bytearray]] = {}
    for number in range(1, 256):
        name, _, length = struct.unpack(">IIQ", data[4096 + 32 * number : 4096 + 32 * number + 16])
        if name and length:
            count = struct.unpack("<H", blobs[name : name + 2])[0]
            found[number] = (blobs[name + 2 : name + 2 + count - 1].decode(), bytearray(length))
    seen, at = set(), size
    while at < len(data):
        head, at = data[at : at + 512], at + 512
        assert head[:4] == b"VMAE"
        assert sealed(head, 24) == head
        assert head[8:24] == data[8:24]
        begin = at
        for number in range(59):
            mask, _, device, cluster = struct.unpack(">HBBI", head[40 + 8 * number : 48 + 8 * number])
            if not device:
                continue
            assert (device, cluster) not in seen
            seen.add((device, cluster))
            for block in range(16):
                if mask >> block & 1:
                    where = cluster * 65536 + block * 4096
                    content = found[device][1]
                    piece = data[at : at + 4096][: max(0, len(content) - where)]
                    content[where : where + len(piece)] = piece
                    at += 4096
        assert at - begin == 4096 * struct.unpack(">H", head[6:8])[0]
    for number, (_, content) in found.items():
        assert {cluster for device, cluster in seen if device == number} == set(range(-(-len(content) // 65536)))
    return {name: bytes(content) for name, content in found.values()}
