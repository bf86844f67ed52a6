"""The servers of `support/swift.py`: what other tests take for granted about them."""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request

import pytest

from support.requirements import oracle_module
from support.swift import CLOUD, OTHER_USER, Swift
from vmconv.testing.disks import random_bytes

MIB = 1 << 20


@pytest.fixture(scope="module")
def parts(swift: Swift) -> bytes:
    """Bytes of the object /payload/part."""
    data = random_bytes(2 * MIB)
    assert swift.request("PUT", "/payload").status == 201
    assert swift.request("PUT", "/payload/part", data).status == 201
    return data


def manifest(*ranges: str) -> bytes:
    return json.dumps([{"path": "/payload/part", "range": one} for one in ranges]).encode()


def test_a_large_object_is_ranges_of_another(swift: Swift, parts: bytes) -> None:
    stored = swift.stored()
    made = swift.request("PUT", "/payload/large?multipart-manifest=put", manifest("3-99", "0-1048576", "-5"))
    assert made.status == 201
    wanted = parts[3:100] + parts[: MIB + 1] + parts[-5:]
    assert swift.request("GET", "/payload/large").body == wanted
    assert swift.request("GET", "/payload/large", headers={"Range": "bytes=95-99"}).body == wanted[95:100]
    assert swift.stored() - stored < 4096
    assert swift.request("PUT", "/payload/none?multipart-manifest=put", manifest("4194304-4194305")).status == 400


def test_what_was_sent_is_counted(swift: Swift, parts: bytes) -> None:
    before = len(swift.logged())
    assert swift.request("PUT", "/payload/a%20name", parts[:1000]).status == 201
    assert swift.request("GET", "/payload/a%20name").body == parts[:1000]
    mine = [one for one in swift.logged()[before:] if one.source == "-"]
    assert [(one.method, one.path.rpartition("/")[2], one.status, one.received, one.sent) for one in mine] == [
        ("PUT", "a%20name", 201, 1000, 0),
        ("GET", "a%20name", 200, 0, 1000),
    ]


def test_temporary_urls_need_no_token(swift: Swift, parts: bytes) -> None:
    with urllib.request.urlopen(swift.temporary_url("/payload/part")) as answer:
        assert answer.read() == parts
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{swift.storage_url}/payload/part")
    assert swift.request("GET", "/payload/part", user=OTHER_USER).status == 403


@pytest.mark.parametrize("name", ["object", "proxy"])
def test_a_server_that_is_killed_starts_again(swift: Swift, parts: bytes, name: str) -> None:
    swift.kill(name)
    try:
        if name == "proxy":
            with pytest.raises(ConnectionRefusedError):
                swift.request("GET", "/payload/part")
        else:
            assert swift.request("GET", "/payload/part").status == 503
    finally:
        swift.start(name)
    assert hashlib.sha256(swift.request("GET", "/payload/part").body).digest() == hashlib.sha256(parts).digest()


# openstacksdk 4.22 warns of a setting that nobody has made.
@pytest.mark.filterwarnings("ignore:Support for InfluxDB")
def test_openstacksdk_signs_in(swift: Swift, parts: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    openstack = oracle_module("openstack")
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(swift.clouds))
    with openstack.connect(CLOUD) as connection:
        answer = connection.object_store.get("/payload/part", headers={"Range": "bytes=0-9"})
        assert (answer.status_code, answer.content) == (206, parts[:10])
