"""Reads HyperVStorage, the container of `.vmcx` and `.vmrs`: a tree of named, typed values.

    0, 4096   two headers; the valid one with the higher sequence number counts
    8192      object table; its last entry may lead to another one
    .         key tables: nodes and values, each with the place of its parent
    .         file objects: values of 2048 bytes and more
    .         replay log: changes that are to be applied before reading

Microsoft publishes the format in openvmm, support/hvs_file/FORMAT.md. All checksums are CRC-32 with the field as zero.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from vmconv.plugin import ImageError, damaged, read_part

if TYPE_CHECKING:
    from vmconv.plugin import File

SIGNATURE = 0x01282014
HEADERS = (0, 4096)
_OBJECTS_AT = 8192
_VERSION = 0x0400

_HEADER = struct.Struct("<IIHIIIIQQI")
_OBJECTS = struct.Struct("<II")
_OBJECT = struct.Struct("<BIQIB")
_TABLE = struct.Struct("<HHHI")
_KEY = struct.Struct("<BBIHIIIB")
_LOG = struct.Struct("<III")
_POINTER = struct.Struct("<IQ")
_LENGTH = struct.Struct("<I")

_OBJECTS_SIGNATURE, _TABLE_SIGNATURE, _LOG_SIGNATURE = 0x01110001, 0x0002, 0x01110003
_LOG_LENGTH = 34
_OBJECT_TABLE, _KEY_TABLE, _FILE_OBJECT = 1, 2, 3

FREE, INTEGER, UNSIGNED, DOUBLE, STRING, ARRAY, BOOLEAN, NODE = 1, 3, 4, 5, 6, 7, 8, 9
_WIDTHS = {INTEGER: 8, UNSIGNED: 8, DOUBLE: 8, BOOLEAN: 4, NODE: 12}
_TO_FILE_OBJECT = 0x01

_MAX_VALUE = 1 << 20
_MAX_DEPTH = 32
_SHOWN = 4096

_KeyPlace = tuple[int, int]
"""A key's place: the index of its table, its offset there."""
_ROOT: _KeyPlace = (0, 0)


Place = tuple[int, int]
"""Where a value lies in the file: offset and size."""


class Limits(NamedTuple):
    """Objects, bytes of key tables, and keys of a file."""

    objects: int = 65536
    keys: int = 4 << 20
    entries: int = 50_000


CONFIGURATION = Limits()
"""A configuration has some 40 KB in 10 key tables. This leaves room for a hundred times that."""


class _Header(NamedTuple):
    signature: int
    checksum: int
    sequence: int
    version: int
    data_version: int
    flags: int
    alignment: int
    log_offset: int
    log_size: int
    log_header_size: int


class _Object(NamedTuple):
    kind: int
    checksum: int
    offset: int
    size: int
    flags: int


class _Key(NamedTuple):
    kind: int
    flags: int
    size: int
    parent_table: int
    parent_offset: int
    checksum: int
    sequence: int
    name_size: int


class _Entry(NamedTuple):
    name: str
    kind: int
    data: bytes
    sequence: int
    place: _KeyPlace
    parent: _KeyPlace
    where: Place


class Node:
    """A node of the tree: values by name, and nodes below it. `path` names it in errors."""

    def __init__(self, file: File, path: str, values: Iterable[_Entry], nodes: Iterable[Node]) -> None:
        self.file, self.path = file, path
        self._values = list(values)
        self._read: set[str] = set()
        self.nodes = tuple(nodes)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def child(self, name: str) -> Node:
        """Returns the node of this name, or an empty one; raises `ImageError` if there are several."""
        found = [node for node in self.nodes if node.name.lower() == name.lower()]
        if len(found) > 1:
            raise self.refused(name, "is there twice")
        return found[0] if found else Node(self.file, f"{self.path}/{name}", (), ())

    def at(self, path: str) -> Node:
        """Returns the node at a path below this one."""
        node = self
        for name in path.split("/"):
            node = node.child(name)
        return node

    def text(self, name: str) -> str | None:
        """Returns a string without its NUL; None if there is none or it is empty."""
        data = self._value(name, STRING)
        if data is None:
            return None
        try:
            return data.decode("utf-16-le").rstrip("\0") or None
        except UnicodeDecodeError as exc:
            raise self.refused(name, "is not UTF-16") from exc

    def integer(self, name: str) -> int | None:
        data = self._value(name, INTEGER, UNSIGNED)
        return None if data is None else int.from_bytes(data, "little", signed=True)

    def boolean(self, name: str) -> bool | None:
        data = self._value(name, BOOLEAN)
        return None if data is None else any(data)

    def arrays(self) -> Iterator[tuple[str, Place]]:
        """Yields name and place of each array in this node."""
        return ((entry.name, entry.where) for entry in self._values if entry.kind == ARRAY)

    def texts(self) -> Iterator[str]:
        """Yields all strings in this node and below it."""
        for entry in self._values:
            if entry.kind == STRING:
                yield entry.data.decode("utf-16-le", "replace").rstrip("\0")
        for node in self.nodes:
            yield from node.texts()

    def unread(self) -> Iterator[tuple[str, str]]:
        """Yields the paths of values that nobody has asked for, and the values as text; none that are zero or empty."""
        for entry in self._values:
            if entry.name.lower() not in self._read and any(entry.data):
                yield f"{self.path.lstrip('/')}/{entry.name}", _shown(entry)
        for node in self.nodes:
            yield from node.unread()

    def _value(self, name: str, *kinds: int) -> bytes | None:
        self._read.add(name.lower())
        found = [entry for entry in self._values if entry.name.lower() == name.lower()]
        if len(found) > 1:
            raise self.refused(name, "is there twice")
        if found and found[0].kind not in kinds:
            raise self.refused(name, f"is of type {found[0].kind}, not {' or '.join(map(str, kinds))}")
        return found[0].data if found else None

    def refused(self, name: str, problem: str) -> ImageError:
        """Returns the error for a value or node below this one."""
        return ImageError(f"{self.file.name}: {self.path.lstrip('/')}/{name}: {problem}")


