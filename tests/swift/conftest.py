"""A container of a running Swift, and a disk to publish."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.containers import MIB, Container, publish
from support.swift import Swift
from vmconv.io.schemes import http
from vmconv.testing.disks import random_bytes
from vmconv_swift import client


@pytest.fixture(scope="session", autouse=True)
def cloud(swift: Swift) -> Iterator[None]:
    """The configuration of OpenStack's client has the test's cloud."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OS_CLIENT_CONFIG_FILE", str(swift.clouds))
        for module in (client, http):
            patch.setattr(module, "PAUSE", 0.01)
        yield


@pytest.fixture
def container(swift: Swift) -> Container:
    return Container(swift)


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk of more than one piece, with payload at both ends and holes between."""
    path = tmp_path_factory.mktemp("swift") / "disk.raw"
    with path.open("wb") as file:
        file.truncate(80 * MIB)
        for offset, length in ((0, 3 * MIB + 512), (62 * MIB, 4 * MIB), (80 * MIB - 4096, 4096)):
            file.seek(offset)
            file.write(random_bytes(length, offset))
    return path


@pytest.fixture
def published(container: Container, disk: Path, capsys: pytest.CaptureFixture[str]) -> Container:
    """The container with the disk published as qcow2."""
    assert publish(disk, container.url("disk.qcow2")) == 0, capsys.readouterr().err
    container.received()
    capsys.readouterr()
    return container


@pytest.fixture(scope="module")
def shared(swift: Swift, disk: Path) -> Container:
    """A container with the disk published as qcow2, for tests that only add to it."""
    made = Container(swift)
    assert publish(disk, made.url("disk.qcow2")) == 0
    return made
