"""The interface of indirection storage: what a backend can do, and the transaction in which it makes outputs real."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vmconv.io.directory import Directory
    from vmconv.model.plan import Plan, Progress, ShareSteps
    from vmconv.model.sources import File, Source


Created = Callable[[str, int], None]
"""Called with the name that an output will have, and its open descriptor."""


class Capabilities(NamedTuple):
    """What a backend can do in one directory: share blocks of `unit` bytes, or not and why."""

    usable: bool
    shares: bool
    unit: int = 1
    reason: str | None = None


class Congruence(Enum):
    """When payload at an offset of an output needs no copy of the payload at an offset of its source."""

    MODULO = "both offsets are equal modulo the unit"
    EQUAL = "both offsets are equal: the file itself becomes the output"


class Survey(NamedTuple):
    """What a backend can do with certain sources: `unit` is the block size, bytes, for those it can share.

    `refusals` maps `id(file)` to the reason why that source cannot be shared; it completes "copied because ...".
    """

    unit: int = 1
    refusals: Mapping[int, str] = MappingProxyType({})
    congruence: Congruence = Congruence.MODULO


class Access(NamedTuple):
    """Who may open new files: nobody who may not open each of `sources`, or those whom `mode` lets, when it is given.

    A file that replaces another one has that one's owner, mode and attributes, and only `mode` changes that.
    """

    sources: Sequence[File] = ()
    mode: int | None = None


DEFAULT_ACCESS = Access()
"""A new file is as any other in its directory."""


class Output(ABC):
    """One output file while it is being made. Ranges never touched read as zero."""

    descriptor = -1
    """Of the file that is being made, open; -1 where there is none."""
    takes_bytes = True
    """False when this output has all that it needs from the plan: then nothing is written or copied to it."""

    @abstractmethod
    def share(self, steps: ShareSteps) -> None:
        """Makes ranges of this file references to ranges of source files; called once, before any other method."""

    @abstractmethod
    def write(self, offset: int, data: bytes) -> None:
        """Writes bytes; called from several threads, for ranges that do not overlap."""

    def copy(self, source: Source, source_offset: int, offset: int, length: int) -> None:
        """Copies bytes of a source; called from several threads, for ranges that do not overlap."""
        self.write(offset, source.read(source_offset, length))

    @abstractmethod
    def finish(self) -> File:
        """Makes all that was written durable, unless the transaction need not be, and returns the file to read it back.

        The transaction closes it.
        """


class Transaction(ABC):
    """All output files of one conversion: after `commit` all are there under their names, after `abort` none is."""

    def prepare(self, plan: Plan) -> None:  # noqa: B027 most have nothing to prepare
        """Called with the plan before any write, for backends that save what they overwrite."""

    @abstractmethod
    def create(self, name: str, size: int, sources: Sequence[File]) -> Output:
        """Returns a new output of `size` bytes that will be `name`; `sources` are the files it will share with."""

    def deliver(self, progress: Progress | None) -> None:  # noqa: B027 files need no delivery
        """Called after the result was verified and before `commit`, for what cannot be taken back; may take long."""

    @abstractmethod
    def commit(self) -> None:
        """Makes the outputs appear under their names, in the order they were created."""

    @abstractmethod
    def abort(self) -> None:
        """Removes every trace of the outputs; does nothing after `commit`."""


class Backend(ABC):
    """One way of making output tables real on storage."""

    name: str
    title: str
    automatic = True
    """Whether `convert` may choose this backend by itself."""

    @abstractmethod
    def capabilities(self, directory: str) -> Capabilities:
        """Returns what this backend can do in a directory: asked of the storage, never guessed from its name."""

    @abstractmethod
    def survey(self, directory: str, sources: Sequence[File]) -> Survey:
        """Returns which of these sources can be shared with files of a directory; changes nothing that is seen."""

    @abstractmethod
    def begin(
        self, directory: Directory, *, force: bool = False, durable: bool = True, access: Access = DEFAULT_ACCESS
    ) -> Transaction:
        """Returns a new transaction for files of a directory; `force` lets `commit` replace existing ones.

        Where it is not `durable`, nothing waits for storage, and a power cut may leave less than was committed. The
        directory stays open until the transaction has ended; it may get another path meanwhile.
        """


class Proposal(NamedTuple):
    """How output files could be made: by this backend, with what it can do for the sources of the disk.

    In place, `carrier` is the file that keeps its payload and becomes the output.
    """

    backend: Backend
    survey: Survey
    carrier: File | None = None
