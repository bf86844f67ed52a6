"""Executes a plan: shares, then writes and copies, then syncs, verifies, and lets the backend name the files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from vmconv.conversion.refusals import refuse_changed
from vmconv.errors import VmconvError, os_errors
from vmconv.interface.backend import Created, Output, Transaction
from vmconv.model import references
from vmconv.model.plan import Action, FilePlan, Plan, Progress
from vmconv.model.sources import File, Source
from vmconv.system import signals
from vmconv.system.parallel import in_order

_PIECE = 4 << 20
# Metadata is computed while it is written, in pieces that fit into the processor's cache.
_METADATA_PIECE = 1 << 20
# One call zeroes a piece, and storage may have to write it.
_ZEROED = 64 << 20


class _Piece(NamedTuple):
    """A range of an output, of bounded size, and the source of its bytes."""

    output: Output
    source: Source
    source_offset: int
    offset: int
    length: int


def carry_out(
    plan: Plan,
    transaction: Transaction,
    sources: Sequence[File],
    target: str,
    *,
    verify: Callable[[list[File]], None],
    progress: Progress | None,
    created: Created | None,
    done: Callable[[], None],
    sharing: Progress | None = None,
) -> None:
    """Creates all files of the plan, or none. `verify` gets the unnamed files; `done` is called after the commit.

    Raises `AccessError` if one of the `sources` changed meanwhile. `target` is the user's name of the result.
    """
    try:
        with os_errors("cannot be written", where=target):
            files = make(plan, transaction, progress, created, sharing)
        verify(files)
        # The target records ctimes of the source: wait until a later write is sure to get another one.
        if plan.references:
            references.settle(sources)
        refuse_changed(sources)
        transaction.deliver(progress)
        with signals.held():
            transaction.commit()
            done()
    except BaseException as exc:
        if transaction.left:
            _state_left(exc, transaction.left)
        raise
    finally:
        with signals.held():
            # After the commit this only closes files.
            transaction.abort()


def _state_left(exc: BaseException, left: str) -> None:
    """Makes the message of an error, or of a signal, say what the run leaves."""
    if isinstance(exc, VmconvError):
        exc.hint = left
    else:
        vars(exc)["left"] = left


def make(
    plan: Plan,
    transaction: Transaction,
    progress: Progress | None,
    created: Created | None = None,
    sharing: Progress | None = None,
) -> list[File]:
    """Returns the finished files in the plan's order: durable, without their final names.

    `progress` gets the bytes that are copied and written, `sharing` those that are shared, which come first.
    """
    transaction.prepare(plan)
    outputs = []
    shared = _Steps(plan.totals.shared, sharing if plan.totals.shared else None)
    for file in plan.files:
        sources = [source for source in file.sources if isinstance(source, File)]
        output = transaction.create(file.name, file.size, sources)
        if sharing:
            output.on_shared = shared.add
        # Sharing is quick and may fail, so it comes before hours of copying.
        output.share(file.shares())
        outputs.append(output)
    if created:
        _announce(plan, outputs, created)
    pairs = [pair for pair in zip(plan.files, outputs, strict=True) if pair[1].takes_bytes]
    to_do = plan.totals.copied + plan.totals.written + sum(_to_fill(file, output) for file, output in pairs)
    # Planned outputs take no bytes here, so there is no progress to report.
    steps = _Steps(to_do, progress if pairs or not outputs else None)
    for file, output in pairs:
        for step in _filled(file, output):
            steps.add(step)
    for file, output in pairs:
        for piece in _pieces(file, output, Action.WRITE, _METADATA_PIECE):
            output.write(piece.offset, piece.source.read(piece.source_offset, piece.length))
            steps.add(piece.length)
    if pairs and plan.totals.copied:
        copies = (piece for file, output in pairs for piece in _pieces(file, output, Action.COPY))
        # Importing the thread pool takes longer than copying a partial last block.
        few = plan.totals.copied <= _PIECE
        for step in map(_copy, _batches(copies)) if few else in_order(_copy, _batches(copies)):
            steps.add(step)
    return [output.finish() for output in outputs]


def _announce(plan: Plan, outputs: Sequence[Output], created: Created) -> None:
    for file, output in zip(plan.files, outputs, strict=True):
        if output.descriptor >= 0:
            created(file.name, output.descriptor)


class _Steps:
    """Counts finished bytes and reports progress."""

    def __init__(self, to_do: int, progress: Progress | None) -> None:
        self._done, self._to_do, self._progress = 0, to_do, progress
        self.add(0)

    def add(self, step: int) -> None:
        self._done += step
        if self._progress:
            self._progress(self._done, self._to_do)


def _pieces(file: FilePlan, output: Output, action: Action, size: int = _PIECE) -> Iterator[_Piece]:
    for offset, length, index, source_offset in file.steps.rows(action):
        source = file.sources[index]
        for at in range(0, length, size):
            yield _Piece(output, source, source_offset + at, offset + at, min(size, length - at))


def _to_fill(file: FilePlan, output: Output) -> int:
    """Returns the bytes that `_filled` yields."""
    return sum(length for _, length in file.gaps()) if file.allocation == "zeros" or not output.reads_as_zero else 0


def _filled(file: FilePlan, output: Output) -> Iterator[int]:
    """Gives ranges without payload what the plan and the output ask for; yields the bytes of each step."""
    for offset, length in file.gaps():
        if not output.reads_as_zero:
            yield from _in_steps(output.zero, offset, length, _ZEROED)
        elif file.allocation == "zeros":
            yield from _in_steps(lambda at, size: output.write(at, bytes(size)), offset, length, _METADATA_PIECE)
        elif file.allocation == "space":
            output.allocate(offset, length)


def _in_steps(work: Callable[[int, int], object], offset: int, length: int, size: int) -> Iterator[int]:
    """Calls `work` for pieces of a range, which a signal need not wait for; yields their lengths."""
    for at in range(0, length, size):
        step = min(size, length - at)
        work(offset + at, step)
        yield step


def _copy(pieces: Sequence[_Piece]) -> int:
    """Copies pieces and returns their total length; runs in threads."""
    for piece in pieces:
        piece.output.copy(piece.source, piece.source_offset, piece.offset, piece.length)
    return sum(piece.length for piece in pieces)


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    """Yields lists of consecutive pieces of about `_PIECE` bytes, so that small pieces cost no task each."""
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += piece.length
        if size >= _PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
