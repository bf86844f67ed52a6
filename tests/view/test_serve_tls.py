"""`vmconv serve` with TLS: certificates that GnuTLS made, clients of libnbd and QEMU, and one that breaks the rules."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

from support.disks import MIB, QemuImg, make_disk
from support.nbd import (
    ABORT,
    EXPORT_NAME,
    GO,
    LIST,
    PATIENCE,
    READ,
    STARTTLS,
    STRUCTURED,
    Client,
    Served,
    client,
    served,
)
from support.requirements import missing
from vmconv.cli.main import main
from vmconv.errors import AccessError, UsageError
from vmconv.model.extents import Extents
from vmconv.model.sources import Blob
from vmconv.model.view import View
from vmconv_view import connection as connection_module
from vmconv_view import tls
from vmconv_view.server import Server, listen_on_socket

TLS_REQUIRED, INVALID, UNSUPPORTED = (1 << 31) + 5, (1 << 31) + 3, (1 << 31) + 1


def tool(*command: str | Path) -> subprocess.CompletedProcess[str]:
    if not shutil.which(command[0]):
        missing("oracle", f"{command[0]} is not installed")
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=PATIENCE)


def make(directory: Path, *command: str | Path) -> None:
    done = tool("certtool", *command)
    assert not done.returncode, (directory, done.stderr)


class Authority:
    """A CA in a directory, and certificates of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        self._key(directory / "ca-key.pem")
        template = directory / "ca.info"
        template.write_text("cn = Example CA\nca\ncert_signing_key\ncrl_signing_key\nexpiration_days = 30\n")
        key, certificate = directory / "ca-key.pem", directory / "ca-cert.pem"
        make(
            directory, "--generate-self-signed", "--load-privkey", key, "--template", template, "--outfile", certificate
        )

    def _key(self, path: Path) -> None:
        make(self.directory, "--generate-privkey", "--ecc", "--outfile", path)

    def issue(self, kind: str, name: str, directory: Path | None = None) -> Path:
        """Writes a key and a certificate of `name` for a server or client; returns their directory."""
        directory = directory or self.directory
        directory.mkdir(exist_ok=True)
        key, template = directory / f"{kind}-key.pem", directory / f"{kind}.info"
        self._key(key)
        use = {"server": "tls_www_server\nip_address = 127.0.0.1\ndns_name = localhost", "client": "tls_www_client"}
        template.write_text(f"cn = {name}\n{use[kind]}\nencryption_key\nsigning_key\nexpiration_days = 30\n")
        ca = self.directory
        if directory != ca:
            shutil.copy(ca / "ca-cert.pem", directory)
        flags: list[str | Path] = ["--load-ca-certificate", ca / "ca-cert.pem", "--load-ca-privkey", ca / "ca-key.pem"]
        make(directory, "--generate-certificate", "--load-privkey", key, *flags,
             "--template", template, "--outfile", directory / f"{kind}-cert.pem")  # fmt: skip
        return directory

    def revoke(self, certificate: Path) -> None:
        """Writes a list of revoked certificates into the CA's directory."""
        template = self.directory / "crl.info"
        template.write_text("crl_next_update = 30\ncrl_number = 1\n")
        flags: list[str | Path] = [
            "--load-ca-certificate",
            self.directory / "ca-cert.pem",
            "--load-ca-privkey",
            self.directory / "ca-key.pem",
        ]
        make(self.directory, "--generate-crl", "--load-certificate", certificate, *flags,
             "--template", template, "--outfile", self.directory / "ca-crl.pem")  # fmt: skip


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("pki") / "server")
    made.issue("server", "localhost")
    made.issue("client", "alice", made.directory.with_name("alice"))
    made.issue("client", "mallory", made.directory.with_name("mallory"))
    other = Authority(made.directory.with_name("other"))
    other.issue("client", "alice")
    return made


def client_of(authority: Authority, name: str) -> Path:
    return authority.directory.with_name(name)


