"""The input and output of a writer: placement of the output, tables of its files, backing file, references."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from vmconv.errors import PlanError
from vmconv.model.identity import fresh

if TYPE_CHECKING:
    from vmconv.model.extents import Extents
    from vmconv.model.image import Image
    from vmconv.model.references import Record
    from vmconv.model.sources import Encryptor, File


# A default argument has to be a constant. Conversions pass an identity for each image.
_OF_THIS_PROCESS = fresh()


class Scratch(Protocol):
    """Bytes that a writer keeps until the output is written, so that it need not make them twice."""

    def append(self, data: bytes) -> int:
        """Keeps bytes and returns their offset: behind all that were kept before."""

    def read(self, offset: int, length: int) -> bytes:
        """Returns bytes that were kept."""


class Placement(NamedTuple):
    """The location and the identity of an output, for its writer.

    A payload row can be shared if its offset in the output is congruent to its offset in the source modulo `modulus`
    bytes, a power of two; with 1 any offset will do. `target` is the file name of the target, for formats that name
    further files after it. `directory` is the target's directory, for formats that refer to files elsewhere.

    `carrier` is the source's file that becomes the output of a conversion in place. Payload keeps its offset in it.
    Metadata goes behind the end of the file, or over bytes that are not payload. If the format needs an offset that
    payload occupies, one block of payload moves behind the end; see `vmconv.placing.pinning`.

    `identity` is the UUID of this image, 16 bytes; other ids are derived by `vmconv.model.identity.derived`. The caller
    gives each image its own. The default is random per process. `content`, 16 bytes, is given if an image keeps its
    identity and gets another content: ids that change with the content are derived from `content_identity`.

    `scratch` is room for bytes that cost much to make, such as compressed ones. Without it they are made twice: once
    for their sizes.

    `encryptor` encrypts all payload. Only a format with `encrypts_with` gets one.
    """

    modulus: int = 1
    target: str = "disk"
    directory: str = ""
    carrier: File | None = None
    identity: bytes = _OF_THIS_PROCESS
    content: bytes | None = None
    scratch: Scratch | None = None
    encryptor: Encryptor | None = None

    @property
    def content_identity(self) -> bytes:
        """The identity of the content: changes whenever the image is written."""
        return self.content or self.identity


Allocation = Literal["holes", "space", "zeros"]
"""What ranges without payload get: nothing, space that reads as zero (fallocate), or zeros that are written."""


class OutFile(NamedTuple):
    """One output file: `table` maps its bytes (DATA of a source's file or of a `Blob`, or ZERO).

    `name` is None for the target itself, else the name of a file beside it. `reason` completes "copied because ..." for
    payload that cannot be referenced, in an output that refers to other files. `slack`: no reader looks at ZERO ranges,
    so a conversion in place need not clear them. `allocation` is what ZERO ranges get on storage.
    """

    table: Extents
    name: str | None = None
    reason: str | None = None
    slack: bool = False
    allocation: Allocation = "holes"


class Reference(NamedTuple):
    """A file that an output refers to: `length` bytes of payload stay in it; `name` is its name in the output."""

    name: str
    file: File
    length: int


class Backing(NamedTuple):
    """The parent of an output, by the name and the format to write into the image.

    `records` are fingerprints of the parent's files, for a parent that must not change.
    """

    reference: str
    format: str
    records: tuple[Record, ...] = ()

    def refuse_other_size(self, name: str, size: int, parent: Image) -> None:
        """Raises `PlanError` unless `parent` has `size` bytes, for formats whose layers have one size."""
        if parent.size != size:
            raise PlanError(
                f"a {name} must be as large as its parent: {size} bytes, {self.reference} has {parent.size}",
                hint="flatten the chain, or use a format such as qcow2 whose layers may differ in size",
            )


class Layout(NamedTuple):
    """All files of one output image; the target itself comes last, so that it appears after the others.

    `losses` are phrases on what the format cannot store. `references` are source files that keep their payload.
    """

    files: tuple[OutFile, ...]
    losses: tuple[str, ...] = ()
    references: tuple[Reference, ...] = ()
