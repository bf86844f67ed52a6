"""Journals and undo files of strangers, and what else others do in the directory of a conversion in place."""

from __future__ import annotations

import json
import os
import random
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.disks import MIB, make_disk
from support.inplace import contents, converted, in_place, names, run_cli
from support.journals import UNDO_FIELDS, digest, fields_of, journal_of, rows
from vmconv import api
from vmconv.errors import AccessError, ImageError, PlanError, VmconvError
from vmconv.inplace import codec, undofile
from vmconv.inplace.journal import MAGIC, Journal, Leftover, commit_record
from vmconv.inplace.names import JOURNAL, UNDO, WORKING
from vmconv.testing.malformed import time_limit

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files of other users")
BOB, ALICE = 1000, 1001
BITS = stat.S_IMODE


def undo_of(text: bytes, target: Path, rest: bytes = b"", old: bytes = b"") -> bytes:
    """Returns an undo file with right digests around any fields, for a file as it is."""
    import zstandard

    status = target.stat()
    stamp = undofile.Stamp(status.st_size, status.st_mtime_ns, digest(b"")).encode()
    body = struct.pack("<Q", len(text)) + text + rest
    head = undofile.MAGIC + stamp + struct.pack("<Q32s32s", len(body), digest(body), bytes(32))
    return head + body + zstandard.ZstdCompressor(write_checksum=True).compress(old)


PLAIN = Journal(source="disk.raw", target="new.raw")