def with_keys(uri: str, keys: Path) -> str:
    mark = "&" if urlsplit(uri).query else "?"
    return f"{uri}{mark}tls-certificates={quote(str(keys))}"


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def test_libnbd_and_qemu_read_over_tls(xfs_dir: Path, qemu_img: QemuImg, authority: Authority) -> None:
    raw = make_disk(xfs_dir / "disk.raw", 24 * MIB, pieces=20)
    keys = client_of(authority, "alice")
    flags = ["--tls-certificates", str(authority.directory), "--tls-verify-peer", "--persistent"]
    with served(raw, *flags, on_socket=False) as running:
        assert running.uri.startswith("nbds://127.0.0.1:")
        copy = xfs_dir / "copy.raw"
        done = tool("nbdcopy", with_keys(running.uri, keys), copy)
        assert (done.returncode, done.stderr, digest(copy)) == (0, "", digest(raw))
        shown = tool("nbdinfo", "--json", with_keys(running.uri, keys))
        assert '"TLS": true' in shown.stdout
        port = urlsplit(running.uri).port
        qemu_img(
            "convert", "-O", "raw", "--object", f"tls-creds-x509,id=tls0,endpoint=client,dir={keys},verify-peer=yes",
            "--image-opts", f"driver=nbd,host=localhost,port={port},tls-creds=tls0", xfs_dir / "second.raw",
        )  # fmt: skip
        assert digest(xfs_dir / "second.raw") == digest(raw)


@pytest.mark.parametrize("name", ["nobody", "other", "mallory", "plain"])
def test_only_clients_that_are_let_in_are_served(xfs_dir: Path, authority: Authority, name: str) -> None:
    raw = make_disk(xfs_dir / "disk.raw", MIB)
    flags = [
        "--tls-certificates",
        str(authority.directory),
        "--tls-verify-peer",
        "--tls-allow",
        "alice",
        "--persistent",
    ]
    nobody = xfs_dir / "nobody"
    nobody.mkdir()
    shutil.copy(authority.directory / "ca-cert.pem", nobody)
    keys = nobody if name == "nobody" else client_of(authority, name)
    if name == "other":
        shutil.copy(authority.directory / "ca-cert.pem", keys)
    with served(raw, *flags, on_socket=False) as running:
        uri = running.uri.replace("nbds", "nbd") if name == "plain" else with_keys(running.uri, keys)
        done = tool("nbdinfo", "--size", uri)
        assert done.returncode, done.stdout
        done = tool("nbdinfo", "--size", with_keys(running.uri, client_of(authority, "alice")))
        assert done.stdout == f"{MIB}\n"
        running.process.terminate()
        code, said = running.end()
    reason = {
        "nobody": "peer did not return a certificate",
        "other": "its certificate is refused",
        "mallory": "its certificate is of 'mallory'",
        "plain": "",
    }
    assert (code, reason[name] in said) == (0, True), said
    assert "Traceback" not in said


def test_clients_notice_a_server_that_is_another(xfs_dir: Path, authority: Authority) -> None:
    raw = make_disk(xfs_dir / "disk.raw", MIB)
    stranger = xfs_dir / "stranger"
    stranger.mkdir()
    for name in ("server-cert.pem", "server-key.pem"):
        shutil.copy(authority.directory / name, stranger)
    with served(raw, "--tls-certificates", str(stranger), "--persistent", on_socket=False) as running:
        made = xfs_dir / "trusting-another"
        made.mkdir()
        # A client that trusts the other CA only.
        other = Authority(xfs_dir / "ca")
        shutil.copy(other.directory / "ca-cert.pem", made)
        done = tool("nbdinfo", "--size", with_keys(running.uri, made))
        assert done.returncode
        assert "certificate" in done.stderr


def test_a_revoked_certificate_is_refused(xfs_dir: Path, authority: Authority) -> None:
    raw = make_disk(xfs_dir / "disk.raw", MIB)
    directory = xfs_dir / "pki"
    shutil.copytree(authority.directory, directory)
    copied = Authority.__new__(Authority)
    copied.directory = directory
    copied.revoke(client_of(authority, "mallory") / "client-cert.pem")
    flags = ["--tls-certificates", str(directory), "--tls-verify-peer", "--persistent"]
    with served(raw, *flags, on_socket=False) as running:
        assert tool("nbdinfo", "--size", with_keys(running.uri, client_of(authority, "mallory"))).returncode
        done = tool("nbdinfo", "--size", with_keys(running.uri, client_of(authority, "alice")))
        assert done.stdout == f"{MIB}\n"


def start_tls(connection: Client) -> Client:
    assert connection.option(STARTTLS) == [(1, b"")]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return Client(context.wrap_socket(connection.socket))


@pytest.fixture
def running(xfs_dir: Path, authority: Authority, request: pytest.FixtureRequest) -> object:
    raw = make_disk(xfs_dir / "disk.raw", 4 * MIB, pieces=3)
    flags = ["--tls", request.param, "--tls-certificates", str(authority.directory), "--persistent"]
    with served(raw, *flags) as one:
        yield one
        assert one.process.poll() is None