def _shown(entry: _Entry) -> str:
    """Returns a value as text, cut to a few lines."""
    if entry.kind == STRING:
        text = entry.data[: 2 * _SHOWN].decode("utf-16-le", "replace").rstrip("\0")
        return re.sub(r"[^ -~\xa0-\ud7ff]", " ", text).strip()
    if entry.kind == BOOLEAN:
        return "true"
    if entry.kind in (INTEGER, UNSIGNED):
        return str(int.from_bytes(entry.data, "little", signed=entry.kind == INTEGER))
    return f"{len(entry.data)} bytes"


def read(file: File, *, limits: Limits = CONFIGURATION) -> Node:
    """Returns the root of the tree; raises `ImageError` if the storage is damaged or was not closed."""
    header = _header(file)
    _check_log(file, header)
    objects = list(_objects(file, limits))
    files = {each.offset: each.size for each in objects if each.kind == _FILE_OBJECT}
    return _tree(file, list(_entries(file, objects, files, limits)))


def _sealed(raw: bytes, at: int, stored: int) -> bool:
    """True if the checksum, which is stored at `at`, is that of the bytes."""
    return zlib.crc32(raw[:at] + bytes(4) + raw[at + 4 :]) == stored


def _header(file: File) -> _Header:
    valid = []
    for at in HEADERS:
        raw = read_part(file, "header", at, _HEADER.size)
        header = _Header._make(_HEADER.unpack(raw))
        if header.signature == SIGNATURE and _sealed(raw, 4, header.checksum):
            valid.append(header)
    if not valid:
        raise damaged(file, "header", 0, "neither it nor its copy has the signature and the checksum of one")
    header = max(valid, key=lambda each: each.sequence)
    if header.version != _VERSION:
        raise damaged(file, "header", 10, f"version {header.version:#x} is not supported, only {_VERSION:#x}")
    return header


def _check_log(file: File, header: _Header) -> None:
    """Raises `ImageError` if changes in the log have to be applied first."""
    raw = read_part(file, "replay log", header.log_offset, _LOG_LENGTH)
    signature, checksum, count = _LOG.unpack_from(raw)
    if signature != _LOG_SIGNATURE or not _sealed(raw, 4, checksum):
        raise damaged(file, "replay log", header.log_offset, "its header has not the signature and checksum of one")
    if count:
        hint = "Hyper-V applies them when the machine is registered or exported"
        raise damaged(file, "replay log", header.log_offset, f"has {count} changes to apply", hint=hint)


def _objects(file: File, limits: Limits) -> Iterator[_Object]:
    """Yields the used entries of all object tables."""
    at, seen, total = _OBJECTS_AT, set[int](), 0
    while True:
        if at in seen:
            raise damaged(file, "object table", at, "the chain of object tables comes back to it")
        seen.add(at)
        signature, count = _OBJECTS.unpack(read_part(file, "object table", at, _OBJECTS.size))
        total += count
        if signature != _OBJECTS_SIGNATURE or total > limits.objects:
            raise damaged(file, "object table", at, f"signature {signature:#x} with {count} entries is none")
        start = at + _OBJECTS.size
        raw = read_part(file, "object table", start, count * _OBJECT.size)
        places = range(0, count * _OBJECT.size, _OBJECT.size)
        table = [_object(file, start + place, raw[place : place + _OBJECT.size]) for place in places]
        yield from (each for each in table[:-1] if each.kind in (_KEY_TABLE, _FILE_OBJECT))
        if not table or table[-1].kind != _OBJECT_TABLE:
            return
        at = table[-1].offset


def _object(file: File, at: int, raw: bytes) -> _Object:
    found = _Object._make(_OBJECT.unpack(raw))
    if found.kind in (_OBJECT_TABLE, _KEY_TABLE, _FILE_OBJECT) and not _sealed(raw, 1, found.checksum):
        raise damaged(file, "object", at, "its checksum is wrong")
    return found


