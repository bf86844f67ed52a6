"""Manifests that something else has made, and payload that is not vmconv's: bounded, checked, never referred to."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from hashlib import md5
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import vmconv
from support.containers import MIB, Container, publish, unpublish
from support.swift import CLOUD
from vmconv.errors import ImageError, ReadError, VmconvError
from vmconv.testing.disks import random_bytes
from vmconv_swift import manifest
from vmconv_swift.client import Client, _rows
from vmconv_swift.cloud import cloud_of
from vmconv_swift.manifest import body_of, etag_of, parsed, windows_of
from vmconv_swift.names import ObjectName

ETAG = md5(b"x").hexdigest()
ROW = {"name": "/c/o", "bytes": 10, "hash": ETAG}


@pytest.mark.parametrize(
    "rows",
    [
        {"name": "/c/o"},
        [1],
        [ROW | {"name": 1}],
        [ROW | {"name": "object"}],
        [ROW | {"bytes": -1}],
        [ROW | {"bytes": 1 << 63}],
        [ROW | {"bytes": True}],
        [ROW | {"bytes": "10"}],
        [ROW | {"hash": "x"}],
        [ROW | {"hash": None}],
        [ROW | {"range": "0-10"}],
        [ROW | {"range": "5-4"}],
        [ROW | {"range": "-1"}],
        [ROW | {"range": 5}],
        [ROW | {"range": "9" * 30 + "-" + "9" * 30}],
        [{"data": "!"}],
        [ROW | {"bytes": 1 << 61}] * 3,
    ],
    ids=str,
)
def test_a_manifest_without_sense_is_an_error(rows: Any) -> None:
    with pytest.raises(ImageError, match=r"manifest|segments"):
        parsed(json.dumps(rows).encode(), "swift://cloud/c/object")


def test_deep_json_is_an_error() -> None:
    with pytest.raises(ImageError):
        parsed(b"[" * 100000, "swift://cloud/c/object")


ENTRY = {"name": "o", "bytes": 10, "hash": ETAG, "last_modified": "2026-11-30T10:00:00.000000"}


@pytest.mark.parametrize(
    "rows",
    [
        1,
        [1],
        [ENTRY | {"bytes": -1}],
        [ENTRY | {"bytes": 1 << 70}],
        [ENTRY | {"bytes": 1e400}],
        [ENTRY | {"last_modified": "yesterday"}],
        [ENTRY | {"last_modified": 5}],
        [{"subdir": "x/"}],
    ],
    ids=str,
)
def test_a_listing_without_sense_is_an_error(rows: Any) -> None:
    with pytest.raises(ReadError, match="listing cannot be understood"):
        _rows(json.dumps(rows).encode(), "swift://cloud/c")


def test_a_listing_states_the_etags_of_objects() -> None:
    plain, large = _rows(json.dumps([ENTRY, ENTRY | {"slo_etag": f'"{"f" * 32}"'}]).encode(), "swift://cloud/c")
    assert (plain.etag, large.etag) == (ETAG, "f" * 32)


def test_a_deep_listing_is_an_error() -> None:
    with pytest.raises(ReadError, match="listing cannot be understood"):
        _rows(b"[" * 100000, "swift://cloud/c")


class Store:
    """The client of a store that has only manifests."""

    def __init__(self, **manifests: list[dict[str, Any]]) -> None:
        self.manifests = manifests
        self.reads = 0

    def shown(self, where: ObjectName) -> str:
        return f"swift://cloud{where.path}"

    def read(self, where: ObjectName, limit: int, query: str = "") -> bytes:
        assert query == "?multipart-manifest=get"
        self.reads += 1
        return json.dumps(self.manifests[where.name]).encode()

    def windows(self, name: str) -> list[manifest.Window]:
        segments = parsed(json.dumps(self.manifests[name]).encode(), name)
        size = sum(segment.length for segment in segments)
        return windows_of(self, ObjectName("c", name), etag_of(segments), size)  # type: ignore[arg-type]


def inner(name: str, size: int, etag: str = ETAG, **more: Any) -> dict[str, Any]:
    return {"name": f"/c/{name}", "bytes": size, "hash": etag, "sub_slo": True, **more}


def test_manifests_inside_each_other_end() -> None:
    rows: dict[str, list[dict[str, Any]]] = {"m0": [ROW]}
    for number in range(1, 12):
        below = parsed(json.dumps(rows[f"m{number - 1}"]).encode(), "")
        rows[f"m{number}"] = [inner(f"m{number - 1}", 10, etag_of(below))]
    assert len(Store(**rows).windows("m9")) == 1
    with pytest.raises(ImageError, match="is inside of 10 manifests"):
        Store(**rows).windows("m10")


def test_many_ranges_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few manifests of a few kilobytes, which multiply."""
    monkeypatch.setattr(manifest, "MAX_LEAVES", 5000)
    rows: dict[str, list[dict[str, Any]]] = {"m0": [ROW | {"range": "0-0"}] * 100}
    for number in range(1, 6):
        below = parsed(json.dumps(rows[f"m{number - 1}"]).encode(), "")
        size = sum(segment.length for segment in below)
        rows[f"m{number}"] = [inner(f"m{number - 1}", size, etag_of(below))] * 100
    store = Store(**rows)
    with pytest.raises(ImageError, match="more than 5000 ranges"):
        store.windows("m4")
    # Each manifest is read once.
    assert store.reads <= 5
    monkeypatch.setattr(manifest, "MAX_MANIFESTS", 3)
    with pytest.raises(ImageError, match="more than 3 manifests"):
        Store(**rows).windows("m4")


