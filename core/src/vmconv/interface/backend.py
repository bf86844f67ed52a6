"""The interface of storage backends: their capabilities, and transactions that create output files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vmconv.io.directory import Directory
    from vmconv.model.image import Image
    from vmconv.model.plan import Destination, Plan, Progress, ShareSteps
    from vmconv.model.sources import File, Source


Created = Callable[[str, int], None]
"""Called with the future name and the open descriptor of each output that is a new file."""

CANNOT_SHARE = "cannot share blocks between files"
"""The end of the reason of copies on storage that shares nothing."""


class Capabilities(NamedTuple):
    """The capabilities of a backend in one directory; `unit` is the size of shared blocks in bytes.

    `reason` says why it is not usable.
    """

    usable: bool
    shares: bool
    unit: int = 1
    reason: str | None = None


class Congruence(Enum):
    """The condition on two offsets, in output and source, for sharing payload."""

    MODULO = "both offsets are equal modulo the unit"
    EQUAL = "both offsets are equal: the file itself becomes the output"


class Survey(NamedTuple):
    """The sources that a backend can share, in blocks of `unit` bytes.

    `refusals` maps `id(file)` of the others to a reason that completes "copied because ...". Payload is placed
    at offsets that are equal to the sources' modulo `chunk` bytes, a power of two, where that leaves few gaps.
    """

    unit: int = 1
    refusals: Mapping[int, str] = MappingProxyType({})
    congruence: Congruence = Congruence.MODULO
    chunk: int = 1


class Access(NamedTuple):
    """The permissions of new files: at most those of each of `sources`, or `mode` if it is given.

    A file that replaces another keeps its owner, mode and attributes; `mode` overrides the mode.
    """

    sources: Sequence[File] = ()
    mode: int | None = None


DEFAULT_ACCESS = Access()
"""Permissions by umask and default ACL, as for any new file."""


class Output(ABC):
    """One output file that is being written. Ranges never written read as zero at the end."""

    descriptor = -1
    """The open descriptor of the file; -1 if there is none."""
    takes_bytes = True
    """False if the output takes its bytes from the plan; then `write` and `copy` are not called."""
    reads_as_zero = True
    """False if ranges never written have to be zeroed by `zero`."""
    on_shared: Callable[[int], None] = staticmethod(lambda _length: None)
    """`share` may call this with the bytes shared since the last call."""

    @abstractmethod
    def share(self, steps: ShareSteps) -> None:
        """Shares ranges of source files with this file; called once, before any other method."""

    @abstractmethod
    def write(self, offset: int, data: bytes) -> None:
        """Writes bytes; called from several threads, for disjoint ranges."""

    def copy(self, source: Source, source_offset: int, offset: int, length: int) -> None:
        """Copies bytes of a source; called from several threads, for disjoint ranges."""
        self.write(offset, source.read(source_offset, length))

    def allocate(self, offset: int, length: int) -> None:  # noqa: B027 most outputs have no space of their own
        """Allocates a range that is never written, so that later writes to it find space."""

    def zero(self, offset: int, length: int) -> None:
        """Zeroes a range that is never written; called only without `reads_as_zero`."""
        raise NotImplementedError

    @abstractmethod
    def finish(self) -> File:
        """Syncs the file, in a durable transaction, and returns it for reading back. The transaction closes it."""


class Transaction(ABC):
    """All output files of one conversion: they exist under their names after `commit`, and not after `abort`."""

    left: str | None = None
    """What a run that ends now leaves behind, for messages; None for nothing."""

    def prepare(self, plan: Plan) -> None:  # noqa: B027 most have nothing to prepare
        """Called with the plan before any write, for backends that save what they overwrite."""

    @abstractmethod
    def create(self, name: str, size: int, sources: Sequence[File]) -> Output:
        """Returns a new output of `size` bytes, to be named `name`; `sources` are the files that it will share."""

    def deliver(self, progress: Progress | None) -> None:  # noqa: B027 files need no delivery
        """Called after verification and before `commit`, for output that cannot be rolled back; may take long."""

    @abstractmethod
    def commit(self) -> None:
        """Makes the outputs appear under their names, in the order of their creation."""

    @abstractmethod
    def abort(self) -> None:
        """Removes the outputs; does nothing after `commit`."""


class Backend(ABC):
    """A way to write planned files to storage."""

    name: str
    title: str
    automatic = True
    """Whether `--backend auto` may choose this backend."""
    destination: Destination = "files"

    @abstractmethod
    def capabilities(self, directory: str) -> Capabilities:
        """Returns the capabilities in a directory, found by trying, not by the name of the filesystem alone."""

    @abstractmethod
    def survey(self, directory: str, sources: Sequence[File]) -> Survey:
        """Returns which sources can be shared with files of a directory; leaves nothing behind."""

    def notes(self, plan: Plan) -> tuple[str, ...]:
        """Returns what the user should know before the plan is carried out, such as costs that come later."""
        return ()

    @abstractmethod
    def begin(
        self, directory: Directory, *, force: bool = False, durable: bool = True, access: Access = DEFAULT_ACCESS
    ) -> Transaction:
        """Returns a new transaction for files of a directory; with `force`, `commit` replaces existing files.

        Without `durable` nothing is synced, and a power failure may lose committed files. The directory stays open
        until the transaction ends, and may be moved meanwhile.
        """


class ObjectBackend(Backend):
    """A way to make objects of a store, which has no directories. Made for one conversion and its targets, so it is not
    registered.

    Each image is one object, whose `Output.finish` returns a file that is read from the store.
    """

    automatic = False
    destination: Destination = "objects"

    def capabilities(self, directory: str) -> Capabilities:
        return Capabilities(usable=True, shares=True)

    @abstractmethod
    def staged(self, image: Image) -> Image:
        """Returns the disk with its payload in files that the store has, or will have: see `Image.holding`.

        Called before `survey`, whose `refusals` are for those of the files that have to be sent. Changes nothing.
        """

    def planned(self, plan: Plan) -> Plan:
        """Returns the plan of one image with what only the backend knows, such as how bytes are copied."""
        return plan

    @abstractmethod
    def start(self, sources: Sequence[File], *, force: bool) -> Transaction:
        """Returns a new transaction; the arguments are those of `begin` and of `Access`."""

    def begin(
        self, directory: Directory, *, force: bool = False, durable: bool = True, access: Access = DEFAULT_ACCESS
    ) -> Transaction:
        return self.start(access.sources, force=force)


class Proposal(NamedTuple):
    """A backend for a conversion, with its survey of the sources.

    In place, `carrier` is the file that keeps its payload and becomes the output.
    """

    backend: Backend
    survey: Survey
    carrier: File | None = None
