"""Publications: every format from one payload, read by QEMU; what is sent is counted by the proxy."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import vmconv
from support.containers import MIB, PAYLOAD, Container, publish, unpublish
from support.disks import QemuImg
from support.requirements import oracle_module
from support.swift import KEY, OTHER_KEY, OTHER_USER, USER
from support.variants import Variant, is_compressed, options, qemu_name, self_contained, title
from vmconv.io.registry import installed
from vmconv_swift.backend import Publication
from vmconv_swift.client import client_of
from vmconv_swift.cloud import cloud_of
from vmconv_swift.payload import Piece

METADATA = 6 * MIB
"""More than any format of such a disk needs, with the object of zeros, and manifests twice."""


def is_one_file(variant: Variant) -> bool:
    one = installed().formats[variant[0]]
    return len(one.file_names(one.options()(**options(variant)), "disk", 80 * MIB)) == 1


VARIANTS = [each for each in self_contained() if not is_compressed(each) and is_one_file(each)]


@pytest.mark.parametrize("variant", VARIANTS, ids=title)
def test_every_format_is_published_from_one_payload(
    shared: Container, disk: Path, qemu_img: QemuImg, variant: Variant, capsys: pytest.CaptureFixture[str]
) -> None:
    published = shared
    published.received()
    name = f"{title(variant)}{installed().formats[variant[0]].suffixes[0]}"
    given = ["-o", variant[1]] if variant[1] else []
    payload = published.segments()
    source, target = published.url("disk.qcow2"), published.url(name)
    assert publish("--zero-copy=require", "-O", variant[0], *given, source, target) == 0
    assert published.received() < METADATA
    assert published.segments() == payload
    assert "sent 0 B of payload" in capsys.readouterr().out
    assert vmconv.compare(str(disk), target, right_format=variant[0])
    read = published.for_qemu(name, qemu_name(variant))
    assert "identical" in qemu_img("compare", "-f", "raw", disk, read).stdout


def test_the_first_publication_sends_the_payload_once(
    container: Container, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish("--output=json", disk, *map(container.url, ("one.qcow2", "two.vmdk", "three.vhdx"))) == 0
    sent = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sent["event"] == "sent"
    # Two pieces, of which the second is padded to 1 MiB and the disk's end is in it.
    assert PAYLOAD <= sent["payload"] <= PAYLOAD + 2 * MIB
    assert container.received() == sent["payload"] + sent["metadata"]
    for name in ("one.qcow2", "two.vmdk", "three.vhdx"):
        assert vmconv.compare(str(disk), container.url(name))


def test_a_local_disk_that_was_published_is_not_sent_again(published: Container, disk: Path) -> None:
    assert publish("--zero-copy=require", disk, published.url("again.vmdk")) == 0
    assert published.received() < METADATA


def test_only_what_changed_is_sent(published: Container, disk: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.raw"
    vmconv.convert(str(disk), str(changed))
    with changed.open("r+b") as file:
        file.seek(70 * MIB)
        file.write(b"changed")
    assert publish(changed, published.url("changed.qcow2")) == 0
    assert published.received() < 5 * MIB + METADATA
    assert vmconv.compare(str(changed), published.url("changed.qcow2"))
    assert vmconv.compare(str(disk), published.url("disk.qcow2"))


def test_a_source_that_changes_after_it_was_looked_at_is_not_sent(
    container: Container,
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changing = tmp_path / "changing.raw"
    vmconv.convert(str(disk), str(changing))
    with changing.open("rb") as file:
        at = os.lseek(file.fileno(), 0, os.SEEK_DATA)
    send = Publication.send

    def sending(self: Publication, piece: Piece) -> None:
        with changing.open("r+b") as file:
            file.seek(at)
            file.write(b"changed")
        send(self, piece)

    monkeypatch.setattr(Publication, "send", sending)
    assert publish(changing, container.url("changing.qcow2")) == 1
    assert "the store received other bytes" in capsys.readouterr().err
    assert container.names() == []


def test_compressed_clusters_are_sent_decoded(container: Container, disk: Path, tmp_path: Path) -> None:
    compressed = tmp_path / "disk.qcow2"
    vmconv.convert(str(disk), str(compressed), compress=True)
    assert publish(compressed, container.url("plain.qcow2")) == 0
    assert vmconv.compare(str(disk), container.url("plain.qcow2"))
    assert publish("-o", "subformat=streamOptimized", compressed, container.url("stream.vmdk")) == 0
    assert vmconv.compare(str(disk), container.url("stream.vmdk"))


def test_payload_is_compared_on_request(published: Container, disk: Path) -> None:
    assert publish("--verify=bytes", published.url("disk.qcow2"), published.url("copy.vmdk")) == 0
    assert publish("--verify=sample", disk, published.url("copy.vhdx")) == 0
    assert publish("--verify=qemu", disk, published.url("copy.vdi")) == 2


def test_a_plan_changes_nothing(container: Container, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish("--dry-run", disk, container.url("disk.qcow2")) == 0
    assert f"it is not in {container.own} yet" in capsys.readouterr().out
    assert publish("--dry-run", "--zero-copy=require", disk, container.url("disk.qcow2")) == 3
    assert publish("--zero-copy=require", disk, container.url("disk.qcow2")) == 3
    assert container.names() == []
    assert container.swift.request("HEAD", f"/{container.own}").status == 404


def test_an_object_is_replaced_only_by_force(published: Container, disk: Path, tmp_path: Path) -> None:
    before = published.get("disk.qcow2")
    assert publish(disk, published.url("disk.qcow2")) == 4
    assert published.get("disk.qcow2") == before
    assert publish("--force", disk, published.url("disk.qcow2"), "-o", "cluster_size=128K") == 0
    assert vmconv.info(published.url("disk.qcow2"))["cluster-size"] == 128 << 10


def test_names_may_have_any_character(published: Container, disk: Path) -> None:
    assert publish(disk, published.url("a%20folder/d%C3%AFsk%23.vhd")) == 0
    assert published.names() == ["a folder/dïsk#.vhd", "disk.qcow2"]
    assert vmconv.compare(str(disk), published.url("a%20folder/d%C3%AFsk%23.vhd"))


def test_the_s3_interface_reads_it(published: Container, disk: Path) -> None:
    session = oracle_module("botocore.session").Session()
    client = session.create_client(
        "s3",
        endpoint_url=published.swift.url,
        region_name="us-east-1",
        aws_access_key_id=USER,
        aws_secret_access_key=KEY,
    )
    found = client.get_object(Bucket=published.name, Key="disk.qcow2", Range="bytes=0-99999")["Body"].read()
    assert found == published.get("disk.qcow2")[:100000]


def test_many_segments_are_in_manifests_of_manifests(
    container: Container, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vmconv_swift import client

    monkeypatch.setattr(client, "MAX_SEGMENTS", 5)
    scattered = tmp_path / "scattered.raw"
    with scattered.open("wb") as file:
        file.truncate(96 * MIB)
        for number in range(40):
            file.seek(number * 2 * MIB)
            file.write(bytes([number + 1]) * 65536)
    assert publish(scattered, container.url("scattered.raw")) == 0
    top = json.loads(container.manifest(f"{container.name}/scattered.raw").body)
    assert len(top) <= 5
    assert any(segment.get("sub_slo") for segment in top)
    assert container.get("scattered.raw") == scattered.read_bytes()
    # What refers to payload names objects, not manifests.
    container.received()
    assert publish("--zero-copy=require", container.url("scattered.raw"), container.url("scattered.vmdk")) == 0
    assert container.received() < METADATA
    assert vmconv.compare(str(scattered), container.url("scattered.vmdk"))


def test_long_holes_are_few_segments(container: Container, tmp_path: Path) -> None:
    long = tmp_path / "long.raw"
    with long.open("wb") as file:
        file.truncate(64 << 30)
        file.write(b"begin")
        file.seek((64 << 30) - 512)
        file.write(b"end")
    assert publish(long, container.url("long.raw")) == 0
    assert len(json.loads(container.manifest(f"{container.name}/long.raw").body)) < 40
    assert vmconv.compare(str(long), container.url("long.raw"))
    rows = vmconv.map_disk(container.url("long.raw"))
    assert [(row.start, row.length) for row in rows if row.data] == [(0, 4096), ((64 << 30) - 4096, 4096)]


def test_memory_is_not_published(container: Container, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "memory.ram").write_bytes(bytes(MIB))
    assert publish("-f", "ram", "-O", "ram", tmp_path / "memory.ram", container.url("memory.ram")) == 2
    assert "only disks become objects" in capsys.readouterr().err


def test_a_disk_without_payload_is_published(container: Container, tmp_path: Path) -> None:
    path = tmp_path / "empty.raw"
    with path.open("wb") as file:
        file.truncate(MIB + 512)
    assert publish(path, container.url("empty.raw"), container.url("empty.vhdx")) == 0
    assert container.get("empty.raw") == bytes(MIB + 512)
    assert vmconv.compare(str(path), container.url("empty.vhdx"))
    assert container.segments() == []


def test_who_may_only_read_publishes_nothing(
    container: Container, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The container's readers are those of vmconv's container too, and are refused before anything is sent."""
    swift = container.swift
    readers = {"X-Container-Read": "other:tester,.rlistings"}
    assert swift.request("POST", f"/{container.name}", headers=readers).status == 204
    assert publish(disk, container.url("disk.qcow2")) == 0
    before = container.names(), container.names(container.own)
    monkeypatch.setenv("OS_STORAGE_URL", swift.storage_url)
    monkeypatch.setenv("OS_AUTH_TOKEN", swift.token(OTHER_USER, OTHER_KEY))
    for once in (client_of, cloud_of):
        once.cache_clear()
    source = f"swift://-/{container.name}/disk.qcow2"
    assert vmconv.compare(str(disk), source)
    capsys.readouterr()
    container.received()
    for given in (disk, source):
        assert publish("-q", given, f"swift://-/{container.name}/new.vmdk") == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("Forbidden Access was denied to this resource.")
    assert unpublish(source) == 1
    assert container.received() == 0
    assert (container.names(), container.names(container.own)) == before
    for once in (client_of, cloud_of):
        once.cache_clear()
