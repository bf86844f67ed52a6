"""The interface of indirection storage: what a backend can do, and the transaction in which it makes outputs real."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vmconv.directory import Directory
    from vmconv.planner import Plan, ShareSteps
    from vmconv.sources import File, Source


class Ability(NamedTuple):
    """What a backend can do in one directory: share blocks of `unit` bytes, or not and why."""

    usable: bool
    shares: bool
    unit: int = 1
    reason: str | None = None


class Survey(NamedTuple):
    """What a backend can do with certain sources: `unit` is the modulus for those it can share.

    0 is the modulus of changing a file in place: congruent means equal.

    `refusals` maps `id(file)` to the reason why that source cannot be shared; it completes "copied because ...".
    """

    unit: int = 1
    refusals: Mapping[int, str] = MappingProxyType({})


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
        """Is told of all that will be done before anything is, for who has to know what will be overwritten."""

    @abstractmethod
    def create(self, name: str, size: int, sources: Sequence[File]) -> Output:
        """Returns a new output of `size` bytes that will be `name`; `sources` are the files it will share with."""

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
    def ability(self, directory: str) -> Ability:
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
