"""What a writer returns: for each output file, the table of its address space; and what a writer is told beforehand."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vmconv.errors import PlanError
from vmconv.model.identity import fresh

if TYPE_CHECKING:
    from vmconv.model.extents import Extents
    from vmconv.model.image import Image
    from vmconv.model.references import Record
    from vmconv.model.sources import File


_OF_THIS_PROCESS = fresh()


class Placement(NamedTuple):
    """What a writer is told of its output: where it goes, and which image it is.

    A payload row can be referenced when its offset in the output is congruent to its offset in the source modulo
    `modulus` bytes, a power of two; 1 means that any place will do. `target` is the name of the file that the user
    named, for formats whose further files are named after it, and `directory` where it goes, for formats that can
    refer to files elsewhere.

    `carrier` is the file that becomes the output itself, when a disk is converted in place. Then payload keeps its very
    offset, and metadata goes behind the end of the file, or over what is not payload. Where the format wants something
    of its own at the place of payload, one block of it goes behind the end; see `vmconv.placing.pinning`.

    `identity` are the 16 bytes of the UUID of this image and of no other; its further ids come from
    `vmconv.model.identity.derived`. Whoever makes images gives each its own; the default is one for this process.
    """

    modulus: int = 1
    target: str = "disk"
    directory: str = ""
    carrier: File | None = None
    identity: bytes = _OF_THIS_PROCESS


class OutFile(NamedTuple):
    """One output file: `table` says what each of its bytes is (DATA of a guest's file, of a `Blob`, ... or ZERO).

    `name` is None for the file that the user named, else the file's own name beside it. `reason` is for what an output
    that refers to other files holds nevertheless; it completes "copied because ...". `slack`: no reader looks at what
    is ZERO, so it may be left as it is when the file is changed in place.
    """

    table: Extents
    name: str | None = None
    reason: str | None = None
    slack: bool = False


class Reference(NamedTuple):
    """A file that an output refers to: `length` bytes of payload stay in it; `name` is as the output has it."""

    name: str
    file: File
    length: int


class Backing(NamedTuple):
    """The parent that an output keeps instead of being flattened: as it is written into the image.

    `records` are of the files that the parent is made of, where it must not change.
    """

    reference: str
    format: str
    records: tuple[Record, ...] = ()

    def refuse_other_size(self, name: str, size: int, parent: Image) -> None:
        """Raises `PlanError` unless `parent` has `size` bytes: for formats, by `name`, whose layers are of one size."""
        if parent.size != size:
            raise PlanError(
                f"a {name} is as large as its parent: {size} bytes, {self.reference} has {parent.size}",
                hint="flatten the chain, or use a format such as qcow2 whose layers may differ in size",
            )


class Layout(NamedTuple):
    """All files of one output image; the one that the user named comes last, so that it appears when all is there.

    `references` are the files of the source that it names instead of holding their payload.
    """

    files: tuple[OutFile, ...]
    losses: tuple[str, ...] = ()
    references: tuple[Reference, ...] = ()
