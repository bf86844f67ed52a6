"""`vmconv serve`: exports over NBD, read by QEMU, by libnbd, and by a client that knows how not to behave."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vmconv
from support.disks import MIB, QemuImg, make_disk, qemu_io
from support.nbd import (
    ABORT,
    BLOCK_STATUS,
    CACHE,
    DISC,
    EXPORT_NAME,
    FLUSH,
    GO,
    INFO,
    LIST,
    PATIENCE,
    READ,
    STARTTLS,
    STRUCTURED,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Client,
    Served,
    client,
    served,
)
from support.requirements import missing
from support.variants import Variant, identified, qemu_name, title, variants
from vmconv.cli.main import main
from vmconv.conversion.views import views
from vmconv.errors import AccessError, ReadError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.model.extents import Extents
from vmconv.model.sources import Blob
from vmconv.model.view import View
from vmconv_view import connection as connection_module
from vmconv_view.clients import MAX_CLIENTS, MAX_OF_ADDRESS, Clients, address_of
from vmconv_view.clients import Client as Connected
from vmconv_view.connection import Connection
from vmconv_view.nbd import ProtocolError
from vmconv_view.server import Server, listen_on_socket

SIZE = 12 * MIB


def fetched(qemu_img: QemuImg, uri: str, directory: Path) -> str:
    """Returns the digest of all bytes of an export, as qemu-img reads them."""
    target = directory / "fetched"
    qemu_img("convert", "-f", "raw", "-O", "raw", uri, target)
    return sha256(target.read_bytes()).hexdigest()


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


BY_ITSELF = [variant for variant in variants() if "reference" not in variant[1]]


@pytest.mark.parametrize("variant", BY_ITSELF, ids=title)
def test_an_export_is_the_file_that_convert_makes(xfs_dir: Path, qemu_img: QemuImg, variant: Variant) -> None:
    name = variant[0]
    given = ",".join(f"{key}={value}" for key, value in identified(variant).items())
    image = xfs_dir / "disk.vmdk"
    raw = make_disk(xfs_dir / "source.raw", SIZE)
    vmconv.convert(str(raw), str(image))
    made = xfs_dir / "made"
    made.mkdir()
    target = made / f"disk{installed().formats[name].suffixes[0]}"
    vmconv.convert(str(image), str(target), target_format=name, options=identified(variant))
    files = {path.name: path for path in made.iterdir()}
    flags = ["--as", name, "--persistent", *(["-o", given] if given else [])]
    with served(image, *flags, exports=len(files)) as running:
        assert running.sizes == {name: path.stat().st_size for name, path in files.items()}
        for export, uri in running.uris.items():
            found = xfs_dir / "fetched"
            qemu_img("convert", "-f", "raw", "-O", "raw", uri, found)
            # QEMU's raw disks are whole sectors.
            assert found.read_bytes()[: running.sizes[export]] == files[export].read_bytes(), export
        if len(files) == 1:
            qemu_img("compare", "-f", "raw", "-F", qemu_name(variant), raw, running.uri)


@pytest.mark.parametrize("name", sorted(name for name, one in installed().formats.items() if one.can_write))
def test_the_guests_disk_is_exported_unless_said(xfs_dir: Path, qemu_img: QemuImg, name: str) -> None:
    raw = make_disk(xfs_dir / "source.raw", SIZE)
    image = xfs_dir / f"disk{installed().formats[name].suffixes[0]}"
    vmconv.convert(str(raw), str(image))
    with served(image) as running:
        assert list(running.uris) == ["disk.raw"]
        qemu_img("compare", "-f", "raw", "-F", "raw", raw, running.uri)


def test_compressed_clusters_and_snapshots_can_be_exported(xfs_dir: Path, qemu_img: QemuImg) -> None:
    raw = make_disk(xfs_dir / "source.raw", SIZE)
    image = xfs_dir / "packed.qcow2"
    qemu_img("convert", "-c", "-O", "qcow2", raw, image)
    qemu_img("snapshot", "-c", "before", image)
    qemu_io(image, "write -P 9 0 1M")
    with served(image, "--snapshot", "before") as running:
        assert fetched(qemu_img, running.uri, xfs_dir) == digest(raw)


def test_block_status_is_that_of_the_source(xfs_dir: Path, qemu_img: QemuImg) -> None:
    raw = make_disk(xfs_dir / "disk.raw", SIZE, pieces=6)
    vmconv.convert(str(raw), str(xfs_dir / "disk.qcow2"))

    def data(place: str | Path) -> list[tuple[int, int]]:
        rows = json.loads(qemu_img("map", "--output=json", "-f", "raw", place).stdout)
        return [(row["start"], row["length"]) for row in rows if row["data"] and not row["zero"]]

    with served(xfs_dir / "disk.qcow2", "--persistent") as running:
        assert data(running.uri) == data(raw)
        assert len(data(raw)) > 2
        # A copy that QEMU makes is as sparse as the source.
        qemu_img("convert", "-f", "raw", "-O", "raw", running.uri, xfs_dir / "copy.raw")
        assert data(xfs_dir / "copy.raw") == data(raw)


def test_libnbd_reads_the_same_over_several_connections(xfs_dir: Path) -> None:
    if not shutil.which("nbdcopy"):
        missing("oracle", "nbdcopy is not installed")
    raw = make_disk(xfs_dir / "disk.raw", 40 * MIB, pieces=60)
    vmconv.convert(str(raw), str(xfs_dir / "disk.vhdx"))
    with served(xfs_dir / "disk.vhdx", "--persistent") as running:
        for flags in ([], ["--synchronous"], ["--no-extents"], ["--connections=1"]):
            copy = xfs_dir / "copy.raw"
            subprocess.run(["nbdcopy", *flags, running.uri, str(copy)], check=True, timeout=PATIENCE)
            assert digest(copy) == digest(raw), flags
            copy.unlink()


def test_it_listens_on_a_port_of_this_machine_only(xfs_dir: Path, qemu_img: QemuImg) -> None:
    raw = make_disk(xfs_dir / "disk.raw", SIZE)
    with served(raw, on_socket=False) as running:
        assert running.uri.startswith("nbd://127.0.0.1:")
        assert fetched(qemu_img, running.uri, xfs_dir) == digest(raw)
        assert running.end() == (0, "")


def test_only_its_owner_may_connect_to_the_socket(xfs_dir: Path) -> None:
    with served(make_disk(xfs_dir / "disk.raw", MIB)) as running:
        assert running.socket.stat().st_mode & 0o777 == 0o600


def test_nothing_is_written(xfs_dir: Path) -> None:
    raw = make_disk(xfs_dir / "disk.raw", MIB)
    before = digest(raw)
    with served(raw, "--persistent") as running:
        command = ["qemu-io", "-f", "raw", "-c", "write 0 4096", running.uri]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode
        assert "Permission denied" in done.stderr or "read-only" in done.stderr
    assert digest(raw) == before


# When it ends


def test_it_ends_with_its_last_client(xfs_dir: Path, qemu_img: QemuImg) -> None:
    with served(make_disk(xfs_dir / "disk.raw", MIB)) as running:
        qemu_img("map", "-f", "raw", running.uri)
        assert running.end() == (0, "")
        assert not running.socket.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_persistent_serves_until_it_is_stopped(xfs_dir: Path, qemu_img: QemuImg, number: signal.Signals) -> None:
    with served(make_disk(xfs_dir / "disk.raw", MIB), "--persistent") as running:
        for _ in range(3):
            qemu_img("map", "-f", "raw", running.uri)
        with client(running) as connection:
            connection.negotiate()
            running.process.send_signal(number)
            assert running.end() == (0, "")
        assert not running.socket.exists()


def test_fork_returns_when_clients_can_connect(xfs_dir: Path, qemu_img: QemuImg) -> None:
    raw = make_disk(xfs_dir / "disk.raw", MIB)
    path = xfs_dir / "nbd.sock"
    command = [sys.executable, "-m", "vmconv", "serve", "--fork", "--socket", str(path), str(raw)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert done.stdout == f"disk.raw: {MIB} bytes at nbd+unix:///?socket={path}\n"
    qemu_img("compare", "-f", "raw", "-F", "raw", raw, f"nbd+unix:///?socket={path}")
    until = time.monotonic() + PATIENCE
    while path.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_errors_are_reported_before_clients_can_connect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = make_disk(tmp_path / "disk.raw", MIB)
    assert main(["serve", str(raw), "--as", "qcow3"]) == 2
    assert "qcow3" in capsys.readouterr().err
    assert main(["serve", str(raw), "--as", "vmdk", "-o", "subformat=reference"]) == 1
    assert "vmdk would refer to the source's files" in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "none.raw")]) == 1
    assert "none.raw: cannot be opened" in capsys.readouterr().err
    assert main(["serve", str(raw), "--socket", str(raw)]) == 1
    assert "disk.raw: cannot be made a socket: Address already in use" in capsys.readouterr().err
    assert raw.exists()


# A source that changes


def change(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"changed")


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("length", [4096, MIB])
def test_a_source_that_changes_is_an_error_and_the_end(xfs_dir: Path, structured: bool, length: int) -> None:
    raw = make_disk(xfs_dir / "disk.raw", 4 * MIB)
    with served(raw, "--persistent") as running, client(running) as connection:
        connection.negotiate(structured=structured)
        assert connection.read(0, length) == raw.read_bytes()[:length]
        # The server checks for changes once more after a long reply; an answer to a next request comes after that.
        assert connection.read(0, 512) == raw.read_bytes()[:512]
        change(raw)
        assert connection.read(0, length) == 5
        code, said = running.end()
    assert (code, said.splitlines()[0]) == (1, "vmconv: disk.raw: changed while it was being viewed")
    assert not running.socket.exists()


def test_a_change_after_the_last_read_is_noticed_too(xfs_dir: Path) -> None:
    raw = make_disk(xfs_dir / "disk.raw", 4 * MIB)
    with served(raw) as running, client(running) as connection:
        connection.negotiate()
        connection.read(0, MIB)
        change(raw)
        connection.request(DISC, 0, 0)
        code, said = running.end()
    assert code == 1
    assert "changed while it was being viewed" in said


# The protocol, by hand


@pytest.fixture
def running(xfs_dir: Path) -> Iterator[Served]:
    raw = make_disk(xfs_dir / "disk.raw", 4 * MIB)
    with served(raw, "--as", "vmdk", "-o", "subformat=monolithicFlat", "--persistent", exports=2) as running:
        yield running
        # Whatever the client did, the next one is served.
        with client(running) as connection:
            connection.negotiate()
            assert b"createType" in bytes(connection.read(0, connection.size))
        assert running.process.poll() is None


def test_exports_are_listed_and_chosen_by_name(running: Served) -> None:
    with client(running) as connection:
        connection.greet()
        names = [data[4:] for kind, data in connection.option(LIST) if kind == 2]
        assert names == [b"disk-flat.vmdk", b"disk.vmdk"]
        for name, size in ((b"disk-flat.vmdk", 4 * MIB), (b"", running.sizes["disk.vmdk"])):
            replies = connection.option(INFO, struct.pack(">I", len(name)) + name + b"\0\0")
            assert struct.unpack(">Q", replies[0][1][2:10]) == (size,)
        (unknown,) = connection.option(GO, struct.pack(">I", 4) + b"none" + b"\0\0")
        assert unknown[0] == (1 << 31) + 6


@pytest.mark.parametrize("flags", [1, 3])
def test_old_clients_choose_an_export_without_negotiating(running: Served, flags: int) -> None:
    with client(running) as connection:
        connection.greet(flags)
        connection.socket.sendall(b"IHAVEOPT" + struct.pack(">II", EXPORT_NAME, 14) + b"disk-flat.vmdk")
        size, _ = struct.unpack(">QH", connection.receive(10))
        assert size == 4 * MIB
        if flags == 1:
            assert connection.receive(124) == bytes(124)
        assert connection.read(MIB - 7, 1000)
        for unknown in (TRIM, WRITE):
            connection.request(unknown, 0, 512)
            if unknown == WRITE:
                connection.socket.sendall(bytes(512))
            assert connection.simple_reply() == 1


@pytest.mark.parametrize("structured", [True, False])
def test_requests_that_make_no_sense_are_refused(running: Served, structured: bool) -> None:
    with client(running) as connection:
        connection.negotiate(structured=structured)
        for command, offset, length, flags in (
            (READ, connection.size, 1, 0),
            (READ, connection.size - 1, 2, 0),
            (READ, (1 << 64) - 1, 512, 0),
            (READ, 0, (1 << 32) - 1, 0),
            (READ, 0, 0, 0),
            (READ, 0, 1, 4),
            (READ, 0, 1, 1),
            (BLOCK_STATUS, 0, 1, 0),
            (CACHE, 0, 1, 0),
            (99, 0, 1, 0),
        ):
            connection.request(command, offset, length, flags=flags)
            if structured and command in (READ, BLOCK_STATUS):
                # The protocol allows no simple reply to these once structured replies are negotiated.
                last, kind, payload = connection.chunk()
                assert (last, kind, payload[:4]) == (1, (1 << 15) + 1, struct.pack(">I", 22))
                assert len(payload) == 6 + struct.unpack(">H", payload[4:6])[0]
            else:
                assert connection.simple_reply() == 22
        connection.request(FLUSH, 0, 0)
        assert connection.simple_reply() == 0
        for command in (WRITE, TRIM, WRITE_ZEROES):
            connection.request(command, 0, 100_000)
            if command == WRITE:
                connection.socket.sendall(bytes(100_000))
            assert connection.simple_reply() == 1
        assert b"createType" in bytes(connection.read(0, connection.size))


def context(*queries: bytes, export: bytes = b"disk-flat.vmdk") -> bytes:
    data = struct.pack(">I", len(export)) + export + struct.pack(">I", len(queries))
    return data + b"".join(struct.pack(">I", len(query)) + query for query in queries)


def test_block_status_needs_its_context(running: Served) -> None:
    with client(running) as connection:
        connection.greet()
        set_context, list_context = 10, 9
        assert connection.option(set_context, context(b"base:allocation"))[0][0] >> 31
        connection.option(STRUCTURED)
        assert connection.option(set_context, context(b"other:thing")) == [(1, b"")]
        assert connection.option(list_context, context())[0] == (4, bytes(4) + b"base:allocation")
        assert connection.option(list_context, context(b"base:"))[0][0] == 4
        assert connection.option(set_context, context(b"base:allocation"))[0] == (4, b"\0\0\0\1base:allocation")
        connection.option(GO, struct.pack(">I", 14) + b"disk-flat.vmdk" + b"\0\0")
        connection.structured = True
        connection.request(BLOCK_STATUS, 0, 4 * MIB)
        flags, kind, payload = connection.chunk()
        pairs = list(struct.iter_unpack(">II", payload[4:]))
        assert (flags, kind, sum(length for length, _ in pairs)) == (1, 5, 4 * MIB)
        at = 0
        for length, status in pairs:
            assert status in (0, 3)
            assert status == 0 or connection.read(at, min(length, MIB)) == bytes(min(length, MIB))
            at += length
        connection.request(BLOCK_STATUS, 0, 4 * MIB, flags=8)
        assert connection.chunk()[2][4:] == struct.pack(">II", *pairs[0])


@pytest.mark.parametrize(
    "data",
    [b"", b"\0\0\0\xff", struct.pack(">IH", 0, 7), struct.pack(">I", 1 << 31) + b"x"],
    ids=["nothing", "short", "count", "long"],
)
@pytest.mark.parametrize("option", [GO, INFO, 9, 10])
def test_options_that_make_no_sense_are_refused(running: Served, option: int, data: bytes) -> None:
    with client(running) as connection:
        connection.greet()
        connection.option(STRUCTURED)
        assert connection.option(option, data)[0][0] == (1 << 31) + 3
        assert connection.option(STARTTLS)[0][0] == (1 << 31) + 1
        assert connection.option(ABORT) == [(1, b"")]


@pytest.mark.parametrize(
    "said",
    [
        b"\xff\xff\xff\xff",
        b"\0\0\0\0",
        struct.pack(">I", 3) + b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", GO, 1 << 31),
        struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", EXPORT_NAME, 4) + b"none",
        struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", EXPORT_NAME, 0) + bytes(28),
        b"",
    ],
    ids=["flags", "oldstyle", "http", "huge", "unknown", "magic", "silence"],
)
def test_a_client_that_violates_the_protocol_is_disconnected(running: Served, said: bytes) -> None:
    with client(running) as connection:
        connection.receive(18)
        connection.socket.sendall(said)
        connection.socket.shutdown(socket.SHUT_WR)
        with pytest.raises((EOFError, ConnectionResetError)):
            connection.receive(1 << 20)


def test_options_that_are_too_big_are_refused_and_others_follow(running: Served) -> None:
    with client(running) as connection:
        connection.greet()
        assert connection.option(GO, bytes((64 << 10) + 1)) == [((1 << 31) + 9, b"")]
        long = struct.pack(">I", 4097) + bytes(4097) + bytes(2)
        assert connection.option(GO, long)[0][0] == (1 << 31) + 3
        assert connection.option(STRUCTURED) == [(1, b"")]
        assert connection.option(STRUCTURED)[0][0] == (1 << 31) + 3
        assert connection.option(LIST, b"x")[0][0] == (1 << 31) + 3
        assert connection.option(77, bytes(1000))[0][0] == (1 << 31) + 1
        assert connection.option(GO, struct.pack(">IH", 0, 0))[-1] == (1, b"")


def test_a_write_that_is_too_long_to_be_skipped_is_the_end(running: Served) -> None:
    with client(running) as connection:
        connection.negotiate()
        connection.request(WRITE, 0, (32 << 20) + 1)
        with pytest.raises(EOFError):
            connection.receive(1)


# Connections that are no clients, and clients that are too many or too slow


def scan(running: Served) -> None:
    """Connects as port scanners and monitoring do."""
    for said in (None, b"", b"GET / HTTP/1.0\r\n\r\n", struct.pack(">I", 3) + b"IHAVEOPT"):
        with client(running) as connection:
            if said is not None:
                connection.receive(18)
                connection.socket.sendall(said)
    with client(running) as connection:
        connection.greet()
        assert connection.option(LIST)[-1] == (1, b"")
        assert connection.option(ABORT) == [(1, b"")]


def test_a_connection_that_never_negotiates_does_not_end_the_server(xfs_dir: Path, qemu_img: QemuImg) -> None:
    with served(make_disk(xfs_dir / "disk.raw", MIB)) as running:
        scan(running)
        qemu_img("map", "-f", "raw", running.uri)
        # The protocol errors of the scan, and nothing else.
        code, said = running.end()
        assert (code, "Traceback" in said) == (0, False)


def test_silent_connections_do_not_lock_clients_out(xfs_dir: Path) -> None:
    raw = make_disk(xfs_dir / "disk.raw", MIB)
    with served(raw, "--persistent", on_socket=False) as running, contextlib.ExitStack() as stack:
        address = urlsplit(running.uri)
        assert address.hostname and address.port
        place = address.hostname, address.port

        def connect() -> Client:
            connection = stack.enter_context(socket.create_connection(place, timeout=PATIENCE))
            return Client(connection)

        first = connect()
        first.negotiate()
        silent = [connect() for _ in range(200)]
        late = connect()
        late.negotiate()
        assert late.read(0, 4096) == raw.read_bytes()[:4096]
        # It has not waited for the time limit of the others.
        assert any(map(is_open, silent))
        assert first.read(0, 4096) == raw.read_bytes()[:4096]


def is_open(connection: Client) -> bool:
    """True if the server has not closed a connection on which it was told nothing."""
    connection.socket.setblocking(False)
    try:
        while connection.socket.recv(1 << 10):
            pass
    except BlockingIOError:
        return True
    except ConnectionError:
        pass
    return False


def test_one_host_does_not_take_every_place() -> None:
    clients = Clients()
    with contextlib.ExitStack() as stack:
        greedy = [negotiated(stack, b"a") for _ in range(MAX_OF_ADDRESS)]
        assert all(map(clients.add, greedy))
        assert not clients.add(negotiated(stack, b"a"))
        others = [negotiated(stack, number.to_bytes(4)) for number in range(MAX_CLIENTS - MAX_OF_ADDRESS)]
        assert all(map(clients.add, others))
        assert not clients.add(negotiated(stack, b"z"))
        # Who asked for nothing in a while goes first, of the host that has most.
        for one in (greedy[7], others[0]):
            one.active -= 60
        assert clients.add(negotiated(stack, b"z"))
        assert greedy[7].socket.recv(1) == b""
        clients.remove(greedy[7])
        # Who has requested nothing goes before them, and who has not negotiated before all.
        others[1].used, others[2].used, others[2].negotiated = False, False, False
        assert clients.add(negotiated(stack, b"y"))
        assert others[2].socket.recv(1) == b""
        assert clients.add(negotiated(stack, b"x"))
        assert others[1].socket.recv(1) == b""
        # Who has proved who it is goes last, and then only if it is idle.
        for one in (*others, *greedy):
            one.active -= 60
        others[3].authorised, others[3].used = True, False
        for _ in range(2):
            assert clients.add(negotiated(stack, b"w"))
        assert is_connected(others[3])


def negotiated(stack: contextlib.ExitStack, address: bytes) -> Connected:
    ours, theirs = map(stack.enter_context, socket.socketpair())
    del theirs
    one = Connected(ours, "")
    one.address = address
    one.progressed()
    one.progressed()
    return one


def is_connected(one: Connected) -> bool:
    one.socket.setblocking(False)
    try:
        return bool(one.socket.recv(1))
    except BlockingIOError:
        return True


def test_hosts_are_distinguished_by_their_networks() -> None:
    with socket.socket(socket.AF_INET6) as six, socket.socket() as four, socket.socket(socket.AF_UNIX) as local:
        assert address_of(six, ("2001:db8::1", 1, 0, 0)) == address_of(six, ("2001:db8::2:3", 2, 0, 0))
        assert address_of(six, ("2001:db8::1", 1, 0, 0)) != address_of(six, ("2001:db8:0:1::1", 1, 0, 0))
        assert address_of(six, ("fe80::1%eth0", 1, 0, 2)) == bytes.fromhex("fe80000000000000")
        assert address_of(four, ("192.0.2.1", 1)) != address_of(four, ("192.0.2.2", 1))
        assert address_of(local, "") == b""


@contextlib.contextmanager
def in_process(raw: Path, *, persistent: bool = True) -> Iterator[tuple[Server, Path]]:
    """Runs a server of this process, whose limits a test can change."""
    path = raw.with_name("here.sock")
    with Opener(installed()) as opener:
        image = opener.image(str(raw))
        exports = {os.fsencode(k): v for k, v in views(image, installed().formats["raw"], {}, "disk.raw").items()}
        exports[b""] = exports[b"disk.raw"]
        server = Server(listen_on_socket(str(path)), exports, persistent=persistent)
        thread = threading.Thread(target=ended, args=(server,))
        thread.start()
        try:
            yield server, path
        finally:
            # As a client would whose source has changed.
            server._failure = server._failure or AccessError("told to end")
            with contextlib.suppress(OSError):
                server._waker.send(b"+")
            thread.join(timeout=PATIENCE)
            assert not thread.is_alive()


def ended(server: Server) -> None:
    with contextlib.suppress(AccessError):
        server.run()


@contextlib.contextmanager
def connected(path: Path) -> Iterator[Client]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(str(path))
        yield Client(connection)


def drip(connection: Client, data: bytes, seconds: float) -> None:
    """Sends a byte now and then, until all are sent or the server has had enough."""
    with contextlib.suppress(ConnectionError):
        for byte in data:
            connection.socket.sendall(bytes([byte]))
            time.sleep(seconds / len(data))


def test_nothing_is_said_of_what_ends_with_the_server(
    xfs_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    begun, over, before = threading.Event(), threading.Event(), {*threading.enumerate()}

    def late(_view: View) -> None:
        begun.set()
        assert over.wait(PATIENCE)
        raise ReadError("the file was closed")

    monkeypatch.setattr(View, "refuse_changed", late)
    with in_process(make_disk(xfs_dir / "disk.raw", MIB)) as (_, path), connected(path) as asking:
        asking.negotiate()
        asking.request(READ, 0, 512)
        assert begun.wait(PATIENCE)
    over.set()
    for thread in {*threading.enumerate()} - before:
        thread.join(PATIENCE)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("phase", ["greeting", "option", "option data", "header", "payload", "reply"])
def test_each_phase_has_a_time_limit(xfs_dir: Path, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    limit = "NEGOTIATION_TIME" if phase in ("greeting", "option", "option data") else "PIECE_TIME"
    monkeypatch.setattr(connection_module, limit, 2.0)
    raw = xfs_dir / "disk.raw"
    raw.write_bytes(os.urandom(33 * MIB))
    with in_process(raw) as (_, path), connected(path) as slow:
        if limit == "NEGOTIATION_TIME":
            slow.receive(18) if phase == "greeting" else slow.greet()
            said = {"greeting": bytes(4), "option": b"IHAVEOPT" + bytes(8)}.get(phase)
            drip(slow, said or b"IHAVEOPT" + struct.pack(">II", GO, 60_000) + bytes(100), 4)
        else:
            slow.negotiate()
            # To wait between requests is no offence.
            time.sleep(2.5)
            assert slow.read(0, 512) == raw.read_bytes()[:512]
        if phase == "header":
            drip(slow, struct.pack(">IHHQQI", 0x25609513, 0, READ, 1, 0, 512)[:-1], 4)
        elif phase == "payload":
            slow.request(WRITE, 0, 10_000)
            drip(slow, bytes(100), 4)
        elif phase == "reply":
            slow.request(READ, 0, 32 * MIB)
            # One call that makes some progress, and one that makes none.
            time.sleep(5)
        with pytest.raises((EOFError, ConnectionError)):
            slow.receive(33 * MIB)
        # A busy machine may need more time.
        monkeypatch.undo()
        with connected(path) as another:
            another.negotiate()
            assert another.read(0, 512) == raw.read_bytes()[:512]


def test_exhausted_descriptors_are_neither_the_end_nor_a_busy_loop(xfs_dir: Path) -> None:
    raw = make_disk(xfs_dir / "disk.raw", MIB)
    with served(raw, "--persistent") as running, contextlib.ExitStack() as stack:
        pid = running.process.pid
        stack.enter_context(client(running)).negotiate()
        count = len(os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (count + 8, count + 8))
        busy = [stack.enter_context(client(running)) for _ in range(8)]
        for one in busy:
            one.negotiate()
        waiting = stack.enter_context(client(running))
        before = processor_time(pid)
        time.sleep(1.5)
        assert processor_time(pid) - before < 0.3
        assert busy[0].read(0, 512) == raw.read_bytes()[:512]
        busy[3].request(DISC, 0, 0)
        waiting.negotiate()
        assert waiting.read(0, 512) == raw.read_bytes()[:512]
        running.process.terminate()
        code, said = running.end()
        assert (code, said) == (0, "vmconv: no connection can be accepted: Too many open files\n")


def processor_time(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_thread_that_cannot_be_started_is_neither_the_end(xfs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = make_disk(xfs_dir / "disk.raw", MIB)
    with in_process(raw) as (server, path):
        started = server._start

        def fails_once(one: Connected) -> None:
            monkeypatch.setattr(threading.Thread, "start", no_thread)
            started(one)
            monkeypatch.undo()

        monkeypatch.setattr(server, "_start", fails_once)
        with connected(path) as refused, pytest.raises((EOFError, ConnectionError)):
            refused.receive(1)
        with connected(path) as connection:
            connection.negotiate()


def no_thread(_self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_the_end_does_not_remove_what_somebody_else_put_in_place_of_the_socket(xfs_dir: Path) -> None:
    with served(make_disk(xfs_dir / "disk.raw", MIB), "--persistent") as running:
        running.socket.unlink()
        running.socket.write_text("not ours")
        running.process.terminate()
        assert running.end() == (0, "")
        assert running.socket.read_text() == "not ours"


OPTIONS_OR_REQUESTS = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.builds(
            lambda option, data, excess: b"IHAVEOPT" + struct.pack(">II", option, len(data) + excess) + data,
            st.one_of(st.integers(0, 12), st.integers(0, (1 << 32) - 1)),
            st.one_of(
                st.binary(max_size=30), st.just(struct.pack(">IH", 0, 0)), st.just(context(b"base:", export=b""))
            ),
            st.sampled_from([0, 0, 0, 1, 70_000, 1 << 31]),
        ),
        st.builds(
            lambda *fields: struct.pack(">IHHQQI", 0x25609513, *fields),
            st.sampled_from([0, 1, 4, 8, 65535]),
            st.one_of(st.integers(0, 10), st.just(65535)),
            st.integers(0, (1 << 64) - 1),
            st.one_of(st.integers(0, MIB), st.integers(0, (1 << 64) - 1)),
            st.one_of(st.integers(0, MIB), st.integers(0, (1 << 32) - 1)),
        ),
    ),
    max_size=12,
)


@given(flags=st.sampled_from([3, 1, 0, 1 << 31]), go=st.booleans(), said=OPTIONS_OR_REQUESTS)
@settings(max_examples=300, deadline=None)
def test_any_bytes_end_with_a_reply_or_a_closed_connection(flags: int, go: bool, said: list[bytes]) -> None:
    view = View(Extents.whole(Blob("disk", bytes(range(256)) * 4096)))
    export = {b"disk": view, b"": view}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        start = struct.pack(">I", flags)
        start += b"IHAVEOPT" + struct.pack(">II", GO, 6) + bytes(6) if go else b""
        sender = threading.Thread(target=send_and_drain, args=(theirs, start + b"".join(said)))
        sender.start()
        with contextlib.suppress(ProtocolError, OSError):
            Connection(ours, export).serve()
        ours.shutdown(socket.SHUT_RDWR)
        sender.join(timeout=PATIENCE)
        assert not sender.is_alive()


def send_and_drain(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 20):
            pass


def test_libnbd_agrees_about_the_exports(xfs_dir: Path) -> None:
    if not shutil.which("nbdinfo"):
        missing("oracle", "nbdinfo is not installed")
    raw = make_disk(xfs_dir / "disk.raw", 4 * MIB)
    with served(raw, "--as", "vmdk", "-o", "subformat=monolithicFlat", "--persistent", exports=2) as running:
        for name, uri in running.uris.items():
            done = subprocess.run(
                ["nbdinfo", "--json", uri], capture_output=True, text=True, check=True, timeout=PATIENCE
            )
            (export,) = json.loads(done.stdout)["exports"]
            assert export["export-size"] == running.sizes[name]
            assert export["is_read_only"]
            assert export["contexts"] == ["base:allocation"]
        done = subprocess.run(
            ["nbdinfo", "--list", "--json", running.uri], capture_output=True, text=True, check=True, timeout=PATIENCE
        )
        assert {export["export-name"] for export in json.loads(done.stdout)["exports"]} == set(running.uris)


# Several images


def test_several_images_are_exports_of_one_server(xfs_dir: Path, qemu_img: QemuImg) -> None:
    web, db = (
        make_disk(xfs_dir / "web.raw", 4 * MIB, pieces=5),
        make_disk(xfs_dir / "db.raw", 6 * MIB, pieces=7, seed=3),
    )
    vmconv.convert(str(db), str(xfs_dir / "db.vhdx"))
    with served(web, str(xfs_dir / "db.vhdx"), "--persistent", exports=2) as running:
        assert running.sizes == {"web.raw": 4 * MIB, "db.raw": 6 * MIB}
        # The first is the default.
        assert running.uris["web.raw"] == f"nbd+unix:///?socket={running.socket}"
        for name, raw in (("web.raw", web), ("db.raw", db)):
            qemu_img("compare", "-f", "raw", "-F", "raw", raw, running.uris[name])
            qemu_img("compare", "-f", "raw", "-F", "raw", raw, f"nbd+unix:///{name}?socket={running.socket}")
        done = subprocess.run(
            ["nbdinfo", "--list", "--json", running.uris["web.raw"]],
            capture_output=True, text=True, check=True, timeout=PATIENCE,
        )  # fmt: skip
        assert {one["export-name"]: one["export-size"] for one in json.loads(done.stdout)["exports"]} == running.sizes


def test_exports_have_the_names_that_are_given(xfs_dir: Path, qemu_img: QemuImg) -> None:
    web, db = make_disk(xfs_dir / "web.raw", MIB), make_disk(xfs_dir / "db.raw", 2 * MIB)
    flags = ["-x", "front/1", str(db), "--export-name", "back", "--persistent"]
    with served(web, *flags, exports=2) as running:
        assert running.sizes == {"front/1": MIB, "back": 2 * MIB}
        qemu_img("compare", "-f", "raw", "-F", "raw", db, f"nbd+unix:///back?socket={running.socket}")


def test_names_that_clash_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, same = make_disk(tmp_path / "disk.raw", MIB), tmp_path / "other"
    same.mkdir()
    shutil.copy(raw, same)
    assert main(["serve", str(raw), str(same / "disk.raw")]) == 2
    assert f"{same}/disk.raw: an export disk.raw exists\n  hint: name it with --export-name" in capsys.readouterr().err
    assert main(["serve", str(raw), "-x", "a", "-x", "b"]) == 2
    assert "--export-name: 2 names for 1 FILE" in capsys.readouterr().err
    assert main(["serve", str(raw), "-x", ""]) == 2
    assert "--export-name: 0 bytes, 1 to 4096 are possible" in capsys.readouterr().err


# Many idle clients


def test_a_new_client_gets_in_at_once_among_hundreds_of_idle_ones(xfs_dir: Path, qemu_img: QemuImg) -> None:
    raw = make_disk(xfs_dir / "disk.raw", 4 * MIB, pieces=3)
    with served(raw, "--persistent", "--bind", "0.0.0.0", on_socket=False) as running, contextlib.ExitStack() as stack:
        port = urlsplit(running.uri).port
        idle = []
        for number in range(500):
            connection = stack.enter_context(socket.socket())
            connection.settimeout(PATIENCE)
            # Every address of 127.0.0.0/8 is this machine: 25 connections each of 20 hosts.
            connection.bind((f"127.0.0.{2 + number % 20}", 0))
            connection.connect(("127.0.0.1", port))
            idle.append(Client(connection))
            idle[-1].negotiate()
        qemu_img("compare", "-f", "raw", "-F", "raw", raw, f"nbd://127.0.0.1:{port}")
        command = ["nbdinfo", "--size", f"nbd://127.0.0.1:{port}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
        assert done.stdout == f"{4 * MIB}\n"
        # None had to go, and all can be used.
        assert all(one.read(0, 512) == raw.read_bytes()[:512] for one in idle)
        # 500 more of one host, which replace each other and nobody else.
        for _ in range(500):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE))
            Client(connection).negotiate()
        qemu_img("compare", "-f", "raw", "-F", "raw", raw, f"nbd://127.0.0.1:{port}")
        assert all(one.read(0, 512) == raw.read_bytes()[:512] for one in idle)
