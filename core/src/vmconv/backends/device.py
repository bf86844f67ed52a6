"""An output that is a block device: its content is replaced, and its first bytes are written last.

A device has no temporary name. So its head, where all formats and partition tables have theirs, is zero until all else
is written, synced and verified: an interrupted run does not look like a disk.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import suppress

from vmconv.backends.direct import DirectDevice
from vmconv.backends.writing import DescriptorOutput
from vmconv.errors import BackendError, ImageError, VerifyError, os_errors
from vmconv.interface.backend import DEFAULT_ACCESS, Access, Backend, Capabilities, Output, Survey, Transaction
from vmconv.io.devices import Device
from vmconv.io.directory import Directory
from vmconv.model.plan import ShareSteps
from vmconv.model.sources import File, Source
from vmconv.system import linux

HEAD = 1 << 20
"""Bytes that are written last. Partition tables and the headers of all formats are there."""

_SMALLEST = 4096
_STEP = 1 << 20
# man 2 fallocate; EINVAL and EPERM are those of kernels and seccomp filters without it.
_CANNOT_ZERO = linux.NOT_SUPPORTED | {errno.EINVAL, errno.EPERM, errno.ENODEV}


class DeviceBackend(Backend):
    """Writes to one block device; made per conversion, so not registered."""

    name = "device"
    title = "writes to a block device"
    automatic = False
    destination = "device"

    def __init__(self, device: Device, *, reads_first: bool) -> None:
        """With `reads_first`, what reads as zero is not zeroed."""
        self.device = device
        self.reads_first = reads_first

    def capabilities(self, directory: str) -> Capabilities:
        return Capabilities(usable=True, shares=False)

    def survey(self, directory: str, sources: Sequence[File]) -> Survey:
        reason = f"{self.device.path} is a block device, which shares nothing with files"
        return Survey(1, {id(file): reason for file in sources})

    def begin(
        self, directory: Directory, *, force: bool = False, durable: bool = True, access: Access = DEFAULT_ACCESS
    ) -> Transaction:
        return DeviceTransaction(self.device, durable=durable, reads_first=self.reads_first)


class DeviceTransaction(Transaction):
    """One output: the device. `left` says what an interrupted run leaves on it."""

    def __init__(self, device: Device, *, durable: bool, reads_first: bool) -> None:
        self.device = device
        self.durable = durable
        self.reads_first = reads_first
        self._output: DeviceOutput | None = None

    def create(self, name: str, size: int, sources: Sequence[File]) -> Output:
        descriptor = self.device.open_for_writing()
        self._output = DeviceOutput(self.device, descriptor, size, durable=self.durable, reads_first=self.reads_first)
        self.left = f"{self.device.path} holds no disk now: its first bytes are zero"
        return self._output

    def commit(self) -> None:
        if self._output:
            self._output.appear()
        self.left = None

    def abort(self) -> None:
        """Closes the device; written bytes stay."""
        output, self._output = self._output, None
        if output:
            output.close()


class DeviceOutput(DescriptorOutput):
    """A block device that is written, its head in memory until `appear`."""

    reads_as_zero = False

    def __init__(self, device: Device, descriptor: int, size: int, *, durable: bool, reads_first: bool) -> None:
        super().__init__(device.path, descriptor, size, durable=durable)
        self._reads_first = reads_first
        self.head = bytearray(min(HEAD, size))
        # Through the page cache, closing the device would write all of it, slower.
        self._direct = DirectDevice(descriptor)
        self._block = max(_SMALLEST, device.block)
        self._ways: list[Callable[[int, int], None]] = [self._free, self._zero]

    def share(self, steps: ShareSteps) -> None:
        super().share(steps)
        self._write_head(bytes(len(self.head)))

    def write(self, offset: int, data: bytes) -> None:
        held = self._held(offset, len(data))
        self.head[offset : offset + held] = data[:held]
        if held < len(data):
            super().write(offset + held, data[held:])

    def copy(self, source: Source, source_offset: int, offset: int, length: int) -> None:
        held = self._held(offset, length)
        if held:
            source.read_into(source_offset, memoryview(self.head)[offset : offset + held])
        if held < length:
            super().copy(source, source_offset + held, offset + held, length - held)

    def _held(self, offset: int, length: int) -> int:
        """Returns the bytes of a range that belong to the head."""
        return max(0, min(length, len(self.head) - offset))

    def zero(self, offset: int, length: int) -> None:
        end = offset + length
        offset = min(end, max(offset, len(self.head)))
        first = min(end, -(-offset // self._block) * self._block)
        last = max(first, end // self._block * self._block)
        self._write_zeros(offset, first - offset)
        step = _STEP if self._reads_first else max(1, last - first)
        for at in range(first, last, step):
            if not (self._reads_first and self._is_zero(at, min(step, last - at))):
                self._clear(at, min(step, last - at))
        self._write_zeros(last, end - last)

    def _is_zero(self, offset: int, length: int) -> bool:
        return linux.read_at(self.descriptor, length, offset) == bytes(length)

    def _clear(self, offset: int, length: int) -> None:
        """Zeroes whole blocks by the first way that the device has."""
        while self._ways:
            try:
                return self._ways[0](offset, length)
            except OSError as exc:
                if exc.errno not in _CANNOT_ZERO:
                    raise
                del self._ways[0]
        return self._write_zeros(offset, length)

    def _free(self, offset: int, length: int) -> None:
        linux.zero_device(self.descriptor, offset, length, free=True)

    def _zero(self, offset: int, length: int) -> None:
        linux.zero_device(self.descriptor, offset, length, free=False)

    def _write_zeros(self, offset: int, length: int) -> None:
        for at in range(0, length, _STEP):
            self._write(offset + at, [bytes(min(_STEP, length - at))])

    def finish(self) -> File:
        self._flush()
        self.file = _Unfinished(self.path, os.dup(self.descriptor), self.head, self.size)
        return self.file

    def _flush(self) -> None:
        if self.durable:
            os.fsync(self.descriptor)

    def appear(self) -> None:
        """Writes the head and reads it back. Raises `BackendError`."""
        try:
            with os_errors("cannot be written", BackendError, where=self.path):
                self._write_head(bytes(self.head))
                # Only advice: the head may come from the page cache then.
                with suppress(OSError):
                    os.posix_fadvise(self.descriptor, 0, len(self.head), os.POSIX_FADV_DONTNEED)
                if linux.read_at(self.descriptor, len(self.head), 0) != self.head:
                    raise VerifyError(f"{self.path}: its first {len(self.head)} bytes are not those that were written")
        except BackendError:
            # Half a head must not look like a whole one.
            with suppress(OSError):
                self._write_head(bytes(len(self.head)))
            raise

    def _write_head(self, head: bytes) -> None:
        self._write(0, [head])
        self._flush()

    def close(self) -> None:
        super().close()
        linux.close(self.descriptor)
        self.descriptor = -1


class _Unfinished(File):
    """The image on a device as it will be: its head comes from memory, and it ends before the device does."""

    def __init__(self, path: str, descriptor: int, head: bytes | bytearray, size: int) -> None:
        super().__init__(path, descriptor)
        self.settled = True
        self.size = size
        self._head = head

    def _refuse_past_end(self, offset: int, length: int) -> None:
        if offset < 0 or offset + length > self.size:
            raise ImageError(f"{self.name}: ends at {self.size:#x} where {length} bytes from {offset:#x} were expected")

    def read(self, offset: int, length: int) -> bytes:
        self._refuse_past_end(offset, length)
        front = bytes(self._head[offset : offset + length])
        if len(front) == length:
            return front
        return front + super().read(offset + len(front), length - len(front))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset < len(self._head):
            buffer[:] = self.read(offset, len(buffer))
        else:
            self._refuse_past_end(offset, len(buffer))
            super().read_into(offset, buffer)
