"""The journal of a change in place: what it takes to go back, and what is left to do when it is to go forward.

    magic | length of the body, its digest, whose it is | body: JSON, ranges, old bytes | the digest, once committed

It is durable before anything changes, and it is removed when nothing is left to be done. The second digest is the
commit point: without it everything is taken back.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vmconv.errors import ImageError

MAGIC = b"vmconv: a conversion in place is under way; vmconv recover\n".ljust(64, b"\0")
_HEAD = struct.Struct("<64sQ32s32s")
_DIGEST = 32
MAX_SIZE = 256 << 20
"""Bytes of a journal: it is held in memory."""

Ranges = npt.NDArray[np.int64]
"""Rows `(offset, length)`, bytes."""


NOTHING: Ranges = np.empty((0, 2), dtype=np.int64)
NOTHING_PLACED: Ranges = np.empty((0, 3), dtype=np.int64)


class Leftover(NamedTuple):
    """A file that belongs to the source and goes with it; only this one, not another of its name."""

    name: str
    size: int
    mtime: int

    @classmethod
    def of(cls, path: str) -> Leftover:
        status = os.lstat(path)
        return cls(os.path.basename(path), status.st_size, status.st_mtime_ns)


class Journal(NamedTuple):
    """A change of one file; all names are of one directory.

    `source` is the name it had, `target` the one it gets. Back: `saved` ranges get their `old` bytes, end to end,
    `holes` are punched, the size is `old_size` and the time of the last change `old_mtime`. Forward: `dead` ranges are
    punched, the size is `new_size`, files that were `made` get their names, `leftovers` go, and `mtime` is set when it
    is known. `undo` is one of the made files, which learns what the result looked like. `replace`: files of those
    names may be there already. Not `carried`: the target is one of the made files, and the source only goes.

    `pieces` are for a file whose payload has to be shifted forward: rows `(physical, length, offset)`, where each piece
    lies on storage and where in the file it has to be. Then `later` ranges get their `new` bytes, end to end.
    """

    source: str
    target: str
    old_size: int = 0
    new_size: int = 0
    old_mtime: int = 0
    saved: Ranges = NOTHING
    old: bytes = b""
    holes: Ranges = NOTHING
    dead: Ranges = NOTHING
    pieces: Ranges = NOTHING_PLACED
    later: Ranges = NOTHING
    new: bytes = b""
    made: tuple[str, ...] = ()
    leftovers: tuple[Leftover, ...] = ()
    undo: str | None = None
    mtime: int | None = None
    replace: bool = False
    carried: bool = True

    @property
    def names(self) -> set[str]:
        """Names under which somebody may look for the file."""
        return {self.source, self.target, *self.made, *(leftover.name for leftover in self.leftovers)}

    def encode(self, mark: Callable[[bytes], bytes]) -> bytes:
        """Returns the journal as a file; `mark` makes of its digest what says whose it is, 32 bytes."""
        import json

        fields: dict[str, Any] = {
            name: value for name, value in self._asdict().items() if not isinstance(value, bytes | np.ndarray)
        }
        tables = {name: value for name, value in self._asdict().items() if isinstance(value, np.ndarray)}
        shapes = {name: table.shape for name, table in tables.items()}
        # Names of files need not be text: JSON escapes what stands for their bytes.
        text = json.dumps({**fields, "tables": shapes}).encode("ascii")
        data = [table.astype("<i8").tobytes() for table in tables.values()]
        parts = [struct.pack("<Q", len(text)), text, *data, self.old, self.new]
        body = b"".join(parts)
        digest = _digest(body)
        return _HEAD.pack(MAGIC, len(body), digest, mark(digest)) + body


def commit_record(encoded: bytes) -> bytes:
    """Returns what is written behind an encoded journal to commit it."""
    digest: bytes = _HEAD.unpack_from(encoded)[2]
    return digest


class Found(NamedTuple):
    """A journal as it was found; `digest` and `mark` tell whose it is."""

    journal: Journal
    committed: bool
    digest: bytes
    mark: bytes


def decode(data: bytes, name: str) -> Found | None:
    """Returns the journal in `data`; None when it was not written to its end.

    Raises `ImageError` for a file that is something else.
    """
    # A sector that never reached storage reads as zero.
    if not data[: len(MAGIC)].strip(b"\0"):
        return None
    if not data.startswith(MAGIC):
        raise ImageError(f"{name}: is not a journal")
    if len(data) < _HEAD.size:
        return None
    _, length, digest, mark = _HEAD.unpack_from(data)
    body = data[_HEAD.size : _HEAD.size + length]
    if len(body) < length or _digest(body) != digest:
        return None
    committed = data[_HEAD.size + length :][:_DIGEST] == digest
    try:
        journal = _parse(body)
    except (ValueError, LookupError, TypeError, struct.error) as exc:
        raise ImageError(f"{name}: is not a journal of this version: {exc}") from exc
    refuse_paths(name, *journal.names)
    return Found(journal, committed, digest, mark)


def refuse_paths(name: str, *names: str) -> None:
    """Raises `ImageError` unless all of them are names of files in one directory: the file may be a stranger's."""
    for each in names:
        if not each or "/" in each or "\0" in each or each in (".", ".."):
            raise ImageError(f"{name}: names a file in another directory, {each!r}")


def _parse(body: bytes) -> Journal:
    import json

    (length,) = struct.unpack_from("<Q", body)
    fields = json.loads(body[8 : 8 + length])
    at = 8 + length
    tables: dict[str, Any] = {}
    for name, (rows, columns) in fields.pop("tables").items():
        tables[name] = np.frombuffer(body, dtype="<i8", count=rows * columns, offset=at).reshape(rows, columns)
        at += 8 * rows * columns
    fields["made"] = tuple(fields["made"])
    fields["leftovers"] = tuple(Leftover(*each) for each in fields["leftovers"])
    new = at + int(tables["saved"][:, 1].sum())
    return Journal(**fields, **tables, old=body[at:new], new=body[new:])


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST).digest()
