"""Reads a file by SFTP version 3 (draft-ietf-secsh-filexfer-02) through the system's ssh program.

The program knows the user's configuration, keys, agent, jump hosts and known hosts; nothing of that is done here. It
starts the server's subsystem, so no shell of the server sees the path.

    packet      length32 type8 id32 ...; INIT and VERSION have no id
    INIT        version32                       VERSION     version32
    OPEN        path flags32 attributes         HANDLE      handle
    FSTAT       handle                          ATTRS       flags32 [size64] [uid32 gid32] [mode32] [atime32 mtime32]
    READ        handle offset64 length32        DATA, or STATUS code32 message
"""

from __future__ import annotations

import errno
import os
import select
import struct
import subprocess
import tempfile
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from vmconv.errors import AccessError, ReadError, UsageError
from vmconv.io.schemes.pipelined import Pipelined, Request

if TYPE_CHECKING:
    from vmconv.interface.scheme import Url

PROGRAM = "ssh"
SILENCE = 30.0
"""Seconds that a server may send nothing, once it is connected."""
SLOWEST = 16 << 10
"""Bytes per second that a packet needs, after its first `SILENCE` seconds."""
SIGNING_IN = 300.0
"""Seconds until the server answers: a user may have to type a password, or to touch a key."""

_INIT, _VERSION, _OPEN, _CLOSE, _READ, _FSTAT = 1, 2, 3, 4, 5, 8
_STATUS, _HANDLE, _DATA, _ATTRS = 101, 102, 103, 105
_EOF = 1
_FOR_READING = 1
_SIZE, _OWNER, _MODE, _TIMES = 1, 2, 4, 8
_REGULAR = 0o100000
_LONGEST = 256 << 10
"""Bytes of a packet, at most."""
_READ_AT_ONCE = 32 << 10
"""Bytes that every server reads at once."""
_NAMES = {2: "no such file", 3: "permission denied", 4: "failure", 8: "not supported"}


