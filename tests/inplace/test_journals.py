"""Journals and undo files in memory: what is written is what is read, and every bound of every field is held."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from support.journals import UNDO_FIELDS, fields_of, journal_of, rows
from vmconv.errors import ImageError
from vmconv.inplace import codec, journal, undofile
from vmconv.inplace.codec import Fields, Tables, refuse_rows
from vmconv.inplace.journal import Journal, Leftover
from vmconv.inplace.names import JOURNAL, WORKING, beside
from vmconv.inplace.syscalls import Syscalls
from vmconv.inplace.undofile import Sibling, Stamp, Undo
from vmconv.io.directory import NAME_MAX
from vmconv.model.sources import File

MARK = b"m" * 32


def given_of(**values: object) -> Fields:
    return Fields("disk", json.dumps(values).encode(), 7)


def memory(data: bytes) -> int:
    descriptor = os.memfd_create("journal")
    os.write(descriptor, data)
    return descriptor


# -- fields


@pytest.mark.parametrize(
    ("value", "right"), [(2, True), (5, True), (1, False), (6, False), (True, False), (3.0, False)]
)
def test_numbers_have_both_bounds(value: object, right: bool) -> None:
    if right:
        assert given_of(n=value).number("n", 5, 2) == value
        return
    with pytest.raises(ImageError, match=r"disk: n at 0x7: .* is not a number from 2 to 5"):
        given_of(n=value).number("n", 5, 2)


def test_the_least_number_is_zero() -> None:
    assert given_of(n=0).number("n", 5) == 0
    with pytest.raises(ImageError):
        given_of(n=-1).number("n", 5)
    with pytest.raises(ImageError):
        given_of().checked_number("n", -1, 5)


@pytest.mark.parametrize(("value", "right"), [(True, True), (False, True), (1, False), (None, False), ("x", False)])
def test_a_flag_is_a_boolean(value: object, right: bool) -> None:
    if right:
        assert given_of(f=value).flag("f") is value
        return
    with pytest.raises(ImageError, match="is not true or false"):
        given_of(f=value).flag("f")


def test_lists_are_bounded() -> None:
    assert given_of(l=[1, 2]).items("l", 2) == [1, 2]
    value: object
    for value in ([1, 2, 3], "ab", {}):
        with pytest.raises(ImageError, match="is not a list of at most 2"):
            given_of(l=value).items("l", 2)


def test_each_field_is_taken_once_and_all_are() -> None:
    found = given_of(a=1, b=2)
    assert found.has("a")
    assert found.take("a") == 1
    assert not found.has("a")
    with pytest.raises(ImageError, match="a is missing"):
        found.take("a")
    with pytest.raises(ImageError, match="'b' is unknown"):
        found.end()
    found.take("b")
    found.end()


@pytest.mark.parametrize("text", [b"", b"nonsense", b"[" * 100000, b"[]", b"5", b"null", b"\xff"])
def test_fields_are_an_object(text: bytes) -> None:
    with pytest.raises(ImageError, match="at 0x7"):
        Fields("disk", text, 7)


@pytest.mark.parametrize("value", ["raw", "q" * 32, "0-_"])
def test_formats_are_short_words(value: str) -> None:
    assert given_of(f=value).format("f") == value


@pytest.mark.parametrize("value", ["", "q" * 33, "Raw", "-raw", "raw\n", 5, None])
def test_an_invalid_format_is_refused(value: object) -> None:
    with pytest.raises(ImageError, match="is not the name of a format"):
        given_of(f=value).format("f")


@pytest.mark.parametrize("value", ["x", "x" * NAME_MAX, "...", "a b", "\udcff"])
def test_plain_names_are_taken(value: str) -> None:
    assert given_of(n=value).name("n", ["y"]) == value


@pytest.mark.parametrize(
    "value", ["", ".", "..", "a/b", "/", "a\0b", "x" * (NAME_MAX + 1), "é" * 128, "\ud800", 5, "own"]
)
def test_other_names_are_refused(value: object) -> None:
    with pytest.raises(ImageError, match=r"is not (the name of a file in|another file than)"):
        given_of(n=value).name("n", ["own"])


def test_names_are_apart() -> None:
    assert given_of(n=["a", "b"]).names("n", ()) == ("a", "b")
    assert given_of(n=[]).names("n", ()) == ()
    with pytest.raises(ImageError, match="is not a list of different names"):
        given_of(n=["a", "b", "a"]).names("n", ())
    assert len(given_of(n=[str(each) for each in range(codec.MAX_NAMES)]).names("n", ())) == codec.MAX_NAMES
    with pytest.raises(ImageError):
        given_of(n=[str(each) for each in range(codec.MAX_NAMES + 1)]).names("n", ())


MOST_ROWS = codec.MAX_BODY // 16


@pytest.mark.parametrize(
    ("value", "right"),
    [
        ({"a": [0, 2], "b": [3, 3]}, True),
        ({"a": [MOST_ROWS, 2], "b": [3, 3]}, True),
        ({"a": [MOST_ROWS + 1, 2], "b": [3, 3]}, False),
        ({"a": [1, 2], "b": [codec.MAX_BODY // 24 + 1, 3]}, False),
        ({"a": [1, 3], "b": [3, 3]}, False),
        ({"a": [1, 2, 2], "b": [3, 3]}, False),
        ({"a": [1], "b": [3, 3]}, False),
        ({"a": 5, "b": [3, 3]}, False),
        ({"a": [1, 2]}, False),
        ({"a": [1, 2], "b": [3, 3], "c": [1, 1]}, False),
        ([1, 2], False),
    ],
)
def test_shapes_of_tables_are_bounded(value: Any, right: bool) -> None:
    if right:
        assert given_of(t=value).counts("t", {"a": 2, "b": 3}) == {name: shape[0] for name, shape in value.items()}
        return
    with pytest.raises(ImageError):
        given_of(t=value).counts("t", {"a": 2, "b": 3})


def test_a_value_is_shown_in_one_line() -> None:
    assert codec._shown("x" * 78) == repr("x" * 78)
    assert codec._shown("x" * 79) == "'" + "x" * 79 + "..."
    assert codec._shown([1]) == "a list"
    assert codec._shown(None) == "None"


def test_the_limits_are_these() -> None:
    assert (codec.MAX_BODY, codec.MAX_TEXT, codec.MAX_NAMES) == (64 << 20, 8 << 20, 16384)
    assert (codec.MAX_OFFSET, codec.MAX_TIME, codec.MAX_OWNER) == (1 << 62, (1 << 63) - 1, (1 << 32) - 1)
    assert (journal.MAX_SIZE, undofile._MAX_WINDOW) == (136 + codec.MAX_BODY + 32, 8 << 20)


# -- tables


def tables_of(*numbers: int, before: int = 3) -> Tables:
    return Tables("disk", memoryview(bytes(before) + rows(*numbers)), before, 100)


def test_tables_lie_end_to_end() -> None:
    found = tables_of(1, 2, 3, 4, 5, 6, 7)
    assert found.table("a", 2, 2).tolist() == [[1, 2], [3, 4]]
    assert found.at == 3 + 32
    assert found.table("b", 1, 3).tolist() == [[5, 6, 7]]
    assert found.table("c", 0, 2).shape == (0, 2)
    with pytest.raises(ImageError, match="disk: d at 0x9f: 1 rows of 16 bytes, 0 are left"):
        found.table("d", 1, 2)
    with pytest.raises(ImageError, match="2 rows of 16 bytes, 24 are left"):
        tables_of(1, 2, 3).table("d", 2, 2)


BIG = (1 << 63) - 1


@pytest.mark.parametrize(
    ("numbers", "row"),
    [
        ((0, 100), None),
        ((99, 1), None),
        ((0, 5, 5, 5), None),
        ((5, 5, 0, 5), None),
        ((), None),
        ((0, 101), 0),
        ((100, 1), 0),
        ((101, 1), 0),
        ((0, 5, 99, 2), 1),
        ((-1, 5), 0),
        ((5, 0), 0),
        ((5, -1), 0),
        ((BIG, 1), 0),
        ((1, BIG), 0),
        ((BIG, BIG), 0),
        ((-BIG, BIG), 0),
        ((0, 6, 5, 5), 1),
        ((20, 5, 0, 6, 5, 5), 2),
        ((5, 6, 10, 1), 1),
    ],
)
def test_ranges_lie_inside_and_apart(numbers: tuple[int, ...], row: int | None) -> None:
    count = len(numbers) // 2
    if row is None:
        found = tables_of(*numbers).ranges("t", count, 100)
        assert found.reshape(-1).tolist() == list(numbers)
        return
    with pytest.raises(ImageError, match=rf"disk: t row {row} at {100 + 3 + 16 * row:#x}: "):
        tables_of(*numbers).ranges("t", count, 100)


def test_an_invalid_row_is_reported_with_its_offset() -> None:
    table = np.array([[0, 1, 2], [3, 0, 5]], dtype=np.int64)
    with pytest.raises(ImageError, match=r"what row 1 at 0x22: \[3, 0, 5\] is not a range of 9 bytes"):
        refuse_rows("what", 10, table, table[:, 0], table[:, 1], 9)


# -- journals

RANGES = np.array([[0, 3], [10, 2]], dtype=np.int64)
FULL = Journal(
    source="disk.raw",
    target="disk.vmdk",
    old_size=100,
    new_size=200,
    old_mtime=-5,
    saved=RANGES,
    old=b"12345",
    holes=RANGES + 1,
    dead=np.array([[0, 200]], dtype=np.int64),
    pieces=np.array([[1 << 40, 8, 192]], dtype=np.int64),
    later=np.array([[197, 3]], dtype=np.int64),
    new=b"abc",
    made=("disk.undo", "x"),
    leftovers=(Leftover("gone", 1 << 62, -7),),
    undo="x",
    mtime=9,
    replace=True,
    owner=(1 << 32) - 1,
)
ENTRY = beside("disk.raw", JOURNAL)


def comparable(found: NamedTuple) -> list[object]:
    """Returns the fields, with tables as lists and bytes as bytes."""
    return [
        each.tolist() if isinstance(each, np.ndarray) else bytes(each) if isinstance(each, memoryview) else each
        for each in found
    ]


@pytest.mark.parametrize("given_journal", [FULL, FULL._replace(mtime=None, owner=None, undo=None, replace=False)])
@pytest.mark.parametrize("committed", [True, False])
def test_a_journal_is_read_as_it_was_written(given_journal: Journal, committed: bool) -> None:
    encoded = given_journal.encode(lambda digest: digest[::-1])
    record = journal.commit_record(encoded)
    descriptor = memory(encoded + (record if committed else b""))
    head = journal.read_head(descriptor, "j")
    assert head == (len(encoded) - 136, record, record[::-1])
    assert head is not None
    found = journal.read(descriptor, "j", head, ENTRY)
    assert found is not None
    assert found.committed is committed
    assert comparable(found.journal) == comparable(given_journal)
    assert comparable(journal.parse(encoded, "j")) == comparable(given_journal)
    with pytest.raises(ImageError, match="has another journal"):
        journal.read(descriptor, "j", head, beside("other", JOURNAL))
    os.close(descriptor)


def test_an_incomplete_journal_is_ignored() -> None:
    encoded = FULL.encode(lambda _digest: MARK)
    for end in (0, 1, 64, 135):
        descriptor = memory(bytes(end) if end < 64 else encoded[:end])
        assert journal.read_head(descriptor, "j") is None
        os.close(descriptor)
    for data in (encoded[:136], encoded[:-1], encoded[:-1] + b"?", encoded[:200] + bytes(len(encoded) - 200)):
        descriptor = memory(data)
        head = journal.read_head(descriptor, "j")
        assert head is not None
        assert journal.read(descriptor, "j", head, ENTRY) is None
        os.close(descriptor)
    descriptor = memory(b"something else, " * 20)
    with pytest.raises(ImageError, match="is not that of a journal"):
        journal.read_head(descriptor, "j")
    os.close(descriptor)


@pytest.mark.parametrize(("length", "right"), [(codec.MAX_BODY, True), (codec.MAX_BODY + 1, False)])
def test_the_body_of_a_journal_is_bounded(length: int, right: bool) -> None:
    descriptor = memory(struct.pack("<64sQ32s32s", journal.MAGIC, length, bytes(32), bytes(32)))
    if right:
        assert journal.read_head(descriptor, "j") == (length, bytes(32), bytes(32))
    else:
        with pytest.raises(ImageError, match=f"length of the body at 0x40: {length} bytes, {codec.MAX_BODY} at most"):
            journal.read_head(descriptor, "j")
    os.close(descriptor)


def test_the_names_of_a_journal_are_all_names_of_the_disk() -> None:
    assert FULL.names == {"disk.raw", "disk.vmdk", "disk.undo", "x", "gone"}
    status = os.stat(__file__)
    assert Leftover.of("x", status) == ("x", status.st_size, status.st_mtime_ns)


PLAIN_FIELDS = fields_of(
    FULL._replace(
        **{
            name: getattr(Journal("a", "b"), name)
            for name in ("old", "new", "saved", "holes", "dead", "pieces", "later")
        }
    )
)


def body(rest: bytes = b"", **values: object) -> bytes:
    return journal_of(json.dumps({**PLAIN_FIELDS, **values}).encode(), rest)[136:-32]


def parsed(rest: bytes = b"", **values: object) -> Journal:
    return journal._parse(memoryview(body(rest, **values)), "j")


@pytest.mark.parametrize(
    "values",
    [
        {"old_size": 1 << 62, "new_size": 1 << 62},
        {"old_mtime": -BIG},
        {"old_mtime": BIG, "mtime": -BIG},
        {"mtime": BIG},
        {"owner": 0},
        {"leftovers": [["a", 0, BIG], ["b", 1 << 62, -BIG]]},
        {"carried": False, "target": "x"},
        {"undo": None, "made": []},
        {"target": "disk.raw"},
    ],
    ids=str,
)
def test_fields_of_a_journal_reach_to_their_bounds(values: dict[str, Any]) -> None:
    found = parsed(**values)
    for name, value in values.items():
        wanted = tuple(Leftover(*each) for each in value) if name == "leftovers" else value
        assert getattr(found, name) == (tuple(wanted) if name == "made" else wanted)


@pytest.mark.parametrize(
    "values",
    [
        {"old_size": (1 << 62) + 1},
        {"new_size": (1 << 62) + 1},
        {"new_size": -1},
        {"old_mtime": -BIG - 1},
        {"old_mtime": BIG + 1},
        {"mtime": -BIG - 1},
        {"mtime": BIG + 1},
        {"owner": 1 << 32},
        {"leftovers": [["a", 0, 0, 0]]},
        {"leftovers": [["a", (1 << 62) + 1, 0]]},
        {"leftovers": [["a", -1, 0]]},
        {"leftovers": [["a", 0, BIG + 1]]},
        {"leftovers": [["a", 0, -BIG - 1]]},
        {"leftovers": [["a", 0, 0], ["a", 0, 0]]},
        {"leftovers": [[beside("disk.raw", JOURNAL), 0, 0]]},
        {"made": [beside("disk.raw", WORKING)]},
        {"target": beside("disk.raw", WORKING)},
        {"target": "x"},
        {"carried": False},
        {"undo": "other"},
        {"more": 1},
    ],
    ids=str,
)
def test_journal_fields_past_their_limits_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ImageError):
        parsed(**values)


def shapes(**counts: int) -> dict[str, list[int]]:
    columns = {"saved": 2, "holes": 2, "dead": 2, "pieces": 3, "later": 2}
    return {name: [counts.get(name, 0), columns[name]] for name in columns}


@pytest.mark.parametrize(
    ("table", "numbers", "right"),
    [
        ("saved", (98, 2), True),
        ("saved", (99, 2), False),
        ("holes", (98, 2), True),
        ("holes", (99, 2), False),
        ("later", (198, 2), True),
        ("later", (199, 2), False),
        ("dead", (0, 200), True),
        ("dead", (0, 201), False),
        ("pieces", (1 << 61, 2, 198), True),
        ("pieces", ((1 << 62) - 2, 2, 198), True),
        ("pieces", ((1 << 62) - 1, 2, 198), False),
        ("pieces", (0, 2, 199), False),
        ("pieces", (0, 0, 100), False),
    ],
)
def test_tables_of_a_journal_lie_in_its_file(table: str, numbers: tuple[int, ...], right: bool) -> None:
    rest = rows(*numbers) + (b"ab" if table in ("saved", "later") else b"")
    if right:
        assert getattr(parsed(rest, tables=shapes(**{table: 1})), table).tolist() == [list(numbers)]
        return
    with pytest.raises(ImageError, match=f"{table} row 0"):
        parsed(rest, tables=shapes(**{table: 1}))


def test_dead_ranges_may_reach_to_the_end_of_the_longer_file() -> None:
    found = parsed(rows(0, 300), tables=shapes(dead=1), old_size=300)
    assert found.dead.tolist() == [[0, 300]]
    with pytest.raises(ImageError):
        parsed(rows(0, 301), tables=shapes(dead=1), old_size=300)


@pytest.mark.parametrize("left", [-1, 1])
def test_a_journal_has_as_many_bytes_as_its_ranges(left: int) -> None:
    with pytest.raises(ImageError, match=f"there are {4 + left}, its ranges are 4"):
        parsed(rows(0, 2, 0, 2) + bytes(4 + left), tables=shapes(saved=1, later=1))


@pytest.mark.parametrize("length", [0, 1 << 30, BIG])
def test_the_length_of_the_fields_is_bounded(length: int) -> None:
    with pytest.raises(ImageError, match=f"length of the fields at 0x88: {length} bytes, 12 at most"):
        journal._parse(memoryview(struct.pack("<Q", length) + bytes(12)), "j")
    with pytest.raises(ImageError, match="0 bytes, 0 at most"):
        journal._parse(memoryview(b"short"), "j")
    with pytest.raises(ImageError, match="5 bytes, 0 at most"):
        journal._parse(memoryview(struct.pack("<Q", 5)), "j")


# -- undo files


UNDO = Undo(
    source="old.raw",
    target="disk.vmdk",
    source_format="raw",
    size=65536,
    mtime=-3,
    ranges=RANGES,
    siblings=(Sibling("s", 0o640, 4),),
    made=("m",),
    metadata=np.array([[0, 8]], dtype=np.int64),
)


def test_an_undo_file_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(undofile, "PIECE", 2)
    (tmp_path / "source").write_bytes(b"0123456789abcd")
    source = File("source", os.open(tmp_path / "source", os.O_RDWR))
    descriptor = memory(b"")
    head = UNDO.head(lambda _digest: MARK)
    undofile.write(descriptor, head, [(source, 0, 3), (source, 10, 2), (source, 4, 4)], Syscalls())
    found = undofile.read_head(descriptor, "u")
    assert (found.offset + found.length, found.mark) == (len(head), MARK)
    undo = undofile.read(descriptor, "u", found, "u")
    assert comparable(undo) == comparable(UNDO)
    assert undo.restored == 5 + 4
    with undofile.unpacked(descriptor, "u", found) as following:
        assert [following(3), following(0), following(2), following(4)] == [b"012", b"", b"ab", b"4567"]
    for count, why in ((8, "are longer than the ranges"), (12, "end 3 bytes too early")):
        with pytest.raises(ImageError, match=why), undofile.unpacked(descriptor, "u", found) as following:
            following(count)
    size = os.fstat(descriptor).st_size
    last = os.pread(descriptor, 1, size - 1)
    os.pwrite(descriptor, bytes([last[0] ^ 1]), size - 1)
    with pytest.raises(ImageError, match="old bytes: "), undofile.unpacked(descriptor, "u", found) as following:
        following(9)
    with pytest.raises(ImageError, match="stamp at 0x80: its digest does not match"):
        undofile.read_stamp(descriptor, "u")
    stamp = Stamp.of(source.descriptor, np.array([[0, 5], [9, 3]], dtype=np.int64))
    status = os.fstat(source.descriptor)
    assert stamp[:2] == (14, status.st_mtime_ns)
    assert stamp.digest == codec.digest_of(b"012349ab")
    os.pwrite(descriptor, stamp.encode(), undofile.STAMP_OFFSET)
    assert undofile.read_stamp(descriptor, "u") == stamp
    assert undofile.read(descriptor, "u", found, "u").source == "old.raw"
    assert Sibling.of("s", source) == ("s", status.st_mode & 0o777, 14)
    os.fchmod(source.descriptor, 0o4755)
    assert Sibling.of("s", source).mode == 0o755
    source.close()
    os.close(descriptor)


def undo_body(rest: bytes = b"", **values: object) -> bytes:
    text = json.dumps({**UNDO_FIELDS, **values}).encode()
    return struct.pack("<Q", len(text)) + text + rest


def read_undo(data: bytes) -> Undo:
    descriptor = memory(
        undofile.MAGIC + bytes(80) + struct.pack("<Q32s32s", len(data), codec.digest_of(data), MARK) + data
    )
    try:
        return undofile.read(descriptor, "u", undofile.read_head(descriptor, "u"), "entry")
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    "values",
    [
        {"size": 1 << 62},
        {"mtime": BIG},
        {"mtime": -BIG},
        {"siblings": [["s", 0, 0], ["t", 0o777, 1 << 62]]},
        {"made": ["a", "b"]},
        {"source": "disk.vmdk"},
    ],
    ids=str,
)
def test_fields_of_an_undo_file_reach_to_their_bounds(values: dict[str, Any]) -> None:
    found = read_undo(undo_body(**values))
    for name, value in values.items():
        wanted = tuple(Sibling(*each) for each in value) if name == "siblings" else value
        assert getattr(found, name) == (tuple(wanted) if name == "made" else wanted)


@pytest.mark.parametrize(
    "values",
    [
        {"size": (1 << 62) + 1},
        {"size": -1},
        {"mtime": BIG + 1},
        {"mtime": -BIG - 1},
        {"siblings": [["s", -1, 0]]},
        {"siblings": [["s", 0o1000, 0]]},
        {"siblings": [["s", True, 0]]},
        {"siblings": [["s", 0, (1 << 62) + 1]]},
        {"siblings": [["s", 0, 0, 0]]},
        {"siblings": [["entry", 0, 0]]},
        {"siblings": [["old.raw", 0, 0]]},
        {"source": "entry"},
        {"target": "entry"},
        {"made": ["entry"]},
        {"made": ["disk.vmdk"]},
        {"tables": [0]},
        {"tables": [0, 0, 0]},
        {"tables": [MOST_ROWS + 1, 0]},
        {"more": 0},
    ],
    ids=str,
)
def test_undo_file_fields_past_their_limits_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ImageError, match=r"u: .* is (not|unknown)"):
        read_undo(undo_body(**values))


def test_tables_of_an_undo_file_are_bounded() -> None:
    found = read_undo(undo_body(rows(65534, 2, (1 << 62) - 2, 2), tables=[1, 1]))
    assert (found.ranges.tolist(), found.metadata.tolist()) == ([[65534, 2]], [[(1 << 62) - 2, 2]])
    for numbers in ((65535, 2, 0, 2), (0, 2, (1 << 62) - 1, 2)):
        with pytest.raises(ImageError, match="row 0"):
            read_undo(undo_body(rows(*numbers), tables=[1, 1]))
    with pytest.raises(ImageError, match="has 1 bytes behind its tables"):
        read_undo(undo_body(b"x"))
    for length in (0, 13, BIG):
        with pytest.raises(ImageError, match=f"{length} bytes, 12 at most"):
            read_undo(struct.pack("<Q", length) + bytes(12))
    with pytest.raises(ImageError, match="0 bytes, 0 at most"):
        read_undo(b"short")


def test_the_head_of_an_undo_file_is_checked() -> None:
    data = undo_body()
    whole = undofile.MAGIC + bytes(80) + struct.pack("<Q32s32s", len(data), codec.digest_of(data), MARK) + data
    old = undofile._OLD_MAGIC + bytes(80) + struct.pack("<Q32s", len(data), codec.digest_of(data)) + data
    head = 128 + 80 + 72
    for good, offset, mark in ((whole, head, MARK), (old, head - 32, None)):
        descriptor = memory(good)
        found = undofile.read_head(descriptor, "u")
        assert found == (offset, len(data), codec.digest_of(data), mark)
        assert undofile.read(descriptor, "u", found, "u").size == 65536
        os.ftruncate(descriptor, len(good) - 1)
        with pytest.raises(ImageError, match=f"length of the body at 0xd0: {len(data)} bytes, {len(data) - 1} at most"):
            undofile.read_head(descriptor, "u")
        os.ftruncate(descriptor, offset - 1)
        with pytest.raises(ImageError, match="is not that of an undo file"):
            undofile.read_head(descriptor, "u")
        os.close(descriptor)
    descriptor = memory(whole[:-1] + b"?")
    with pytest.raises(ImageError, match="body at 0x118: its digest does not match"):
        undofile.read(descriptor, "u", undofile.read_head(descriptor, "u"), "u")
    os.close(descriptor)
    descriptor = memory(undofile.MAGIC + bytes(40))
    with pytest.raises(ImageError, match="stamp at 0x80"):
        undofile.read_stamp(descriptor, "u")
    os.close(descriptor)


def test_the_body_of_an_undo_file_is_bounded() -> None:
    for length, right in ((codec.MAX_BODY, True), (codec.MAX_BODY + 1, False)):
        descriptor = memory(undofile.MAGIC + bytes(80) + struct.pack("<Q32s32s", length, bytes(32), MARK))
        os.ftruncate(descriptor, codec.MAX_BODY + 1000)
        if right:
            assert undofile.read_head(descriptor, "u").length == length
        else:
            with pytest.raises(ImageError, match=f"{codec.MAX_BODY} at most"):
                undofile.read_head(descriptor, "u")
        os.close(descriptor)


def test_default_fields_of_a_journal_are_empty() -> None:
    assert comparable(Journal("a", "b")) == [
        *("a", "b", 0, 0, 0, [], b"", [], [], [], [], b"", (), (), None, None),
        *(False, True, None),
    ]