@pytest.mark.parametrize("running", ["require"], indirect=True)
def test_nothing_is_told_before_the_encryption(running: Served) -> None:
    with client(running) as connection:
        connection.greet()
        for number, data in ((LIST, b""), (STRUCTURED, b""), (GO, struct.pack(">IH", 0, 0)), (99, b"")):
            assert connection.option(number, data) == [(TLS_REQUIRED, b"TLS is required")]
        assert connection.option(STARTTLS, b"x")[0][0] == INVALID
        assert connection.option(ABORT) == [(1, b"")]
    with client(running) as connection:
        connection.greet()
        connection.socket.sendall(b"IHAVEOPT" + struct.pack(">II", EXPORT_NAME, 0))
        with pytest.raises((EOFError, ConnectionResetError)):
            connection.receive(1)


@pytest.mark.parametrize("running", ["on"], indirect=True)
def test_what_was_negotiated_before_the_encryption_is_forgotten(running: Served) -> None:
    with client(running) as plain:
        plain.negotiate()
        assert plain.size == 4 * MIB
    with client(running) as connection:
        connection.greet()
        assert connection.option(STARTTLS, b"x")[0][0] == INVALID
        assert connection.option(STRUCTURED) == [(1, b"")]
        secured = start_tls(connection)
        with secured.socket:
            assert secured.option(STARTTLS)[0][0] == INVALID
            # Structured replies have to be requested again; a second request would be invalid otherwise.
            assert secured.option(STRUCTURED) == [(1, b"")]
            assert secured.option(GO, struct.pack(">IH", 0, 0))[-1] == (1, b"")
            secured.structured = True
            raw = running.socket.with_name("disk.raw").read_bytes()
            for offset, length in ((0, 512), (100, 4 * MIB - 100), (MIB - 3, 65537)):
                assert secured.read(offset, length) == raw[offset : offset + length]


@pytest.mark.parametrize("running", ["on"], indirect=True)
def test_plain_bytes_after_the_request_for_encryption_are_no_options(running: Served) -> None:
    with client(running) as connection:
        connection.greet()
        option = b"IHAVEOPT" + struct.pack(">II", LIST, 0)
        connection.socket.sendall(b"IHAVEOPT" + struct.pack(">II", STARTTLS, 0) + option)
        assert connection.receive(20)[8:16] == struct.pack(">II", STARTTLS, 1)
        # An alert of TLS at most, and the end.
        with pytest.raises((EOFError, ConnectionResetError)):
            while connection.receive(1):
                pass


def ended(server: Server) -> None:
    with contextlib.suppress(AccessError):
        server.run()


def test_each_phase_has_a_time_limit_with_tls_too(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "NEGOTIATION_TIME", 2.0)
    monkeypatch.setattr(connection_module, "PIECE_TIME", 1.0)
    view = View(Extents.whole(Blob("disk", os.urandom(MIB) * 33)))
    settings = tls.with_certificates(str(authority.directory), required=True, verify_peer=False)
    path = str(tmp_path / "nbd.sock")
    server = Server(listen_on_socket(path), {b"": view}, persistent=True, tls=settings)
    thread = threading.Thread(target=ended, args=(server,), daemon=True)
    thread.start()

    def connected() -> Client:
        connection = stack.enter_context(socket.socket(socket.AF_UNIX))
        connection.settimeout(PATIENCE)
        connection.connect(path)
        plain = Client(connection)
        plain.greet()
        return plain

    def chosen() -> Client:
        secured = start_tls(connected())
        stack.enter_context(secured.socket)
        assert secured.option(GO, struct.pack(">IH", 0, 0))[-1] == (1, b"")
        return secured

    with contextlib.ExitStack() as stack:
        # The handshake never comes.
        silent = connected()
        assert silent.option(STARTTLS) == [(1, b"")]
        slow = chosen()
        # To wait between requests is no offence.
        time.sleep(1.5)
        assert slow.read(0, 512) == view.read(0, 512)
        slow.socket.sendall(b"\x25")
        stalled = chosen()
        stalled.request(READ, 0, 32 * MIB)
        time.sleep(4)
        for one in (silent, slow, stalled):
            with pytest.raises((EOFError, OSError)):
                one.receive(33 * MIB)
        monkeypatch.undo()
        assert chosen().read(0, 512) == view.read(0, 512)
        server._failure = AccessError("told to end")
        server._waker.send(b"+")
    thread.join(timeout=PATIENCE)
    assert not thread.is_alive()


