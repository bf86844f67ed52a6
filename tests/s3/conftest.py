"""A bucket of a running Swift, by its S3 interface, and a disk to upload."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.buckets import MIB, Bucket
from support.requirements import oracle_module
from support.swift import KEY, USER, Swift
from vmconv.io.schemes import http
from vmconv.testing.disks import random_bytes
from vmconv_s3 import backend

oracle_module("botocore")


@pytest.fixture(scope="session", autouse=True)
def endpoint(swift: Swift, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The environment has the test's store, and nothing of the user's."""
    nothing = tmp_path_factory.mktemp("aws") / "none"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("AWS_ENDPOINT_URL_S3", swift.url),
            ("AWS_ACCESS_KEY_ID", USER),
            ("AWS_SECRET_ACCESS_KEY", KEY),
            ("AWS_REGION", "us-east-1"),
            ("AWS_CONFIG_FILE", str(nothing)),
            ("AWS_SHARED_CREDENTIALS_FILE", str(nothing)),
        ):
            patch.setenv(name, value)
        for module in (backend, http):
            patch.setattr(module, "PAUSE", 0.01)
        yield


@pytest.fixture
def bucket(swift: Swift) -> Bucket:
    return Bucket(swift)


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk of 40 MiB: payload in one long range, in a short one and at the end, and holes between."""
    path = tmp_path_factory.mktemp("s3") / "disk.raw"
    with path.open("wb") as file:
        file.truncate(40 * MIB)
        for offset, length in ((MIB, 20 * MIB), (30 * MIB, MIB), (40 * MIB - 4096, 4096)):
            file.seek(offset)
            file.write(random_bytes(length, offset))
    return path


@pytest.fixture(scope="module")
def shared(swift: Swift, disk: Path) -> Bucket:
    """A bucket with the disk as one raw object, for tests that only add to it."""
    made = Bucket(swift)
    made.put("disk.raw", disk.read_bytes())
    return made
