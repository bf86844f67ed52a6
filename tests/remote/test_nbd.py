"""Sources at nbd://: servers of other programs, and servers that lie."""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

import vmconv
from support.daemons import free_port, running
from support.disks import MIB, QemuImg
from support.requirements import oracle_program
from support.web import sparse_disk
from vmconv.errors import AccessError, ReadError, UsageError, VmconvError
from vmconv.interface.scheme import parse_url
from vmconv.io.schemes import nbd
from vmconv.io.schemes.secured import SecuredSocket

GIB = 1 << 30


@contextmanager
def qemu_nbd(directory: Path, image: Path, *options: str) -> Iterator[str]:
    path = directory / "nbd.sock"
    with running([oracle_program("qemu-nbd"), "-r", "-t", "-k", path, *options, image], path):
        yield f"nbd+unix:///?socket={quote(str(path))}"


def test_an_export_of_qemu_is_read_with_its_holes(tmp_path: Path, qemu_img: QemuImg) -> None:
    raw = sparse_disk(tmp_path / "disk.raw", 8 * GIB, [(0, 3 * MIB), (5 * GIB, 40 * MIB), (8 * GIB - MIB, MIB)])
    with qemu_nbd(tmp_path, raw, "-f", "raw") as url:
        result = vmconv.convert(url, tmp_path / "made.qcow2", source_format="raw")
        # qemu-nbd reports holes as the filesystem has them.
        assert result.totals.copied == 44 * MIB
        assert vmconv.info(url, format_name="raw")["actual-size"] == 44 * MIB
        assert [(row.start, row.length) for row in vmconv.map_disk(url, format_name="raw") if not row.zero] == [
            (0, 3 * MIB),
            (5 * GIB, 40 * MIB),
            (8 * GIB - MIB, MIB),
        ]
    qemu_img("compare", raw, tmp_path / "made.qcow2")


def test_an_image_of_another_format_is_read_through_an_export(tmp_path: Path, qemu_img: QemuImg) -> None:
    raw = sparse_disk(tmp_path / "disk.raw", 8 * MIB, [(MIB, MIB)])
    qemu_img("convert", "-O", "qcow2", raw, tmp_path / "disk.qcow2")
    with qemu_nbd(tmp_path, tmp_path / "disk.qcow2", "-f", "raw") as url:
        assert vmconv.compare(url, raw, left_format="qcow2")


@pytest.mark.parametrize("options", [["--no-sr"], []], ids=["simple", "structured"])
def test_nbdkit_is_read_by_tcp_under_a_name(tmp_path: Path, options: list[str]) -> None:
    raw = sparse_disk(tmp_path / "disk.raw", 24 * MIB, [(0, 9 * MIB), (20 * MIB, MIB)])
    port = free_port()
    command = [oracle_program("nbdkit"), "-f", "-r", "-i", "127.0.0.1", "-p", str(port), *options]
    with running([*command, "file", f"dir={tmp_path}"], port):
        made = tmp_path / "made.vhdx"
        vmconv.convert(f"nbd://127.0.0.1:{port}/disk.raw", made)
        assert vmconv.compare(made, raw)
        with pytest.raises(AccessError, match="the server refuses"):
            vmconv.info(f"nbd://127.0.0.1:{port}/other.raw")
        with pytest.raises(AccessError, match="the server has no TLS"):
            vmconv.info(f"nbds://127.0.0.1:{port}/disk.raw")


def test_our_own_server_is_read(tmp_path: Path) -> None:
    import sys

    raw = sparse_disk(tmp_path / "disk.raw", 8 * MIB, [(MIB, MIB)])
    path = tmp_path / "nbd.sock"
    with running([sys.executable, "-m", "vmconv", "serve", "-t", "-k", path, raw], path):
        result = vmconv.convert(f"nbd+unix:///?socket={path}", tmp_path / "made.raw", source_format="raw")
    assert result.totals.copied == MIB
    assert subprocess.run(["cmp", raw, tmp_path / "made.raw"], check=False).returncode == 0


