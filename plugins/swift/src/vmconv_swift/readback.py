"""An object that was made, compared with its plan as the store has it: where payload lies, and all other bytes.

Shares no code with what makes manifests: the manifests are read from the store, and resolved to what holds bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmconv.plugin import Kind, VerifyError
from vmconv_swift.payload import LeafFile, Piece
from vmconv_swift.zeros import is_zeros

if TYPE_CHECKING:
    from vmconv.plugin import File, FilePlan
    from vmconv_swift.remote import SwiftObject

_STEP = 4 << 20


def refuse_other_content(plan: FilePlan, made: SwiftObject, file: File) -> None:
    """Raises `VerifyError` unless an object refers to the planned payload, and has all other bytes as planned."""
    if made.size != plan.size:
        raise VerifyError(f"{plan.name}: the store has {made.size} bytes, {plan.size} were planned")
    windows = iter(made.windows)
    leaf, at, begin, end = None, 0, 0, 0
    for row in plan.table:
        address = row.start
        while address < row.end:
            while address >= end:
                leaf, at, length = next(windows)
                begin, end = end, end + length
            stop = min(row.end, end)
            if isinstance(row.source, (Piece, LeafFile)):
                meant = row.source.where, row.source.etag, row.source.size, row.offset + address - row.start
                found = (*leaf, at + address - begin) if leaf else None
                if found != meant:
                    raise VerifyError(f"{plan.name}: refers to other payload than planned at {address:#x}")
            elif row.kind == Kind.DATA or not (leaf and is_zeros(leaf.etag, leaf.size)):
                _compare(plan, file, address, stop)
            address = stop


def _compare(plan: FilePlan, file: File, start: int, end: int) -> None:
    for at in range(start, end, _STEP):
        length = min(_STEP, end - at)
        if file.read(at, length) != plan.table.read(at, length):
            raise VerifyError(f"{plan.name}: has other bytes than planned from {at:#x} on")
