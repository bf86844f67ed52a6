"""A store with TLS: its certificate is verified by the authority that clouds.yaml names, and by no other."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Mapping
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import vmconv
from support.containers import Container, publish
from support.requirements import oracle_program
from support.scripted import Asked, scripted_server
from support.swift import KEY, USER, Swift
from support.tls import certified, in_front_of
from vmconv.errors import UsageError, VmconvError
from vmconv_swift import client, cloud
from vmconv_swift.client import Client
from vmconv_swift.cloud import Cloud
from vmconv_swift.names import ObjectName


@pytest.fixture
def fresh() -> None:
    """Sessions are kept for the process."""
    for kept in (client.client_of, cloud.cloud_of):
        kept.cache_clear()


def _clouds(directory: Path, swift: Swift, port: int, lines: Mapping[str, str]) -> Path:
    """Returns a clouds.yaml with clouds behind a port, each with a line of its own."""
    path, text = directory / "clouds.yaml", "clouds:\n"
    for name, line in lines.items():
        text += (
            f"  {name}:\n    auth_type: v1password\n    {line}\n    region_name: ''\n"
            f"    object_store_endpoint_override: https://127.0.0.1:{port}{urlsplit(swift.storage_url).path}\n"
            f"    auth:\n      auth_url: {swift.auth_url}\n      username: {USER}\n      password: {KEY}\n"
        )
    path.write_text(text)
    return path


@pytest.mark.usefixtures("fresh")
def test_the_certificate_is_that_of_the_named_authority(
    container: Container,
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    swift = container.swift
    mine, other = tmp_path / "mine.pem", tmp_path / "other.pem"
    context = certified(mine)
    certified(other)
    with in_front_of(urlsplit(swift.url).port or 0, context) as port:
        authorities = {"mine": f"cacert: {mine}", "other": f"cacert: {other}", "none": "verify: true"}
        clouds = _clouds(tmp_path, swift, port, authorities)
        monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(clouds))
        assert publish(disk, f"swift://mine/{container.name}/disk.qcow2") == 0, capsys.readouterr().err
        assert vmconv.compare(str(disk), f"swift://mine/{container.name}/disk.qcow2")
        before = container.names()
        for name in ("other", "none"):
            assert publish(disk, f"swift://{name}/{container.name}/other.qcow2") == 1
            said = capsys.readouterr().err
            assert "the store's certificate is refused" in said
            assert "hint: cacert" in said
            with pytest.raises(VmconvError, match="the store's certificate is refused"):
                vmconv.info(f"swift://{name}/{container.name}/disk.qcow2")
        assert container.names() == before


@pytest.mark.usefixtures("fresh")
def test_a_store_may_ask_for_a_certificate(
    container: Container,
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both what publishes and what reads by ranges show it."""
    theirs, mine = tmp_path / "theirs.pem", tmp_path / "mine.pem"
    context = certified(theirs)
    certified(mine)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(mine)
    with in_front_of(urlsplit(container.swift.url).port or 0, context) as port:
        authority = f"cacert: {theirs}"
        own = f"{authority}\n    cert: {mine}\n    key: {mine.with_suffix('.key')}"
        clouds = _clouds(tmp_path, container.swift, port, {"mine": own, "none": authority})
        monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(clouds))
        assert publish(disk, f"swift://mine/{container.name}/disk.qcow2") == 0, capsys.readouterr().err
        assert vmconv.compare(str(disk), f"swift://mine/{container.name}/disk.qcow2")
        with pytest.raises(VmconvError, match="swift://none/"):
            vmconv.info(f"swift://none/{container.name}/disk.qcow2")


def test_the_passphrase_of_a_key_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSSL would wait at the terminal."""
    certificate, locked = tmp_path / "mine.pem", tmp_path / "locked.key"
    certified(certificate)
    lock = [oracle_program("openssl"), "rsa", "-aes256", "-passout", "pass:secret"]
    subprocess.run([*lock, "-in", certificate.with_suffix(".key"), "-out", locked], check=True, capture_output=True)
    asked_for = []
    monkeypatch.setenv("OS_STORAGE_URL", "https://127.0.0.1/v1/AUTH_x")
    monkeypatch.setenv("OS_AUTH_TOKEN", "token")
    made = Cloud("-")
    monkeypatch.setattr(made, "_access", made._access._replace(own=(str(certificate), str(locked))))
    load = ssl.SSLContext.load_cert_chain

    def loaded(self: ssl.SSLContext, certificate: str, key: str, password: Any = None) -> None:
        asked_for.append(password is None)
        load(self, certificate, key, password=password or (lambda: ""))

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", loaded)
    with pytest.raises(UsageError, match=r"mine\.pem: cannot be read as a certificate with its key"):
        made.context()
    assert asked_for == [False]


def test_bytes_that_tls_has_decrypted_are_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body where none belongs, after HEAD: the next request would begin with the rest of it."""

    def answer(asked: Asked) -> None:
        if asked.command == "HEAD":
            head = f"HTTP/1.1 200 OK\r\nContent-Length: 12000\r\nETag: {'0' * 32}\r\nDate: {formatdate()}\r\n\r\n"
            asked.wfile.write(head.encode() + bytes(12000))
        else:
            asked.say(201, ETag=asked.take())

    authority = tmp_path / "mine.pem"
    context = certified(authority)
    with scripted_server(answer) as behind, in_front_of(behind, context) as port:
        monkeypatch.setenv("OS_STORAGE_URL", f"https://127.0.0.1:{port}/v1/AUTH_x")
        monkeypatch.setenv("OS_AUTH_TOKEN", "token")
        monkeypatch.setenv("OS_CACERT", str(authority))
        made = Client(Cloud("-"))
        assert made.head(ObjectName("c", "o"))
        made.put(ObjectName("c", "o"), b"content")
        assert made.requests == 2
        made.cloud.close()