def certificates(directory: Path) -> Path:
    """Makes a certificate of `localhost` that is its own authority, where nbdkit expects the files."""
    directory.mkdir()
    command = [oracle_program("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(directory / "server-key.pem"), "-out", str(directory / "server-cert.pem")]
    subprocess.run([*command, *subject, *files], check=True, capture_output=True)
    shutil.copy(directory / "server-cert.pem", directory / "ca-cert.pem")
    return directory


def test_an_export_is_read_over_tls_by_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = sparse_disk(tmp_path / "disk.raw", 64 * MIB, [(0, 48 * MIB)])
    keys = certificates(tmp_path / "keys")
    port = free_port()
    command = [oracle_program("nbdkit"), "-f", "-r", "-i", "127.0.0.1", "-p", str(port)]
    with running([*command, "--tls=require", f"--tls-certificates={keys}", "file", raw], port):
        url = f"nbds://localhost:{port}/"
        with pytest.raises(AccessError, match="its certificate is refused"):
            vmconv.info(url, format_name="raw")
        monkeypatch.setenv("SSL_CERT_FILE", str(keys / "ca-cert.pem"))
        export = nbd.NbdExport(parse_url(url))
        buffers = [bytearray(6 * MIB) for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            read = pool.map(lambda n: export.read_into(n * 6 * MIB, memoryview(buffers[n])), range(8))
            assert list(read) == [None] * 8
        export.close()
        vmconv.convert(url, tmp_path / "made.qcow2", source_format="raw")
    assert b"".join(buffers) == raw.read_bytes()[: 48 * MIB]
    assert vmconv.compare(tmp_path / "made.qcow2", raw)


def test_a_server_that_leaves_during_the_handshake_of_tls_is_an_error(tmp_path: Path) -> None:
    for answer in (b"", b"\x15\x03\x03\x00\x02\x02\x28", b"plain text"):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(answer)
            theirs.shutdown(socket.SHUT_WR)
            with pytest.raises(OSError):
                SecuredSocket(ours, "localhost")


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("nbd:///x", UsageError),
        ("nbd+unix:///x", UsageError),
        ("nbd+unix:///x?socket=", UsageError),
        ("nbd+unix://host/x?socket=/nowhere", UsageError),
        ("nbd+unix:///x?socket=/nowhere", ReadError),
        ("nbd://127.0.0.1:1/x", ReadError),
    ],
)
def test_a_url_without_a_server_is_an_error(url: str, error: type[VmconvError]) -> None:
    with pytest.raises(error) as caught:
        vmconv.info(url)
    assert "\n" not in str(caught.value)


# -- servers that lie

HELLO = struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 3)
CONTEXT = struct.pack(">I", 7) + b"base:allocation"
Answer = Callable[[socket.socket, int, int, int], None]


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x0003E889045565A9, option, kind, len(data)) + data


def take(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        step = connection.recv(length - len(data))
        if not step:
            raise EOFError
        data += step
    return data


def chunk(number: int, kind: int, data: bytes, *, done: bool = True) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, done, kind, number, len(data)) + data


@contextmanager
def lying(directory: Path, answer: Answer, size: int = MIB, hello: bytes = HELLO, contexts: int = 0) -> Iterator[str]:
    """A server of zeros that answers requests by `answer(connection, kind, cookie, length)`."""
    path = directory / "nbd.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                connection.sendall(hello)
                take(connection, 4)
                while True:
                    _, option, length = struct.unpack(">QII", take(connection, 16))
                    take(connection, length)
                    if option == 10:
                        connection.sendall(reply(option, 4, struct.pack(">I", 9) + b"other") * contexts)
                        connection.sendall(reply(option, 4, CONTEXT))
                    if option == 7:
                        connection.sendall(reply(option, 3, struct.pack(">HQH", 0, size, 3)))
                    connection.sendall(reply(option, 1))
                    if option == 7:
                        break
                while True:
                    _, _, kind, number, _, length = struct.unpack(">IHHQQI", take(connection, 28))
                    answer(connection, kind, number, length)
            except (EOFError, OSError):
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"nbd+unix:///?socket={path}"
    finally:
        # A server that no client has reached still waits.
        with socket.socket(socket.AF_UNIX) as late:
            late.connect_ex(str(path))
        thread.join()
        listener.close()


def status(connection: socket.socket, number: int, length: int) -> None:
    connection.sendall(chunk(number, 5, struct.pack(">III", 7, length, 0)))


def reading(answer: Callable[[int, int], bytes]) -> Answer:
    def respond(connection: socket.socket, kind: int, number: int, length: int) -> None:
        if kind == 7:
            status(connection, number, length)
        else:
            connection.sendall(answer(number, length))

    return respond


def stating(answer: Callable[[int, int], bytes]) -> Answer:
    return lambda connection, _, number, length: connection.sendall(answer(number, length))


