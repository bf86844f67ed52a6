"""A node in one file: what is in it, who may read it, what is made of it, and what is refused."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import pytest

from fleet.pairs import pair
from vmconv_fleet import config as settings
from vmconv_fleet.config import NodeConfig
from vmconv_fleet.errors import FleetError
from vmconv_fleet.node.backup import DATABASE, LIMITS, restore_backup, write_backup
from vmconv_fleet.node.marks import RESTORED
from vmconv_fleet.replication.database import open_reader, open_writer, prepare
from vmconv_fleet.replication.replica import Replica, Timing
from vmconv_fleet.replication.store import Store
from vmconv_fleet.testing import Lab
from vmconv_fleet.trust import credentials
from vmconv_fleet.trust.authority import Authority


@pytest.fixture
def node(lab: Lab) -> NodeConfig:
    """A node with the authority, an unused invitation and a database that is open."""
    config = lab.add()
    Authority.load(config.directory).make_token()
    with closing(open_writer(config.database)) as connection:
        prepare(connection, config.node)
        connection.execute("INSERT INTO meta VALUES ('test', 'before')")
    return config


def restored(path: Path, directory: Path) -> NodeConfig:
    directory.mkdir(0o700)
    return restore_backup(str(path), str(directory))


def value(config: NodeConfig) -> str:
    with closing(open_reader(config.database)) as connection:
        (found,) = connection.execute("SELECT value FROM meta WHERE name = 'test'").fetchone()
    return str(found)


def test_a_node_is_restored_as_it_was(node: NodeConfig, tmp_path: Path) -> None:
    with closing(open_writer(node.database)) as running:
        running.execute("UPDATE meta SET value = 'now' WHERE name = 'test'")
        write_backup(node, str(tmp_path / "backup"))
        running.execute("UPDATE meta SET value = 'later' WHERE name = 'test'")
    assert (tmp_path / "backup").stat().st_mode & 0o777 == 0o600
    shutil.rmtree(node.directory)
    config = restored(tmp_path / "backup", Path(node.directory))
    assert config == settings.load(node.directory) == node
    assert value(config) == "now"
    assert credentials.load(config).bound.node == node.node
    assert Authority.load(config.directory).fleet == "lab"
    assert Path(config.path(RESTORED)).exists()
    files = [path for path in Path(config.directory).rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert not list(Path(config.directory).rglob("tokens.json"))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_backup_replaces_no_file_and_follows_no_link(node: NodeConfig, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("there", "link"):
        with pytest.raises(FleetError):
            write_backup(node, str(tmp_path / name))
    assert (tmp_path / "there").read_text() == "precious"
    assert not (tmp_path / "elsewhere").exists()


def test_nothing_is_left_of_a_backup_that_failed(node: NodeConfig, tmp_path: Path) -> None:
    Path(node.path("ca.pem")).unlink()
    with pytest.raises(FleetError):
        write_backup(node, str(tmp_path / "backup"))
    assert not (tmp_path / "backup").exists()


Edit = Callable[[dict[str, tarfile.TarInfo], dict[str, bytes]], None]


def _named(name: str) -> Edit:
    def edit(members: dict[str, tarfile.TarInfo], contents: dict[str, bytes]) -> None:
        members["more"], contents["more"] = tarfile.TarInfo(name), b""

    return edit


def _typed(kind: bytes) -> Edit:
    def edit(members: dict[str, tarfile.TarInfo], contents: dict[str, bytes]) -> None:
        members["ca.pem"].type, members["ca.pem"].linkname, members["ca.pem"].size = kind, "/etc/passwd", 0
        contents["ca.pem"] = b""

    return edit


def _without(name: str) -> Edit:
    def edit(members: dict[str, tarfile.TarInfo], _contents: dict[str, bytes]) -> None:
        del members[name]

    return edit


def _with(name: str, content: bytes) -> Edit:
    def edit(members: dict[str, tarfile.TarInfo], contents: dict[str, bytes]) -> None:
        members[name].size, contents[name] = len(content), content

    return edit


BAD: Mapping[str, Edit] = {
    "above": _named("../outside"),
    "absolute": _named("/tmp/vmconv-outside"),
    "unknown": _named("jobs/x"),
    "twice": _named("ca.pem"),
    "symlink": _typed(tarfile.SYMTYPE),
    "hard link": _typed(tarfile.LNKTYPE),
    "device": _typed(tarfile.CHRTYPE),
    "pipe": _typed(tarfile.FIFOTYPE),
    "no key": _without("identity/tls.key"),
    "large": _with("ca.pem", b"x" * (LIMITS["ca.pem"] + 1)),
    "key of another": _with("identity/signing.key", b"no key"),
    "no settings": _with("node.toml", b"\xff"),
    "no database": _with(DATABASE, b"no database" * 1000),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_backup_is_refused(what: str, node: NodeConfig, tmp_path: Path) -> None:
    write_backup(node, str(tmp_path / "good"))
    with tarfile.open(tmp_path / "good") as tar:
        members = {member.name: member for member in tar}
        contents = {name: _content(tar, member) for name, member in members.items()}
    BAD[what](members, contents)
    with tarfile.open(tmp_path / "bad", "w") as tar:
        for name, member in members.items():
            tar.addfile(member, io.BytesIO(contents[name]))
    with pytest.raises(FleetError):
        restored(tmp_path / "bad", tmp_path / "in")
    assert not (tmp_path / "outside").exists()


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


@pytest.mark.parametrize("part", [0, 1, 511, 700, 20_000])
def test_a_part_of_a_backup_is_refused(part: int, node: NodeConfig, tmp_path: Path) -> None:
    write_backup(node, str(tmp_path / "good"))
    (tmp_path / "part").write_bytes((tmp_path / "good").read_bytes()[:part])
    with pytest.raises(FleetError):
        restored(tmp_path / "part", tmp_path / "in")


def test_an_old_database_continues_the_history_that_neighbours_have() -> None:
    """As the daemon restores it: without limit, until a neighbour has shown the records written since."""
    fleet, one, other = pair()
    one.write("note", "a", {"text": "1"})
    fleet.flow(500)
    old = open_writer(":memory:")
    one.disk.backup(old)
    for number in range(5):
        one.write("note", f"b{number}", {})
    fleet.flow(500)
    last = other.replica.store.position(one.id)
    fleet.cut(one, other)
    one.disk = old
    one.replica = Replica(
        Store(old, one.id), one.signer, one.trust, one.wall, monotonic=lambda: fleet.time, timing=Timing(patience=None)
    )
    fleet.flow(3_600_000)
    serving = [one.replica.serving]
    fleet.link(one, other)
    fleet.flow(5000)
    assert [*serving, one.replica.serving] == [False, True]
    one.write("note", "c", {})
    fleet.flow(500)
    assert one.body(one, "note", "b4") == other.body(one, "note", "b4") == {}
    assert one.replica.store.positions() == other.replica.store.positions()
    assert other.replica.store.position(one.id) > last
    assert one.problems() == other.problems() == []
