"""Child: reads something from its first byte to its last, 1 MiB at a time or as said, and throws it away.

Arguments: PATH [BYTES [COLD ...]]; PATH is a file, or a socket on which an NBD server listens; COLD are files whose
pages leave the page cache first. Prints what it measured as json; start-up and negotiation are not in it.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import stat
import struct
import sys
import time

_OPTION = struct.Struct(">8sII")
_REQUEST = struct.Struct(">IHHQQI")
_EXPORT_NAME = 1
_REQUEST_MAGIC = 0x25609513
_DEPTH = 4


def main() -> None:
    path, step = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1 << 20
    for cold in sys.argv[3:]:
        descriptor = os.open(cold, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    read = _socket if stat.S_ISSOCK(os.stat(path).st_mode) else _file
    size, seconds = read(path, step)
    print(json.dumps({"inner_seconds": seconds, "bytes": size}))


def _file(path: str, step: int) -> tuple[int, float]:
    buffer = _pages(step)
    descriptor = os.open(path, os.O_RDONLY)
    size = 0
    began = time.perf_counter()
    while count := os.readv(descriptor, [buffer]):
        size += count
    return size, time.perf_counter() - began


def _pages(size: int) -> memoryview:
    """Returns memory that begins at a page, as that of dd and of QEMU does: to others the kernel copies far slower."""
    buffer = memoryview(mmap.mmap(-1, size))
    buffer[:] = bytes(size)
    return buffer


def _socket(path: str, step: int) -> tuple[int, float]:
    """Reads an NBD export with simple replies, some requests at a time, as copying programs do."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        _receive(server, bytearray(18))
        server.sendall(struct.pack(">I", 3) + _OPTION.pack(b"IHAVEOPT", _EXPORT_NAME, 0))
        header = _receive(server, bytearray(10))
        (size,) = struct.unpack(">Q", header[:8])
        buffer = _pages(step)
        began = time.perf_counter()
        asked = 0
        for at in range(0, size, step):
            while asked < min(size, at + _DEPTH * step):
                server.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, 0, 0, asked, min(step, size - asked)))
                asked += step
            if any(_receive(server, bytearray(16))[4:8]):
                sys.exit("the server refuses to read")
            _receive(server, buffer[: min(step, size - at)])
        return size, time.perf_counter() - began


def _receive(server: socket.socket, buffer: bytearray | memoryview) -> bytearray | memoryview:
    left = memoryview(buffer)
    while left:
        left = left[server.recv_into(left) :]
    return buffer


if __name__ == "__main__":
    main()