def _entries(file: File, objects: Iterable[_Object], files: dict[int, int], limits: Limits) -> Iterator[_Entry]:
    """Yields the keys of all tables."""
    tables = [each for each in objects if each.kind == _KEY_TABLE]
    if sum(table.size for table in tables) > limits.keys:
        raise ImageError(f"{file.name}: key tables have more than {limits.keys} bytes")
    seen, count = set(), 0
    for table in tables:
        data = read_part(file, "key table", table.offset, table.size)
        if len(data) < _TABLE.size:
            raise damaged(file, "key table", table.offset, f"has {len(data)} bytes")
        signature, index, _, checksum = _TABLE.unpack_from(data)
        if signature != _TABLE_SIGNATURE or not _sealed(data[: _TABLE.size], 6, checksum):
            raise damaged(file, "key table", table.offset, "its header has not the signature and checksum of one")
        if index in seen or index == 0:
            raise damaged(file, "key table", table.offset, f"index {index} is there twice, or 0")
        seen.add(index)
        for entry in _keys(file, table.offset, index, data, files):
            count += 1
            if count > limits.entries:
                raise ImageError(f"{file.name}: has more than {limits.entries} keys")
            yield entry


def _keys(file: File, start: int, index: int, data: bytes, files: dict[int, int]) -> Iterator[_Entry]:
    at = _TABLE.size
    while at + _KEY.size < len(data):
        key = _Key._make(_KEY.unpack_from(data, at))
        if key.size < _KEY.size or at + key.size > len(data):
            raise damaged(file, "key", start + at, f"size {key.size} is not possible")
        if key.kind != FREE:
            body = data[at + _KEY.size : at + key.size]
            length = _length(file, start + at, key, body)
            if not _sealed(data[at : at + _KEY.size + length], 12, key.checksum):
                raise damaged(file, "key", start + at, "its checksum is wrong")
            name = body[: key.name_size].partition(b"\0")[0].decode("utf-8", "replace")
            begin = start + at + _KEY.size + key.name_size
            content, where = _content(file, start + at, key, body[key.name_size : length], files, begin)
            parent = key.parent_table, key.parent_offset
            yield _Entry(name, key.kind, content, key.sequence, (index, at), parent, where)
        at += key.size


def _length(file: File, at: int, key: _Key, body: bytes) -> int:
    """Returns the bytes of name and value, which the checksum covers."""
    begin = key.name_size
    if key.kind not in (*_WIDTHS, STRING, ARRAY):
        raise damaged(file, "key", at, f"type {key.kind} is not known")
    if key.flags & _TO_FILE_OBJECT:
        end = begin + _POINTER.size
    elif key.kind in _WIDTHS:
        end = begin + _WIDTHS[key.kind]
    else:
        raw = body[begin : begin + _LENGTH.size]
        end = begin + _LENGTH.size + int.from_bytes(raw, "little")
    if end > len(body):
        raise damaged(file, "key", at, f"its value of {end - begin} bytes is longer than the key")
    return end


def _content(file: File, at: int, key: _Key, value: bytes, files: dict[int, int], begin: int) -> tuple[bytes, Place]:
    """Returns the value without its length, and where it lies; arrays in file objects are not read."""
    if not key.flags & _TO_FILE_OBJECT:
        skip = _LENGTH.size if key.kind in (STRING, ARRAY) else 0
        return value[skip:], (begin + skip, len(value) - skip)
    size, offset = _POINTER.unpack(value)
    if size > files.get(offset, -1):
        raise damaged(file, "key", at, f"{size} bytes at {offset:#x} are in no file object")
    # Memory of saved machines is in such values, and nothing here needs it.
    unread = key.kind == ARRAY or size > _MAX_VALUE
    return b"" if unread else read_part(file, "file object", offset, size), (offset, size)


def _tree(file: File, entries: list[_Entry]) -> Node:
    below: dict[_KeyPlace, list[_Entry]] = {}
    for entry in sorted(entries, key=lambda each: each.sequence):
        below.setdefault(entry.parent, []).append(entry)
    reached = 0

    def node(place: _KeyPlace, path: str, depth: int) -> Node:
        nonlocal reached
        if depth > _MAX_DEPTH:
            raise ImageError(f"{file.name}: {path}: is nested deeper than {_MAX_DEPTH}")
        here = below.get(place, [])
        reached += len(here)
        nodes = (node(each.place, f"{path}/{each.name}", depth + 1) for each in here if each.kind == NODE)
        return Node(file, path, (each for each in here if each.kind != NODE), nodes)

    root = node(_ROOT, "", 0)
    if reached != len(entries):
        # A key whose ancestors are its descendants is reached from nowhere, like one whose parent does not exist.
        raise ImageError(f"{file.name}: {len(entries) - reached} keys have no way to the root")
    return root