@pytest.mark.parametrize(
    "stated", [inner("m0", 10), inner("m0", 11, etag_of(parsed(json.dumps([ROW]).encode(), "")))], ids=["etag", "size"]
)
def test_an_inner_manifest_that_was_replaced_is_an_error(stated: dict[str, Any]) -> None:
    with pytest.raises(ImageError, match="is not the manifest that was referred to"):
        Store(m0=[ROW], m1=[stated]).windows("m1")


def test_inline_data_is_no_leaf() -> None:
    (window,) = Store(m0=[{"data": "eHh4"}]).windows("m0")
    assert window == (None, 0, 3)


# -- with a real store


def put_manifest(container: Container, name: str, rows: list[dict[str, Any]]) -> None:
    body = json.dumps(rows).encode()
    answer = container.swift.request("PUT", f"/{container.name}/{name}?multipart-manifest=put", body)
    assert answer.status == 201, answer.body


def test_a_loop_of_manifests_is_an_error(container: Container) -> None:
    container.put("part", bytes(MIB))
    put_manifest(container, "one.raw", [{"path": f"/{container.name}/part"}])
    put_manifest(container, "two.raw", [{"path": f"/{container.name}/one.raw"}])
    put_manifest(container, "one.raw", [{"path": f"/{container.name}/two.raw"}])
    with pytest.raises(VmconvError):
        vmconv.convert(container.url("two.raw"), "/nonexistent/target.raw")
    assert publish("--adopt", container.url("two.raw"), container.url("copy.qcow2")) == 1
    assert "copy.qcow2" not in container.names()


