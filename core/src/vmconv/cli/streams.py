"""The standard streams of the program: all three exist, and a failure to write names standard output or is ignored."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

NAME = "standard output"

_closed: set[int] = set()


def prepare() -> None:
    """Makes the three standard streams usable, however the program was started.

    A descriptor that is closed becomes /dev/null: otherwise the next file that is opened gets its number, and messages
    are written into an image.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _closed.add(number)
            os.set_inheritable(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), True)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 as long as the program
    try:
        sys.stdout = _stream(1, _Named, sys.stdout, sys.__stdout__)
        sys.stderr = _stream(2, _Unfailing, sys.stderr, sys.__stderr__)
    except OSError:
        # Python's own streams stay.
        return


def is_closed(number: int) -> bool:
    """True when the program was started without this standard descriptor."""
    return number in _closed


def drop_output() -> None:
    """Sends what is still buffered for standard output to /dev/null, so that it does not fail again at the exit."""
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.dup2(null, sys.stdout.fileno())
    except (OSError, ValueError):
        # A double of standard output without a descriptor.
        pass
    finally:
        os.close(null)


@contextmanager
def drop_output_on_error() -> Iterator[None]:
    """Goes on without standard output when the block cannot write to it, and says so on standard error."""
    try:
        yield
        sys.stdout.flush()
    except OSError as exc:
        drop_output()
        print(f"vmconv: {exc.filename or NAME}: {exc.strerror}", file=sys.stderr)


class _Named(io.FileIO):
    """Standard output; its errors have its name where those of a file have the file's."""

    def seekable(self) -> bool:
        """Says that nobody will seek, so that nobody asks for the position, which not every file tells."""
        return False

    def write(self, data: Any) -> Any:
        try:
            return super().write(data)
        except OSError as exc:
            exc.filename = NAME
            raise


class _Unfailing(io.FileIO):
    """Standard error: a message that cannot be written must not end a conversion."""

    def seekable(self) -> bool:
        return False

    def write(self, data: Any) -> Any:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _stream(number: int, kind: type[io.FileIO], present: TextIO | None, original: TextIO | None) -> TextIO:
    """Returns a text stream that writes to the descriptor by `kind`; one that a caller has put there stays."""
    encoding, line_buffering = "utf-8", True
    if isinstance(present, io.TextIOWrapper):
        # File names need not be text in the encoding of the stream.
        with suppress(OSError):
            # Asks for the position in a file that standard output was redirected to; nothing here needs it.
            present.reconfigure(errors="backslashreplace")
        encoding, line_buffering = present.encoding, present.line_buffering or present.write_through
    if present is not None:
        if present is not original:
            return present
        present.flush()
    raw = io.BufferedWriter(kind(number, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=line_buffering)
