"""Bounded reading of structures: what errors say, and where fields are."""

from __future__ import annotations

import numpy as np
import pytest
from construct import Bytes, Const, Int16ul, Int32ub, Padding, Struct

from vmconv.errors import ImageError
from vmconv.fields import Structure, damaged, field_offset, read_part, table_slices
from vmconv.testing import image_file
from vmconv.testing.memory import MemoryFile

LAYOUT = Struct("magic" / Const(b"TOY!"), Padding(2), "version" / Int16ul, "size" / Int32ub, "name" / Bytes(4))
CONTENT = b"TOY!" + b"\xff\xff" + b"\x02\x00" + b"\x00\x00\x10\x00" + b"name"


def head(content: bytes = CONTENT, before: int = 0, name: str = "header") -> Structure:
    return Structure(image_file(bytes(before) + content, "disk.toy"), LAYOUT, before, name)


def text(error: ImageError) -> str:
    return str(error)


def test_an_error_names_file_part_offset_and_problem() -> None:
    file = image_file(b"", "disk.toy")
    assert text(damaged(file, "BAT entry 3", 0x4C, "5 is odd")) == "disk.toy: BAT entry 3 at 0x4c: 5 is odd"
    error = damaged(file, "BAT entry 0", 64, "5 is odd", guest=0, hint="make it even")
    assert text(error) == "disk.toy: BAT entry 0 at 0x40 (guest address 0x0): 5 is odd"
    assert error.hint == "make it even"
    assert damaged(file, "magic", 0, "none").hint is None


def test_a_part_is_read_up_to_the_end_of_the_file_and_no_further() -> None:
    file = image_file(b"0123456789", "disk.toy")
    assert read_part(file, "name", 8, 2) == b"89"
    assert read_part(file, "name", 10, 0) == b""
    with pytest.raises(ImageError) as caught:
        read_part(file, "name", 8, 3)
    assert text(caught.value) == "disk.toy: name at 0x8: 3 bytes reach past the end of the file (0xa)"


@pytest.mark.parametrize(("field", "at"), [("magic", 0), ("version", 6), ("size", 8), ("name", 12)])
def test_fields_are_where_construct_reads_them(field: str, at: int) -> None:
    assert field_offset(LAYOUT, field) == at
    assert head(before=512).offset_of(field) == 512 + at


def test_a_field_that_the_structure_has_not_has_no_offset() -> None:
    with pytest.raises(KeyError, match="colour"):
        field_offset(LAYOUT, "colour")


def test_a_structure_is_parsed_at_its_offset() -> None:
    where = head(before=100)
    values = where.parse()
    assert (values.version, values.size, values.name) == (2, 4096, b"name")
    assert (where.length, where.read()) == (16, CONTENT)


def test_given_bytes_are_parsed_without_reading() -> None:
    where = Structure(image_file(b""), LAYOUT)
    assert where.parse(data=CONTENT).size == 4096


@pytest.mark.parametrize(("missing", "inside"), [(0, True), (1, False)])
def test_a_structure_that_the_file_ends_in_is_not_inside(missing: int, inside: bool) -> None:
    assert head(CONTENT[: 16 - missing], before=8).is_inside is inside


def test_a_structure_that_the_file_ends_in_is_not_read() -> None:
    with pytest.raises(ImageError) as caught:
        head(CONTENT[:-1], before=8, name="footer").parse()
    assert text(caught.value) == "disk.toy: footer at 0x8: 16 bytes reach past the end of the file (0x17)"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "footer at 0x8: has not the signature of one"),
        (("no toy signature",), "footer at 0x8: no toy signature"),
        (("no toy signature", "version"), "version at 0xe: no toy signature"),
    ],
    ids=["default", "refusal", "field"],
)
def test_another_signature_is_refused(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ImageError) as caught:
        head(b"T0Y!" + CONTENT[4:], before=8, name="footer").parse(*arguments)
    assert text(caught.value) == f"disk.toy: {said}"
    assert caught.value.__cause__ is not None


def test_the_error_of_a_field_or_of_the_whole_structure() -> None:
    where = head(before=16)
    error = where.damaged("size", "4096 is too much", hint="use less")
    assert (text(error), error.hint) == ("disk.toy: size at 0x18: 4096 is too much", "use less")
    assert text(where.refused("is not wanted")) == "disk.toy: header at 0x10: is not wanted"


@pytest.mark.parametrize("value", [2, 3, 5])
def test_a_value_inside_its_limits_passes(value: int) -> None:
    head().limit("version", value, 2, 5)


@pytest.mark.parametrize("value", [1, 6, -1])
def test_a_value_outside_its_limits_is_refused(value: int) -> None:
    with pytest.raises(ImageError) as caught:
        head().limit("version", value, 2, 5)
    assert text(caught.value) == f"disk.toy: version at 0x6: {value} is not in 2..5"


@pytest.mark.parametrize("value", [1, 2, 8])
def test_a_power_of_two_passes(value: int) -> None:
    head().limit_power("size", value, 1, 8)


@pytest.mark.parametrize(
    ("value", "problem"), [(6, "6 is not a power of two"), (16, "16 is not in 1..8"), (0, "0 is not in 1..8")]
)
def test_no_power_of_two_or_one_outside_its_limits_is_refused(value: int, problem: str) -> None:
    with pytest.raises(ImageError) as caught:
        head().limit_power("size", value, 1, 8)
    assert text(caught.value) == f"disk.toy: size at 0x8: {problem}"


@pytest.mark.parametrize(
    ("table", "is_read"),
    [(0, False), (1024, False), (3072, False), (3584, True), (4096, True), (7168, True), (7680, True), (8192, False)],
)
def test_a_table_is_read_unless_it_is_missing_or_lies_in_a_hole(table: int, is_read: bool) -> None:
    file = MemoryFile("disk.toy", 16384)
    file.write(4096, b"x" * 4096)
    expected = file.read(table, 1024) if is_read else None
    assert list(table_slices(file, np.array([table], dtype=np.int64), 1024, 4096)) == [(0, 1, expected)]


def test_contiguous_tables_are_read_at_once() -> None:
    file = image_file(bytes(range(256)) * 64, "disk.toy")
    tables = np.array([0, 0, 1024, 2048, 3072, 8192, 7168, 0], dtype=np.int64)
    found = [(first, count, data and len(data)) for first, count, data in table_slices(file, tables, 1024, 2048)]
    assert found == [(0, 2, None), (2, 2, 2048), (4, 1, 1024), (5, 1, 1024), (6, 1, 1024), (7, 1, None)]