# -- journals that somebody has put beside a file


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def link_out(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def two_names(path: Path) -> None:
    encoded = PLAIN.encode(lambda _: bytes(32))
    path.write_bytes(encoded + commit_record(encoded))
    path.with_name("other").hardlink_to(path)


def another_user_s(path: Path) -> None:
    encoded = PLAIN.encode(lambda _: bytes(32))
    path.write_bytes(encoded + commit_record(encoded))
    os.chown(path, BOB, BOB)


def writable_by_all(path: Path) -> None:
    encoded = PLAIN.encode(lambda _: bytes(32))
    path.write_bytes(encoded + commit_record(encoded))
    path.chmod(0o666)


def unmarked(path: Path) -> None:
    encoded = PLAIN.encode(lambda _: bytes(32))
    path.write_bytes(encoded + commit_record(encoded))


def holes(path: Path) -> None:
    with path.open("wb") as file:
        file.write(MAGIC + struct.pack("<Q", codec.MAX_BODY))
        file.truncate(254 * MIB)


def nonsense(text: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_bytes(journal_of(text))

    return make


NONSENSE = [
    b"[" * 100000,
    b"{" * 100000,
    b'{"tables":[]}',
    b"5",
    b"\xff\xfe",
    b"",
    b'{"old_size":1e999}',
    b'{"old_size":' + b"9" * 5000 + b"}",
    *(json.dumps({**fields_of(PLAIN), name: value}).encode() for name, value in [
        ("source", 5),
        ("source", None),
        ("source", "\ud800"),
        ("target", ["x"]),
        ("made", [["x"]]),
        ("made", "x"),
        ("made", ["x", "x"]),
        ("made", ["x"] * 20000),
        ("leftovers", [["x", 1]]),
        ("leftovers", [["x", "1", 1]]),
        ("leftovers", [["x", -1, 1]]),
        ("old_size", -1),
        ("old_size", 1 << 63),
        ("old_size", True),
        ("new_size", 1.5),
        ("mtime", "now"),
        ("owner", -1),
        ("undo", "other"),
        ("replace", 1),
        ("carried", None),
        ("carried", False),
        ("tables", {}),
        ("tables", {"saved": [1 << 70, 2]}),
        ("tables", {**fields_of(PLAIN)["tables"], "saved": [1 << 20, 2]}),
        ("tables", {**fields_of(PLAIN)["tables"], "pieces": [0, 2]}),
        ("tables", {**fields_of(PLAIN)["tables"], "saved": [-1, 2]}),
        ("more", 1),
    ]),
]  # fmt: skip

PLANTED = [
    pipe, folder, link_to_itself, link_out, two_names, writable_by_all, unmarked, holes,
    *map(nonsense, NONSENSE),
    pytest.param(another_user_s, marks=as_root),
]  # fmt: skip


@pytest.mark.parametrize("plant", [pipe, folder, link_to_itself, two_names, unmarked, holes, nonsense(NONSENSE[0])])
def test_a_planted_journal_does_not_stop_other_commands(ext4_dir: Path, plant: Callable[[Path], None]) -> None:
    """What is there is read, with a warning of one line; what is missing is just missing."""
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    plant(ext4_dir / ("disk.raw" + JOURNAL))
    before = names(ext4_dir)
    done = run_cli("info", disk)
    assert done.returncode == 0, done.stderr
    assert [line[:9] for line in done.stderr.splitlines()] == ["warning: "]
    assert names(ext4_dir) == before
    done = run_cli("info", ext4_dir / "other.raw")
    assert done.stderr == f"vmconv: {ext4_dir / 'other.raw'}: cannot be opened: No such file or directory\n"
    done = run_cli("convert", "-q", disk, ext4_dir / "new.qcow2")
    assert done.returncode == 0, done.stderr
    assert names(ext4_dir) == {*before, "new.qcow2"}


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_journal_is_not_followed(ext4_dir: Path, plant: Callable[[Path], None]) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    kept = disk.read_bytes()
    (ext4_dir / "new.raw").write_bytes(b"somebody's")
    plant(ext4_dir / ("disk.raw" + JOURNAL))
    before = names(ext4_dir)
    for given in (disk, ext4_dir / ("disk.raw" + JOURNAL)):
        with pytest.raises(VmconvError) as caught:
            api.recover(str(given))
        assert "\n" not in str(caught.value)
        assert str(ext4_dir / "disk.raw") in str(caught.value)
    error = refused_by_name(disk, ext4_dir / "new.qcow2")
    assert "is in the way of a change in place" in str(error)
    assert f"vmconv recover {disk}" in str(error.hint)
    assert names(ext4_dir) == before
    assert disk.read_bytes() == kept


def refused_by_name(source: Path, target: Path) -> VmconvError:
    """As `refused`, for a directory with things in it that cannot be read."""
    with pytest.raises(PlanError) as caught:
        in_place(source, target)
    return caught.value


@pytest.mark.parametrize("text", NONSENSE)
def test_a_trusted_journal_may_be_nonsense(ext4_dir: Path, text: bytes) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    (ext4_dir / ("disk.raw" + JOURNAL)).write_bytes(journal_of(text))
    before = contents(ext4_dir)
    with pytest.raises(ImageError, match="0x") as caught:
        api.recover(str(disk), trust=True)
    assert len(str(caught.value)) < 400
    assert contents(ext4_dir) == before


@pytest.mark.parametrize(
    ("table", "numbers", "why"),
    [
        ("saved", (0, 1 << 62), "row 0"),
        ("saved", (-1, 5), "row 0"),
        ("saved", (1 << 62, (1 << 63) - 1), "row 0"),
        ("saved", (0, 0), "row 0"),
        ("saved", (0, 8, 4, 8), "row 1 .* apart from the other"),
        ("saved", (0, 8), "bytes at .* there are 0, its ranges are 8"),
        ("holes", (0, 101), "row 0"),
        ("dead", (99, 2), "row 0"),
        ("later", (0, 101), "row 0"),
        ("pieces", (0, 8, 93), "row 0"),
        ("pieces", (-1, 8, 0), "row 0"),
    ],
)
def test_ranges_of_a_journal_lie_in_its_file(ext4_dir: Path, table: str, numbers: tuple[int, ...], why: str) -> None:
    plain = fields_of(PLAIN._replace(old_size=100, new_size=100))
    columns = 3 if table == "pieces" else 2
    plain["tables"][table] = [len(numbers) // columns, columns]
    (ext4_dir / ("disk.raw" + JOURNAL)).write_bytes(journal_of(json.dumps(plain).encode(), rows(*numbers)))
    with pytest.raises(ImageError, match=why):
        api.recover(str(ext4_dir / "disk.raw"), trust=True)


def test_a_journal_is_about_the_file_that_it_lies_beside(ext4_dir: Path) -> None:
    (ext4_dir / "other.raw").write_bytes(b"other")
    unmarked(ext4_dir / ("other.raw" + JOURNAL))
    with pytest.raises(ImageError, match=r"'disk\.raw' has another journal"):
        api.recover(str(ext4_dir / "other.raw"), trust=True)


def test_holes_cost_no_memory(ext4_dir: Path) -> None:
    """Not even with a right head and trust: what is read is bounded before it is."""
    for length, commands in ((codec.MAX_BODY, ["info", "recover"]), (253 * MIB, ["recover --trust"])):
        path = ext4_dir / ("disk.raw" + JOURNAL)
        with path.open("wb") as file:
            file.write(MAGIC + struct.pack("<Q", length))
            file.truncate(254 * MIB)
        for command in commands:
            code, used = measured(sys.executable, "-m", "vmconv", *command.split(), str(ext4_dir / "disk.raw"))
            assert code == 1
            assert used < 120 << 10


def measured(*command: str) -> tuple[int, int]:
    """Returns the exit code of a program, and the most memory that it used, KiB.

    A small process starts it: until it runs its program, a child counts as large as its parent.
    """
    starter = (
        "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:], stdout=2).returncode\n"
        "print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", starter, *command], capture_output=True, text=True, check=True, timeout=600
    )
    code, used = map(int, done.stdout.split())
    return code, used


# -- undo files


def undo_case(directory: Path, rest: bytes = b"", old: bytes = b"", text: bytes | None = None, **more: Any) -> Path:
    disk = directory / "disk.vmdk"
    disk.write_bytes(bytes(65536))
    given = text if text is not None else json.dumps({**UNDO_FIELDS, **more}).encode()
    (directory / ("disk.vmdk" + UNDO)).write_bytes(undo_of(given, disk, rest, old))
    return disk


@pytest.mark.parametrize(
    "case",
    [
        {"siblings": [["evil", 0o4755, 4]]},
        {"siblings": [["evil", 0o2755, 4]]},
        {"siblings": [["evil", 0o1755, 4]]},
        {"siblings": [[5, 0o644, 0]]},
        {"siblings": [["s", "x", 0]]},
        {"siblings": [["s", 0o644, -1]]},
        {"siblings": [["s", 0o644]]},
        {"siblings": [["s", 0o644, 0], ["s", 0o644, 0]]},
        {"siblings": [["old.raw", 0o644, 0]]},
        {"made": ["x", "x"]},
        {"made": ["disk.vmdk"]},
        {"source_format": "raw\nhint: rm"},
        {"size": 1 << 63},
        {"mtime": 1 << 64},
        {"tables": 5},
        {"tables": [0]},
        {"tables": [1 << 40, 0]},
        {"more": 1},
        {"text": b"[" * 100000},
        {"tables": [0, 1], "rest": rows(0, 1 << 63 - 1)},
        {"tables": [0, 1], "rest": rows(0, 1 << 62)},
        {"tables": [1, 0], "rest": rows(0, 65537)},
        {"tables": [2, 0], "rest": rows(0, 8, 4, 8)},
        {"rest": b"more"},
        {"tables": [1, 0], "rest": rows(0, 4096), "old": bytes(4095)},
        {"tables": [1, 0], "rest": rows(0, 4096), "old": bytes(4097)},
    ],
    ids=str,
)
def test_a_trusted_undo_file_may_be_nonsense(ext4_dir: Path, case: dict[str, Any]) -> None:
    disk = undo_case(ext4_dir, **case)
    before = contents(ext4_dir)
    with time_limit(), pytest.raises(ImageError) as caught:
        api.undo(str(disk), trust=True)
    assert "\n" not in str(caught.value)
    assert contents(ext4_dir) == before


def test_an_undo_file_without_a_mark_is_followed_only_when_it_is_trusted(ext4_dir: Path) -> None:
    disk = undo_case(ext4_dir)
    before = contents(ext4_dir)
    done = run_cli("undo", disk)
    kept = ext4_dir / ("disk.vmdk" + UNDO)
    assert done.stderr.splitlines() == [
        f"vmconv: {kept}: has no mark of this user's vmconv",
        f"  hint: if you know its origin: vmconv undo --trust {kept}",
    ]
    assert contents(ext4_dir) == before
    done = run_cli("undo", "--trust", kept)
    assert done.returncode == 0, done.stderr
    assert names(ext4_dir) == {"old.raw"}


def test_an_undo_file_of_the_first_release_must_be_trusted(ext4_dir: Path) -> None:
    disk = converted(ext4_dir)
    kept = ext4_dir / (disk.name + UNDO)
    data = kept.read_bytes()
    # The layout of 0.1: another magic, and no mark behind the digest.
    at = 128 + 80 + 40
    kept.write_bytes(data[:127] + b"\0" + data[128:at] + data[at + 32 :])
    with pytest.raises(AccessError, match="older vmconv"):
        api.undo(str(disk))
    assert api.undo(str(disk), trust=True) == str(ext4_dir / "disk.raw")
    assert (ext4_dir / "disk.raw").read_bytes() == make_disk(ext4_dir / "again.raw", MIB).read_bytes()


@pytest.mark.parametrize("plant", [pipe, folder, link_to_itself, link_out, two_names])
def test_an_undo_file_is_a_regular_file_with_one_name(ext4_dir: Path, plant: Callable[[Path], None]) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    plant(ext4_dir / ("disk.raw" + UNDO))
    for trust in (False, True):
        with pytest.raises(AccessError):
            api.undo(str(disk), trust=trust)


@as_root
def test_another_user_s_undo_file_is_not_followed(ext4_dir: Path) -> None:
    disk = converted(ext4_dir)
    os.chown(ext4_dir / (disk.name + UNDO), BOB, BOB)
    with pytest.raises(AccessError, match=f"belongs to user {BOB}"):
        api.undo(str(disk))
    os.chown(ext4_dir / (disk.name + UNDO), 0, 0)
    (ext4_dir / (disk.name + UNDO)).chmod(0o620)
    with pytest.raises(AccessError, match="may be written by others"):
        api.undo(str(disk))


def test_an_undo_file_may_be_moved_with_its_disk(ext4_dir: Path) -> None:
    disk = converted(ext4_dir)
    (ext4_dir / "sub").mkdir()
    for path in (disk, ext4_dir / (disk.name + UNDO)):
        path.rename(ext4_dir / "sub" / path.name)
    assert api.undo(str(ext4_dir / "sub" / disk.name)) == str(ext4_dir / "sub" / "disk.raw")


def test_data_that_unpacks_to_too_much_is_refused(ext4_dir: Path) -> None:
    disk = undo_case(ext4_dir, siblings=[["bomb", 0o600, 1 << 50]])
    with pytest.raises(PlanError, match=f"{1 << 50} bytes would have to be written"):
        api.undo(str(disk), trust=True)
    assert names(ext4_dir) == {"disk.vmdk", "disk.vmdk" + UNDO}


@pytest.mark.parametrize("what", ["journal", "undo"])
def test_any_change_of_a_file_is_an_error_or_does_no_harm(ext4_dir: Path, what: str) -> None:
    """With correct digests, and trusted: fields exchanged, numbers made extreme, bytes flipped."""
    rng = random.Random(11)
    kept = ext4_dir / "kept.txt"
    (ext4_dir.parent / "outside").write_bytes(b"outside")
    for _ in range(150):
        for path in ext4_dir.iterdir():
            path.unlink()
        kept.write_bytes(b"kept")
        mutate_journal(ext4_dir, rng) if what == "journal" else mutate_undo(ext4_dir, rng)
        try:
            if what == "journal":
                api.recover(str(ext4_dir / "disk.raw"), trust=True)
            else:
                api.undo(str(ext4_dir / "disk.vmdk"), trust=True)
        except VmconvError as exc:
            assert "\n" not in str(exc)
        assert kept.read_bytes() == b"kept"
        assert not any(BITS(path.stat().st_mode) & 0o7000 for path in ext4_dir.iterdir())
    assert (ext4_dir.parent / "outside").read_bytes() == b"outside"


NUMBERS = [-1, 0, 1, 7, 4096, 65536, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, 1 << 64, 1 << 200]
VALUES: list[Any] = [
    *NUMBERS,
    None,
    True,
    1.5,
    "",
    "x",
    "../outside",
    "disk.raw",
    "..",
    "a\0b",
    [],
    {},
    [[]],
    ["x", 1, 1],
]


def mutated(given: Any, rng: random.Random) -> Any:
    """Returns a value with one place of it exchanged."""
    if isinstance(given, dict) and given and rng.random() < 0.9:
        name = rng.choice(sorted(given))
        if rng.random() < 0.05:
            return {key: value for key, value in given.items() if key != name}
        return {**given, name: mutated(given[name], rng)}
    if isinstance(given, list) and given and rng.random() < 0.7:
        at = rng.randrange(len(given))
        return [*given[:at], mutated(given[at], rng), *given[at + 1 :]]
    return rng.choice(VALUES)


def mutate_journal(directory: Path, rng: random.Random) -> None:
    (directory / rng.choice(["disk.raw", "disk.raw" + WORKING, "new.raw"])).write_bytes(rng.randbytes(8192))
    plain = fields_of(PLAIN._replace(old_size=8192, new_size=8192, made=("made",), leftovers=(Leftover("x", 1, 1),)))
    plain["tables"] |= {"saved": [1, 2], "later": [1, 2], "dead": [1, 2]}
    rest = bytearray(rows(0, 512, 4096, 4096, 0, 512) + bytes(1024))
    for _ in range(rng.randrange(3)):
        plain = mutated(plain, rng)
    if rng.random() < 0.5:
        struct.pack_into("<q", rest, 8 * rng.randrange(6), rng.choice(NUMBERS[:10]))
    encoded = bytearray(journal_of(json.dumps(plain).encode(), bytes(rest), commit=rng.random() < 0.7))
    if rng.random() < 0.2:
        encoded[rng.randrange(len(encoded))] ^= 1 << rng.randrange(8)
    (directory / ("disk.raw" + JOURNAL)).write_bytes(encoded)


def mutate_undo(directory: Path, rng: random.Random) -> None:
    plain: Any = {**UNDO_FIELDS, "siblings": [["s", 0o640, 100]], "made": ["gone"], "tables": [1, 0]}
    for _ in range(rng.randrange(3)):
        plain = mutated(plain, rng)
    rest = bytearray(rows(0, 512))
    if rng.random() < 0.4:
        struct.pack_into("<q", rest, 8 * rng.randrange(2), rng.choice(NUMBERS[:10]))
    undo_case(directory, bytes(rest), bytes(rng.choice([612, 612, 100, 9999])), json.dumps(plain).encode())
    path = directory / ("disk.vmdk" + UNDO)
    data = bytearray(path.read_bytes())
    if rng.random() < 0.2:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