def test_payload_of_others_is_copied_unless_it_is_adopted(
    container: Container, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    container.put("theirs.raw", disk.read_bytes())
    source = container.url("theirs.raw")
    assert publish("--zero-copy=require", source, container.url("mine.qcow2")) == 3
    assert f"it is in {container.name}, which is not vmconv's own container" in capsys.readouterr().err
    container.received()
    assert publish("--adopt", "--zero-copy=require", source, container.url("adopted.qcow2")) == 0
    assert container.received() < 8 * MIB
    assert container.segments() == []
    assert publish(source, container.url("mine.qcow2")) == 0
    assert container.received() > 60 * MIB
    assert len(container.segments()) == 2
    for name in ("adopted.qcow2", "mine.qcow2"):
        assert vmconv.compare(str(disk), container.url(name))
    # What was adopted goes with its owner's object, and that is an error for readers.
    container.put("theirs.raw", b"other")
    with pytest.raises(VmconvError, match=f"its segment /{container.name}/theirs.raw has changed"):
        vmconv.compare(str(disk), container.url("adopted.qcow2"))
    assert vmconv.compare(str(disk), container.url("mine.qcow2"))


def test_an_object_does_not_become_part_of_itself(container: Container, disk: Path) -> None:
    container.put("disk.raw", disk.read_bytes())
    assert publish("--adopt", "--force", container.url("disk.raw"), container.url("disk.raw")) == 1
    assert container.get("disk.raw") == disk.read_bytes()


def test_payload_of_another_publication_is_not_referred_to(published: Container, disk: Path) -> None:
    other = Container(published.swift)
    assert publish("--zero-copy=require", published.url("disk.qcow2"), other.url("disk.vmdk")) == 3
    assert publish(published.url("disk.qcow2"), other.url("disk.vmdk")) == 0
    assert len(other.segments()) == 2
    assert vmconv.compare(str(disk), other.url("disk.vmdk"))


def test_a_container_of_somebody_else_is_left_alone(container: Container, disk: Path) -> None:
    container.swift.request("PUT", f"/{container.own}")
    container.put("payload/theirs", b"x", container=container.own)
    assert publish(disk, container.url("disk.qcow2")) == 1
    assert unpublish("--unused", "--older-than=0s", container.url("").rstrip("/")) == 1
    assert (container.names(), container.names(container.own)) == ([], ["payload/theirs"])


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda rows: rows[1:], id="one segment less"),
        pytest.param(lambda rows: [*rows[:-1], rows[-1] | {"bytes": rows[-1]["bytes"] - 1}], id="another size"),
    ],
)
def test_a_manifest_of_another_version_is_an_error(
    published: Container, damage: Callable[[list[Any]], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Client.read

    def spoiled(self: Client, where: ObjectName, limit: int, query: str = "") -> bytes:
        data = read(self, where, limit, query)
        return json.dumps(damage(json.loads(data))).encode() if query else data

    monkeypatch.setattr(Client, "read", spoiled)
    assert publish(published.url("disk.qcow2"), published.url("copy.vmdk")) == 1
    assert published.names() == ["disk.qcow2"]


def test_a_wrong_segment_is_found_before_the_object_appears(
    published: Container, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if what makes manifests had a fault: two ranges of one piece are exchanged, which metadata does not show."""
    from vmconv_swift import backend
    from vmconv_swift.segments import placed

    def exchanged(rows: Any, size: int) -> Any:
        segments = placed(rows, size)
        large = max(segments, key=lambda segment: segment.length)
        at = segments.index(large)
        half = large.length // 2
        segments[at : at + 1] = [
            large._replace(offset=large.offset + half, length=half),
            large._replace(length=large.length - half),
        ]
        return segments

    monkeypatch.setattr(backend, "placed", exchanged)
    assert publish(published.url("disk.qcow2"), published.url("copy.vmdk")) == 1
    assert "refers to other payload than planned" in capsys.readouterr().err
    assert published.names() == ["disk.qcow2"]


def test_the_manifest_that_is_sent_is_what_its_etag_says() -> None:
    segments = parsed(json.dumps([ROW, ROW | {"range": "2-4"}]).encode(), "")
    rows = json.loads(body_of(segments))
    assert [row.get("range") for row in rows] == [None, "2-4"]
    assert etag_of(segments) == md5(f"{ETAG}{ETAG}:2-4;".encode()).hexdigest()


def test_a_long_answer_is_not_read(container: Container) -> None:
    client = Client(cloud_of(CLOUD))
    container.put("long", bytes(4 * MIB))
    where = ObjectName(container.name, "long")
    assert len(client.read(where, 4 * MIB)) == 4 * MIB
    with pytest.raises(VmconvError, match=f"long: has more than {MIB} bytes"):
        client.read(where, MIB)


def expiring(container: Container, name: str, within: str) -> None:
    answer = container.swift.request("POST", f"/{within}/{name}", headers={"X-Delete-After": "86400"})
    assert answer.status == 202
    assert "x-delete-at" in container.swift.request("HEAD", f"/{within}/{name}").headers


def test_what_expires_is_not_adopted(container: Container, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    container.put("theirs.raw", disk.read_bytes())
    expiring(container, "theirs.raw", container.name)
    assert publish("--adopt", container.url("theirs.raw"), container.url("adopted.qcow2")) == 1
    assert "theirs.raw: expires" in capsys.readouterr().err
    assert container.names() == ["theirs.raw"]
    assert publish(container.url("theirs.raw"), container.url("copied.qcow2")) == 0


@pytest.mark.parametrize("from_store", [False, True], ids=["file", "object"])
def test_payload_that_would_expire_stays_once_it_is_used(published: Container, disk: Path, from_store: bool) -> None:
    for name in (*published.segments(), f"zeros/{4 * MIB}"):
        expiring(published, name, published.own)
    assert publish(published.url("disk.qcow2") if from_store else disk, published.url("again.vmdk")) == 0
    for name in (*published.segments(), f"zeros/{4 * MIB}"):
        assert "x-delete-at" not in published.swift.request("HEAD", f"/{published.own}/{name}").headers


def test_a_segment_is_read_as_it_is_stored(container: Container) -> None:
    """It says that it is compressed, and has as many bytes as it would have decoded."""
    begin = random_bytes(100, 1)
    stored = next(
        data for count in range(200) if len(data := gzip.compress(begin + bytes(count), mtime=0)) == 100 + count
    )
    headers = {"Content-Encoding": "gzip"}
    assert container.swift.request("PUT", f"/{container.name}/part", stored, headers).status == 201
    etag = md5(stored).hexdigest()
    with pytest.raises(ReadError, match="has the Content-Encoding 'gzip'"):
        Client(cloud_of(CLOUD)).read_range(ObjectName(container.name, "part"), etag, 0, len(stored))


@pytest.mark.parametrize("kind", ["plain", "symlink", "many", "object of a prefix"])
def test_what_is_adopted_has_any_name_and_kind(container: Container, disk: Path, kind: str) -> None:
    """The segments of the source are what Swift has of every kind; what reads the publication gets their bytes."""
    data, name = disk.read_bytes(), "a/b %2F?#ä x/é&+;=.raw"
    put = container.swift.request
    here = f"/{container.name}"
    if kind == "plain":
        container.put(name, data)
    elif kind == "symlink":
        container.put("real", data)
        assert put("PUT", f"{here}/{quote(name)}", b"", {"X-Symlink-Target": f"{container.name}/real"}).status == 201
    elif kind == "object of a prefix":
        for number in range(2):
            container.put(f"part/{number}", data[number * 40 * MIB :][: 40 * MIB])
        headers = {"X-Object-Manifest": f"{container.name}/part/"}
        assert put("PUT", f"{here}/{quote(name)}", b"", headers).status == 201
    else:
        container.put("part é %41?#", data[:MIB])
        container.put("rest", data[MIB:])
        path = f"{here[1:]}/part é %41?#"
        put_manifest(container, quote(name), [{"path": path}, {"path": f"{here}/rest"}])
    # Swift reads no ranges of the last kind below a manifest: its payload is sent.
    need = "auto" if kind == "object of a prefix" else "require"
    assert publish("--adopt", f"--zero-copy={need}", container.url(quote(name)), container.url("copy.qcow2")) == 0
    assert vmconv.compare(str(disk), container.url("copy.qcow2"))