def test_without_settings_there_is_no_tls(xfs_dir: Path) -> None:
    with served(make_disk(xfs_dir / "disk.raw", MIB)) as running, client(running) as connection:
        connection.greet()
        assert connection.option(STARTTLS)[0][0] == UNSUPPORTED
        connection.option(ABORT)
        running.process.terminate()


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--tls", "require"], "--tls require needs --tls-certificates or --tls-psk"),
        (["--tls-verify-peer"], "--tls-verify-peer needs --tls-certificates"),
        (["--tls-certificates", "PKI", "--tls", "on", "--tls-verify-peer"], "and --tls require"),
        (["--tls-certificates", "PKI", "--tls-allow", "alice"], "--tls-allow needs --tls-verify-peer"),
        (["--tls-certificates", "NONE"], "server-cert.pem: no such file"),
        (["--tls-certificates", "BAD"], "server-key.pem: cannot be used"),
    ],
    ids=["no-keys", "verify-without", "verify-optional", "allow-without", "no-files", "bad-files"],
)
def test_settings_that_would_not_protect_are_refused(
    tmp_path: Path, authority: Authority, capsys: pytest.CaptureFixture[str], flags: list[str], error: str
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for name in ("server-cert.pem", "server-key.pem"):
        (bad / name).write_text("no certificate\n")
    places = {"PKI": str(authority.directory), "NONE": str(tmp_path), "BAD": str(bad)}
    raw = make_disk(tmp_path / "disk.raw", MIB)
    code = main(["serve", str(raw), "--socket", str(tmp_path / "s"), *(places.get(flag, flag) for flag in flags)])
    assert (code, error in (said := capsys.readouterr().err)) == (2, True), said


def test_an_encrypted_key_asks_no_terminal(tmp_path: Path, authority: Authority) -> None:
    shutil.copy(authority.directory / "server-cert.pem", tmp_path)
    key = tmp_path / "server-key.pem"
    done = tool(
        "openssl", "pkey", "-in", authority.directory / "server-key.pem", "-aes128", "-passout", "pass:x", "-out", key
    )
    assert not done.returncode, done.stderr
    with pytest.raises(UsageError, match=r"server-key\.pem: cannot be used"):
        tls.with_certificates(str(tmp_path), required=True, verify_peer=False)


# Shared keys


def test_shared_keys_are_read_as_psktool_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "keys.psk"
    for name in ("alice", "bob"):
        assert not tool("psktool", "-u", name, "-p", path).returncode
    keys = tls.read_keys(str(path))
    assert sorted(keys) == ["alice", "bob"]
    assert {len(key) for key in keys.values()} == {32}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "no key in it"),
        ("alice\n", "line 1: not a name, a colon"),
        ("\nalice:zz\n", "line 2: not a name"),
        ("alice:00ff\n", "line 1: a key of 2 bytes, 16 to 256"),
        (f":{'00' * 16}\n", "line 1: a key of 16 bytes"),
        (f"alice:{'00' * 16}\nalice:{'01' * 16}\n", "line 2: a second key of 'alice'"),
    ],
    ids=["empty", "no-colon", "no-hex", "short", "no-name", "twice"],
)
def test_files_of_keys_that_are_not_understood_are_refused(tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "keys.psk"
    path.write_text(text)
    with pytest.raises(UsageError, match=error):
        tls.read_keys(str(path))


def test_shared_keys_let_clients_in(xfs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = make_disk(xfs_dir / "disk.raw", 4 * MIB)
    known, unknown = xfs_dir / "keys.psk", xfs_dir / "others.psk"
    for path in (known, unknown):
        assert not tool("psktool", "-u", "alice", "-p", path).returncode
    if not hasattr(ssl.SSLContext, "set_psk_server_callback"):
        # Python 3.11 and 3.12 have no shared keys.
        assert main(["serve", str(raw), "--tls-psk", str(known)]) == 2
        assert "--tls-psk: the ssl module of this Python has no shared keys" in capsys.readouterr().err
        return
    with served(raw, "--tls-psk", str(known), "--persistent", on_socket=False) as running:
        uri = running.uri.replace("nbds://", "nbds://alice@")
        done = tool("nbdcopy", f"{uri}?tls-psk-file={quote(str(known))}", xfs_dir / "copy.raw")
        assert (done.returncode, done.stderr) == (0, "")
        assert digest(xfs_dir / "copy.raw") == digest(raw)
        for other, keys in ((uri, unknown), (uri.replace("alice", "eve"), known)):
            assert tool("nbdinfo", "--size", f"{other}?tls-psk-file={quote(str(keys))}").returncode


def test_names_are_those_that_openssl_has_verified() -> None:
    certificate = {
        "subject": ((("organizationName", "Example"),), (("commonName", "alice"),)),
        "subjectAltName": (("DNS", "alice.example"), ("DNS", "alice"), ("IP Address", "192.0.2.1")),
    }
    assert tls.names_of(certificate) == ["alice", "alice.example"]
    assert tls.names_of({}) == []