class SftpFile(Pipelined):
    """The file that a URL names."""

    unit = _READ_AT_ONCE

    def __init__(self, url: Url) -> None:
        super().__init__(url.shown)
        _refuse_meaningless(url)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 closed with the connection
        self._handle = b""
        self._process = self._started(url)
        try:
            self._greet()
            self._handle = self._opened(url)
            self._state = self.size, modified = self._stated()
            self.version = str(modified)
        except OSError as exc:
            self._end()
            why = self._why(exc)
            self._said.close()
            raise ReadError(f"{self.shown}: {why}") from exc
        except BaseException:
            self.close()
            raise

    def _started(self, url: Url) -> subprocess.Popen[bytes]:
        from urllib.parse import unquote

        command = [PROGRAM, "-T", "-x", "-a", "-oClearAllForwardings=yes"]
        command += [f"-p{url.port}"] if url.port else []
        command += [f"-l{unquote(url.user)}"] if url.user else []
        command += ["-s", "--", url.bare_host, "sftp"]
        pipe = subprocess.PIPE
        try:
            return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._said)
        except OSError as exc:
            self._said.close()
            hint = "install an SSH client (Debian: openssh-client)"
            raise AccessError(f"{url.shown}: {PROGRAM} cannot be started: {exc.strerror}", hint=hint) from exc

    def _why(self, exc: OSError) -> str:
        """Returns what ssh said last, or else the error."""
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - 2000))
        lines = self._said.read().decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return said[:300] or ("the server is silent" if isinstance(exc, TimeoutError) else exc.strerror or str(exc))

    def _greet(self) -> None:
        self._put(bytes([_INIT]) + struct.pack(">I", 3))
        kind, answer = self._packet(SIGNING_IN)
        if kind != _VERSION or len(answer) < 4 or int.from_bytes(answer[:4]) < 3:
            raise ReadError(f"{self.shown}: is not an SFTP server of version 3")

    def _opened(self, url: Url) -> bytes:
        path = os.fsencode(url.decoded_path)
        # As in other URLs of ssh, ~ is the home directory.
        path = path.removeprefix(b"/~/") if path.startswith(b"/~/") else path
        self._put(bytes([_OPEN]) + struct.pack(">I", 0) + _text(path) + struct.pack(">II", _FOR_READING, 0))
        kind, answer = self._answer(0)
        if kind == _STATUS:
            raise AccessError(f"{self.shown}: cannot be opened: {_status(answer)}")
        length = int.from_bytes(answer[:4])
        if kind != _HANDLE or len(answer) != 4 + length or not 0 < length <= 256:
            raise ReadError(f"{self.shown}: the answer to OPEN is of type {kind}")
        return answer[4:]

    def _stated(self) -> tuple[int, int]:
        """Returns size and time of modification of the open file."""
        self._put(self._asking_for_state(0))
        kind, answer = self._answer(0)
        if kind != _ATTRS:
            raise ReadError(f"{self.shown}: the answer to FSTAT is of type {kind}")
        return self._state_in(answer)

    def _state_in(self, answer: bytes) -> tuple[int, int]:
        flags, at = int.from_bytes(answer[:4]), 4
        size, mode, modified = -1, _REGULAR, -1
        if flags & _SIZE:
            size, at = int.from_bytes(answer[at : at + 8]), at + 8
        at += 8 if flags & _OWNER else 0
        if flags & _MODE:
            mode, at = int.from_bytes(answer[at : at + 4]), at + 4
        if flags & _TIMES:
            modified, at = int.from_bytes(answer[at + 4 : at + 8]), at + 8
        if mode & 0o170000 != _REGULAR:
            raise AccessError(f"{self.shown}: is not a regular file")
        if at > len(answer) or not 0 <= size < 1 << 62:
            raise ReadError(f"{self.shown}: the server states no size of it, or {size}")
        return size, modified

    def _asking_for_state(self, number: int) -> bytes:
        return bytes([_FSTAT]) + struct.pack(">I", number) + _text(self._handle)

    # -- reading

    def read_into(self, offset: int, buffer: memoryview) -> None:
        super().read_into(offset, buffer)
        # What was read before this answer was of the version that it states.
        state = _State(offset)
        self.exchange([state], lambda number, _: self._put(self._asking_for_state(number)))
        if state.found != self._state:
            raise AccessError(
                f"{self.shown}: changed while it was being read: size and time were {self._state}, are {state.found}",
                hint="try again when nobody writes to it",
            )

    def send(self, number: int, request: Request) -> None:
        self._ask(number, request, 0)

    def _ask(self, number: int, request: Request, done: int) -> None:
        place = struct.pack(">QI", request.offset + done, len(request.buffer) - done)
        self._put(bytes([_READ]) + struct.pack(">I", number & 0xFFFFFFFF) + _text(self._handle) + place)

    def receive(self) -> None:
        kind, answer = self._packet(SILENCE)
        number, answer = int.from_bytes(answer[:4]), answer[4:]
        request = self.expected(number)
        if isinstance(request, _State) and kind == _ATTRS:
            request.found = self._state_in(answer)
            self.settled(number)
        elif kind == _STATUS:
            self.settled(number, ReadError(f"{self.shown}: cannot be read at {request.offset:#x}: {_status(answer)}"))
        elif kind == _DATA and not isinstance(request, _State):
            self._data(number, request, answer)
        else:
            raise ReadError(f"{self.shown}: the answer to a request is of type {kind}")

    def _data(self, number: int, request: Request, answer: bytes) -> None:
        """Stores what came; asks for the rest if a server sent less."""
        done = request.filled
        length = len(answer) - 4
        if int.from_bytes(answer[:4]) != length or not 0 < length <= len(request.buffer) - done:
            raise ReadError(f"{self.shown}: the server sends {length} bytes of {request.offset + done:#x}")
        request.buffer[done : done + length] = answer[4:]
        request.filled += length
        if request.filled == len(request.buffer):
            self.settled(number)
            return
        with self._sending:
            self._ask(number, request, request.filled)

    # -- packets

    def _answer(self, number: int) -> tuple[int, bytes]:
        kind, answer = self._packet(SILENCE)
        if int.from_bytes(answer[:4]) != number or len(answer) < 4:
            raise ReadError(f"{self.shown}: the server answers another request")
        return kind, answer[4:]

    def _put(self, packet: bytes) -> None:
        assert self._process.stdin is not None
        descriptor = self._process.stdin.fileno()
        data = memoryview(struct.pack(">I", len(packet)) + packet)
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        while data:
            # A server that answers without reading would fill the pipe, and a write would wait for ever.
            if not poll.poll(SILENCE * 1000):
                raise TimeoutError
            data = data[os.write(descriptor, data[: select.PIPE_BUF]) :]

    def _packet(self, silence: float) -> tuple[int, bytes]:
        """Returns type and content of the next packet."""
        length = int.from_bytes(self._take(4, silence))
        if not 1 <= length <= _LONGEST + 64:
            raise ReadError(f"{self.shown}: the server sends a packet of {length} bytes")
        data = self._take(length, SILENCE)
        return data[0], data[1:]

    def _take(self, length: int, silence: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + silence + length / SLOWEST
        data = bytearray()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while len(data) < length:
            left = min(silence, deadline - time.monotonic())
            if left <= 0 or not poll.poll(left * 1000):
                raise TimeoutError
            step = os.read(descriptor, length - len(data))
            if not step:
                raise OSError(errno.ECONNRESET, "the server closed the connection")
            data += step
        return bytes(data)

    def close(self) -> None:
        self._end()
        self._said.close()

    def _end(self) -> None:
        """Ends the connection, and waits until ssh has said what it has to say."""
        with suppress(OSError):
            if self._handle:
                self._put(bytes([_CLOSE]) + struct.pack(">I", 0) + _text(self._handle))
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _refuse_meaningless(url: Url) -> None:
    """Raises `UsageError` for a URL that names no file, or that ssh would take for options."""
    if not url.host or url.host.startswith("-") or len(url.path) < 2 or url.query or "\0" in url.decoded_path:
        raise UsageError(f"{url.shown}: is not ssh://[USER@]HOST[:PORT]/PATH")
    if url.password:
        raise UsageError(f"{url.shown}: has a password", hint="ssh asks for it, or uses a key")


class _State(Request):
    """A request for the state of the file."""

    def __init__(self, offset: int) -> None:
        super().__init__(offset, memoryview(b""))
        self.found: tuple[int, int] | None = None


def _text(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _status(answer: bytes) -> str:
    code = int.from_bytes(answer[:4])
    length = int.from_bytes(answer[4:8])
    said = " ".join(answer[8 : 8 + min(length, 200)].decode(errors="replace").split())
    return "the file ended" if code == _EOF else said or _NAMES.get(code, f"status {code}")
