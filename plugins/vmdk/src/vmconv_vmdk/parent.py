"""The file name of the parent in the descriptor, changed where the descriptor lies."""

from __future__ import annotations

import re

from vmconv.plugin import Backing, Draft, Image, PlanError, Structure, text_of
from vmconv_vmdk import structs
from vmconv_vmdk.descriptor import NO_PARENT, parse

_HINT = re.compile(rb"[ \t]*parentFileNameHint[ \t]*=", re.IGNORECASE)
_CID = re.compile(rb"^([ \t]*parentCID[ \t]*=[ \t]*)[0-9a-f]+", re.IGNORECASE)


def set_parent(image: Image, parent: Backing | None) -> Draft:
    """Returns the file with another name of the parent, or none; the parent must have the content id of the old one.

    Raises `PlanError` for a layer without parent: the content id of its new one is not known.
    """
    name, (offset, room) = image.file.name, _place(image)
    text = image.file.read(offset, room).split(b"\0", 1)[0]
    described = parse(text, name)
    if parent and parent.format != "vmdk":
        raise PlanError(f"{name}: the parent of a VMDK must be a VMDK, not {parent.format}")
    if parent and described.parent_cid == NO_PARENT:
        raise PlanError(f"{name}: has no parent, and the content id of the new one is in its file, which is not opened")
    lines = _edited(text.splitlines(keepends=True), _hint(parent, described.encoding, name))
    new, draft = b"".join(lines), Draft(image.file)
    if not offset:
        draft.write(0, new)
        draft.truncate(len(new))
        return draft
    if len(new) > room:
        raise PlanError(f"{name}: a descriptor of {len(new)} bytes, there is room for {room}")
    draft.write(offset, new.ljust(len(text), b"\0"))
    return draft


def _place(image: Image) -> tuple[int, int]:
    """Returns offset and length of the descriptor: 0 and the file's size for one in a file of its own."""
    if image.file.read(0, min(4, image.file.size)) != structs.SPARSE_MAGIC:
        return 0, image.file.size
    header = Structure(image.file, structs.SparseExtentHeader).parse()
    return header.descriptorOffset * structs.SECTOR, header.descriptorSize * structs.SECTOR


def _hint(parent: Backing | None, encoding: str | None, name: str) -> bytes | None:
    """Returns the line that names the parent. Raises `PlanError` for a name that a line cannot have."""
    if parent is None:
        return None
    text = text_of(parent.reference)
    try:
        stored = text.encode(encoding.lower().replace("windows-", "cp") if encoding else "utf-8", "surrogateescape")
    except UnicodeEncodeError as exc:
        raise PlanError(f"{name}: its descriptor is in {encoding}, which has no {parent.reference!r}") from exc
    if any(char in stored for char in b'"\r\n\0'):
        raise PlanError(f"{name}: {parent.reference!r} cannot be written into a descriptor")
    return b'parentFileNameHint="' + stored + b'"'


def _edited(lines: list[bytes], hint: bytes | None) -> list[bytes]:
    """Returns the lines with the hint behind the parent's content id, and no other hint."""
    edited = []
    for line in lines:
        if _HINT.match(line):
            continue
        edited.append(line if hint is not None else _CID.sub(rb"\g<1>%08x" % NO_PARENT, line))
        if hint and _CID.match(line):
            end = b"\r\n" if line.endswith(b"\r\n") else b"\n"
            edited += [hint + end]
            hint = b""
    return edited
