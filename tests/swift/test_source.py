"""Objects as sources: plain and large ones, of one version, with tokens that expire."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vmconv
from support.containers import MIB, Container, publish
from support.mounting import mount_point, mounted, need_fuse
from support.swift import CLOUD
from vmconv.cli.main import main
from vmconv.errors import AccessError, ReadError, UsageError
from vmconv.interface.scheme import parse_url
from vmconv.testing.disks import random_bytes
from vmconv_swift.client import Client
from vmconv_swift.cloud import Cloud
from vmconv_swift.names import ObjectName
from vmconv_swift.remote import opened


def large(container: Container, name: str, *parts: str) -> None:
    manifest = json.dumps([{"path": f"/{container.name}/{one}"} for one in parts]).encode()
    answer = container.swift.request("PUT", f"/{container.name}/{name}?multipart-manifest=put", manifest)
    assert answer.status == 201, answer.body


def test_a_plain_object_is_converted(container: Container, disk: Path, tmp_path: Path) -> None:
    container.put("folder/disk.raw", disk.read_bytes())
    vmconv.convert(container.url("folder/disk.raw"), str(tmp_path / "disk.qcow2"))
    assert vmconv.compare(str(disk), str(tmp_path / "disk.qcow2"))


def test_an_object_is_mounted_as_files_of_every_format(shared: Container, disk: Path) -> None:
    need_fuse()
    with mount_point() as point, mounted(shared.url("disk.qcow2"), point):
        shown = point / "disk.qcow2"
        assert vmconv.compare(str(disk), str(shown / "vhdx/disk.vhdx"))
        assert vmconv.compare(str(disk), str(shown / "vmdk-monolithicFlat/disk.vmdk"))
        assert (shown / "raw/disk.raw").read_bytes() == disk.read_bytes()


def test_holes_of_what_was_published_are_known(shared: Container, disk: Path, tmp_path: Path) -> None:
    assert publish(disk, shared.url("holes.raw")) == 0
    shared.received()
    vmconv.convert(shared.url("holes.raw"), str(tmp_path / "holes.raw"))
    sent = [one.sent for one in shared.swift.logged() if one.source == "-" and "holes.raw" in one.path]
    assert sum(sent) < 12 * MIB
    assert (tmp_path / "holes.raw").read_bytes() == disk.read_bytes()


@pytest.mark.parametrize(
    "url",
    [
        "swift://vmconv-tests",
        "swift://vmconv-tests/container",
        "swift://vmconv-tests/container/",
        "swift:///container/object",
        "swift://user@vmconv-tests/container/object",
        "swift://vmconv-tests:80/container/object",
        "swift://vmconv-tests/container/object?versionId=1",
        "swift://vmconv-tests/container/../object",
        "swift://vmconv-tests/container/%2e%2e/object",
        "swift://vmconv-tests/container/a%0Ab",
    ],
)
def test_a_url_without_a_meaning_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        vmconv.info(url)


def test_what_is_not_there_is_named(container: Container) -> None:
    with pytest.raises(AccessError, match=r"missing\.raw: there is no such object"):
        vmconv.info(container.url("missing.raw"))
    with pytest.raises(AccessError, match="swift://no-such-cloud: Cloud no-such-cloud was not found"):
        vmconv.info("swift://no-such-cloud/container/object")
    container.put("empty.raw", b"")
    with pytest.raises(AccessError, match="is empty"):
        vmconv.info(container.url("empty.raw"))


def test_the_environment_is_a_cloud(container: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    container.put("disk.raw", bytes(MIB))
    monkeypatch.setenv("OS_CLOUD", CLOUD)
    assert vmconv.info(f"swift://-/{container.name}/disk.raw")["virtual-size"] == MIB


def test_a_token_of_the_environment_is_used_as_it_is(container: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    """`swift auth` prints both variables. Nobody signs in, and clouds.yaml is not read."""
    container.put("disk.raw", bytes(4 * MIB))
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("OS_STORAGE_URL", f"{container.swift.storage_url}/")
    monkeypatch.setenv("OS_AUTH_TOKEN", container.swift.token())
    where = ObjectName(container.name, "disk.raw")
    cloud = Cloud("-")
    found = Client(cloud).head(where)
    assert found and found.size == 4 * MIB
    cloud.close()
    monkeypatch.setenv("OS_AUTH_TOKEN", "expired")
    cloud = Cloud("-")
    with pytest.raises(AccessError, match="401"):
        Client(cloud).head(where)
    cloud.close()
    monkeypatch.setenv("OS_STORAGE_URL", "file:///etc")
    with pytest.raises(AccessError, match="is not the address of an object store"):
        Cloud("-")
    # They are for the environment's cloud only.
    with pytest.raises(AccessError, match="Cloud other was not found"):
        Cloud("other")


def test_a_token_that_expired_is_renewed_once(container: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    container.put("disk.raw", bytes(4 * MIB))
    tokens = [container.swift.token()]
    renewed = []
    monkeypatch.setattr(Cloud, "token", lambda _: tokens[-1])

    def renew(_: Cloud) -> None:
        renewed.append(tokens.pop())

    monkeypatch.setattr(Cloud, "renew", renew)
    object_ = opened(parse_url(container.url("disk.raw")))
    data = memoryview(bytearray(MIB))
    tokens.append("expired")
    object_.read_into(MIB, data)
    assert renewed == ["expired"]
    tokens += ["expired", "expired"]
    with pytest.raises(AccessError, match=r"disk\.raw: cannot be read at 0x200000: the server answers 401"):
        object_.read_into(2 * MIB, data)
    assert renewed == ["expired", "expired"]
    object_.close()


def test_certificates_are_always_verified(swift_without_verification: str) -> None:
    with pytest.raises(UsageError, match="verify is false"):
        Cloud(swift_without_verification)


@pytest.fixture
def swift_without_verification(container: Container, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    text = container.swift.clouds.read_text().replace(f"{CLOUD}:\n", f"{CLOUD}:\n    verify: false\n")
    (tmp_path / "clouds.yaml").write_text(text)
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(tmp_path / "clouds.yaml"))
    return CLOUD


def test_an_object_that_changes_meanwhile_is_an_error(container: Container) -> None:
    container.put("disk.raw", bytes(4 * MIB))
    object_ = opened(parse_url(container.url("disk.raw")))
    container.put("disk.raw", b"1" * 4 * MIB)
    with pytest.raises(AccessError, match="changed while it was being read"):
        object_.read_into(2 * MIB, memoryview(bytearray(MIB)))
    object_.close()


def test_a_segment_that_has_gone_or_changed_is_named(container: Container) -> None:
    for name in ("one", "two", "three"):
        container.put(name, name[0].encode() * MIB)
    large(container, "disk.raw", "one", "two", "three")
    object_ = opened(parse_url(container.url("disk.raw")))
    data = memoryview(bytearray(1024))
    container.swift.request("DELETE", f"/{container.name}/two")
    with pytest.raises(ReadError, match=f"its segment /{container.name}/two is missing"):
        object_.read_into(MIB + 512, data)
    container.put("two", b"2" * MIB)
    with pytest.raises(ReadError, match=f"its segment /{container.name}/two has changed: its ETag is"):
        object_.read_into(MIB + 512, data)
    object_.read_into(2 * MIB, data)
    assert bytes(data) == b"t" * 1024
    object_.close()
    container.swift.request("DELETE", f"/{container.name}/one")
    with pytest.raises(ReadError, match=f"its segment /{container.name}/one is missing"):
        vmconv.info(container.url("disk.raw"))


def test_check_looks_at_segments(container: Container, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four pieces, of which neither the first nor the last is damaged: those are beside metadata."""
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(256 * MIB)
        for number in range(4):
            file.seek(number * 64 * MIB)
            file.write(random_bytes(MIB, number))
    assert publish(path, container.url("disk.qcow2")) == 0
    assert main(["check", container.url("disk.qcow2")]) == 0
    capsys.readouterr()
    rows = json.loads(container.manifest(f"{container.name}/disk.qcow2").body)
    _, gone, changed, _ = (row["name"] for row in rows if "/payload/" in row["name"])
    container.swift.request("DELETE", gone)
    container.put(changed.partition("_vmconv/")[2], bytes(MIB), container=container.own)
    assert main(["check", container.url("disk.qcow2")]) == 2
    said = capsys.readouterr().out
    assert f"disk.qcow2: its segment {gone} is missing" in said
    assert f"disk.qcow2: its segment {changed} has changed" in said