ANSWERS: dict[str, tuple[Answer, str]] = {
    "another request": (reading(lambda n, _: chunk(n + 9, 0, b"")), "which was not made"),
    "no magic": (reading(lambda *_: bytes(64)), "begins with 0x0"),
    "an error": (reading(lambda n, _: struct.pack(">IIQ", 0x67446698, 5, n)), "Input/output error"),
    "an error chunk": (reading(lambda n, _: chunk(n, 1 << 15 | 1, struct.pack(">IH", 5, 0))), "Input/output error"),
    "nothing": (reading(lambda n, _: chunk(n, 0, b"")), "has nothing, or something twice, at 0x0"),
    "half": (reading(lambda n, size: chunk(n, 2, struct.pack(">QI", 0, size // 2))), "something twice"),
    "the same twice": (
        reading(
            lambda n, size: b"".join(chunk(n, 2, struct.pack(">QI", 0, size // 2), done=done) for done in (False, True))
        ),
        "something twice",
    ),
    "too much": (reading(lambda n, size: chunk(n, 2, struct.pack(">QI", 0, size + 1))), "were not asked for"),
    "too long": (reading(lambda n, _: chunk(n, 1, bytes(8) + bytes(MIB * 3))), "were not asked for"),
    "the same again and again": (
        reading(lambda n, size: b"".join(chunk(n, 2, struct.pack(">QI", 0, size // 2), done=False) for _ in range(9))),
        "were not asked for",
    ),
    "an unknown chunk": (reading(lambda n, _: chunk(n, 77, b"x")), "of type 0x4d"),
    "status of nothing": (stating(lambda n, _: chunk(n, 5, struct.pack(">III", 7, 0, 0))), "says too little"),
    "status of another context": (stating(lambda n, _: chunk(n, 5, struct.pack(">III", 8, 1, 0))), "another context"),
    "status that is torn": (stating(lambda n, _: chunk(n, 5, bytes(7))), "has 7 bytes"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_a_wrong_answer_is_an_error_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(nbd, "_MOST_ASKED", 100)
    answer, said = ANSWERS[case]
    made = tmp_path / "made.raw"
    with lying(tmp_path, answer) as url, pytest.raises(ReadError, match=said) as caught:
        vmconv.convert(url, made, source_format="raw")
    assert "\n" not in str(caught.value)
    assert not made.exists()


def test_of_too_many_ranges_the_rest_counts_as_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server must not decide how much memory the list of its ranges takes."""
    monkeypatch.setattr(nbd, "_MOST_RANGES", 10)
    asked = 0

    def answer(number: int, length: int) -> bytes:
        nonlocal asked
        asked += 1
        # Data and a hole in turn.
        return chunk(number, 5, struct.pack(">I", 7) + struct.pack(">II", 512, 0) + struct.pack(">II", 512, 3))

    with lying(tmp_path, stating(answer)) as url:
        export = nbd.NbdExport(parse_url(url))
        found = export.data_ranges(0, MIB)
        export.close()
    assert found == [*((at * 1024, at * 1024 + 512) for at in range(11)), (11 * 1024, MIB)]
    # The last one says that the client goes.
    assert asked == 12


def test_an_endless_list_of_contexts_is_an_error(tmp_path: Path) -> None:
    with lying(tmp_path, reading(lambda *_: b""), contexts=100) as url, pytest.raises(ReadError, match="is of type 4"):
        vmconv.info(url, format_name="raw")


def test_a_server_that_drips_is_too_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd, "SILENCE", 0.3)
    monkeypatch.setattr(nbd, "SLOWEST", 1 << 30)

    def drip(connection: socket.socket, kind: int, number: int, length: int) -> None:
        connection.sendall(struct.pack(">IIQ", 0x67446698, 0, number))
        for _ in range(1000):
            connection.sendall(b"x")
            time.sleep(0.0005)

    with lying(tmp_path, drip) as url:
        export = nbd.NbdExport(parse_url(url))
        with pytest.raises(ReadError, match="the server is silent"):
            export.read_into(0, memoryview(bytearray(4096)))
        export.close()


OTHERS = {"zero": bytes(18), "old": HELLO[:16] + b"\0\0", "web": b"HTTP/1.1 400 Bad Request"}


@pytest.mark.parametrize("hello", OTHERS.values(), ids=OTHERS)
def test_another_server_is_refused(tmp_path: Path, hello: bytes) -> None:
    with lying(tmp_path, reading(lambda *_: b""), hello=hello) as url, pytest.raises(ReadError, match="newstyle"):
        vmconv.info(url, format_name="raw")


@pytest.mark.parametrize("size", [1 << 63, (1 << 64) - 1])
def test_an_absurd_size_is_refused(tmp_path: Path, size: int) -> None:
    with lying(tmp_path, reading(lambda *_: b""), size=size) as url, pytest.raises(ReadError, match="states no size"):
        vmconv.info(url, format_name="raw")


def test_a_silent_server_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd, "SILENCE", 0.1)
    with lying(tmp_path, reading(lambda *_: b"")) as url, pytest.raises(ReadError, match="the server is silent"):
        vmconv.convert(url, tmp_path / "made.raw", source_format="raw")
