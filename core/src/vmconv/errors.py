"""The errors of vmconv: one root, and the exit code of the command line on each class.

A message is one phrase that names the file, the field, its offset and value; what to do about it is the `hint`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


def printable(text: str) -> str:
    """Returns the text with escapes for what no terminal should be sent: names come from images of strangers."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def in_words(value: object) -> str:
    """Returns a value of `Disk` for people: the fields of a record with their names, truth as JSON has it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {in_words(field)}" for key, field in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)


class VmconvError(Exception):
    """Root of every error that vmconv raises on purpose; `exit_code` is what the command line returns for it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(printable(message))
        self.hint = None if hint is None else printable(hint)


class UsageError(VmconvError):
    """The request itself makes no sense: an unknown format, option or combination."""

    exit_code = 2


class ImageError(VmconvError):
    """An image is damaged, contradicts itself, or uses a feature that is refused by name."""


class ReadError(VmconvError):
    """Storage failed while a file was read. No `ImageError`: it says nothing about what is in the image."""


class AccessError(VmconvError):
    """An image asks for a file that the rules of the `Opener` do not allow, or that somebody else is writing."""


class PlanError(VmconvError):
    """The conversion cannot be planned: the target cannot hold the disk, or exists, or is the source."""


class ZeroCopyError(PlanError):
    """Payload would have to be copied although the caller asked for zero-copy only; nothing was touched."""

    exit_code = 3


class BackendError(VmconvError):
    """Storage refused or failed while a conversion was made real; the target was not created."""


class VerifyError(BackendError):
    """The result, read back, is not the source's disk; the target was not created."""


class PluginError(VmconvError):
    """A plugin is broken, missing, or claims a name that another one claims.

    `format_name` is the format that does not do what the interface promises.
    """

    def __init__(self, message: str, *, hint: str | None = None, format_name: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.format_name = format_name


def warn(text: str) -> None:
    """Logs a warning for whoever runs a command; programs decide by the logger "vmconv" what becomes of it."""
    # Imported for a warning only: its import takes longer than sharing a disk.
    import logging

    logging.getLogger("vmconv").warning("warning: %s", text)


@contextmanager
def os_errors(doing: str, error: type[VmconvError] = BackendError, *, where: str = "") -> Iterator[None]:
    """Turns an `OSError` of the block into `error`: the one place where the system's errors are wrapped.

    `where` is the path to name when the error names none: calls on descriptors do not.
    """
    try:
        yield
    except OSError as exc:
        name = exc.filename2 or exc.filename
        path = name if isinstance(name, str) else where
        raise error(f"{path}: {doing}: {exc.strerror or exc}" if path else f"{doing}: {exc.strerror or exc}") from exc
