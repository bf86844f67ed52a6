"""The errors of vmconv: one root class; each class has the exit code of the command line.

A message is one phrase with the file, the field, its offset and its value. The `hint` says what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager


def printable(text: str) -> str:
    """Returns the text with escapes for unprintable characters."""
    # File names from an untrusted image could carry terminal control sequences.
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def in_words(value: object) -> str:
    """Returns a value as text: records as "name value" pairs, booleans as in JSON."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {in_words(field)}" for key, field in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns "did you mean NAME? " for the name that resembles `word` most; empty without one."""
    # Imported late: only wrong words need it.
    from difflib import get_close_matches

    # The dashes of options resemble nothing.
    names = {name.lstrip("-"): name for name in known}
    found = get_close_matches(word.lstrip("-"), names, n=1)
    return f"did you mean {names[found[0]]}? " if found else ""


def counted(count: int, noun: str) -> str:
    """Returns a number and its noun, in the plural unless it is 1."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun[:-1]}ies" if noun.endswith("y") else f"{count} {noun}s"


class VmconvError(Exception):
    """Base class of all vmconv errors; `exit_code` is the exit status of the command line."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(printable(message))
        self.hint = None if hint is None else printable(hint)


class UsageError(VmconvError):
    """The request is invalid: an unknown format, option or combination."""

    exit_code = 2


class SecretError(UsageError):
    """An image is encrypted, and the user gave no passphrase. All but its payload can be read."""


class ImageError(VmconvError):
    """An image is damaged, inconsistent, or uses an unsupported feature, which the message names."""


class ReadError(VmconvError):
    """Storage failed while a file was read. Not an `ImageError`: the image may be sound."""


class AccessError(VmconvError):
    """The rules of the `Opener` forbid a file, or another process has it open for writing."""


class PlanError(VmconvError):
    """The conversion cannot be planned: the target cannot hold the disk, exists, or is the source."""


class ExistsError(PlanError):
    """A target exists and is not to be replaced. Nothing was written."""

    exit_code = 4


class ZeroCopyError(PlanError):
    """The caller requires zero-copy, but payload would have to be copied. Nothing was written."""

    exit_code = 3


class BackendError(VmconvError):
    """Storage refused or failed while the plan was executed. The target was not created."""


class VerifyError(BackendError):
    """The result, read back, differs from the source's disk. The target was not created."""


class PluginError(VmconvError):
    """A plugin is broken, missing, or claims the name of another.

    `format_name` is the format that breaks the contract of `vmconv.plugin`.
    """

    def __init__(self, message: str, *, hint: str | None = None, format_name: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.format_name = format_name


def warn(text: str) -> None:
    """Logs a warning to the logger "vmconv"; the command line prints it to standard error."""
    # Imported late: importing logging takes longer than sharing a disk.
    import logging

    logging.getLogger("vmconv").warning("warning: %s", text)


@contextmanager
def os_errors(doing: str, error: type[VmconvError] = BackendError, *, where: str = "") -> Iterator[None]:
    """Turns an `OSError` of the block into `error`, with a message of path, `doing` and the system's reason.

    `where` is the path for errors without a file name, such as those of calls on descriptors.
    """
    try:
        yield
    except OSError as exc:
        name = exc.filename2 or exc.filename
        path = (name or "''") if isinstance(name, str) else where
        raise error(f"{path}: {doing}: {exc.strerror or exc}" if path else f"{doing}: {exc.strerror or exc}") from exc
