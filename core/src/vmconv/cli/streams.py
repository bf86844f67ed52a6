"""The standard streams: all three exist, write errors name standard output, and those of standard error are ignored."""

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

    A closed descriptor becomes /dev/null. Otherwise the next opened file would get its number, and messages would be
    written into an image.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _closed.add(number)
            # Child processes need the three descriptors too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), True)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 as long as the program
    try:
        sys.stdout = _stream(1, _Named, sys.stdout, sys.__stdout__)
        sys.stderr = _stream(2, _Unfailing, sys.stderr, sys.__stderr__)
    except OSError:
        # Python's own streams stay.
        return


def is_closed(number: int) -> bool:
    """True if the program was started without this standard descriptor."""
    return number in _closed


def drop_output() -> None:
    """Sends buffered standard output to /dev/null, so that it does not fail again at exit."""
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.dup2(null, sys.stdout.fileno())
    except (OSError, ValueError):
        # A replacement of standard output without a descriptor, as in tests.
        pass
    finally:
        os.close(null)


@contextmanager
def drop_output_on_error() -> Iterator[None]:
    """Continues without standard output if the block cannot write to it, with a message on standard error."""
    try:
        yield
        sys.stdout.flush()
    except OSError as exc:
        drop_output()
        print(f"vmconv: {exc.filename or NAME}: {exc.strerror}", file=sys.stderr)


class _Named(io.FileIO):
    """Standard output, with its name as the file name of errors."""

    def seekable(self) -> bool:
        """Returns False, so that Python does not ask for the position, which fails for some files."""
        return False

    def write(self, data: Any) -> Any:
        try:
            return super().write(data)
        except OSError as exc:
            exc.filename = NAME
            raise


class _Unfailing(io.FileIO):
    """Standard error without errors: a lost message must not end a conversion."""

    def seekable(self) -> bool:
        return False

    def write(self, data: Any) -> Any:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _stream(number: int, kind: type[io.FileIO], present: TextIO | None, original: TextIO | None) -> TextIO:
    """Returns a text stream that writes to the descriptor by `kind`; keeps a stream that a caller has replaced."""
    encoding, line_buffering = "utf-8", True
    if isinstance(present, io.TextIOWrapper):
        # The encoding of the stream may not have all characters of file names.
        with suppress(OSError):
            # Asks a redirected file for its position, which may fail and does not matter here.
            present.reconfigure(errors="backslashreplace")
        encoding, line_buffering = present.encoding, present.line_buffering or present.write_through
    if present is not None:
        if present is not original:
            return present
        present.flush()
    raw = io.BufferedWriter(kind(number, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=line_buffering)
