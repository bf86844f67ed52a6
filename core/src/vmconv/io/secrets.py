"""Passphrases of encrypted images: the content of files that the user names, read when the first image needs one.

A passphrase is never an argument, which all users of a machine can read.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable
from functools import cache, cached_property
from typing import NamedTuple

from vmconv.errors import AccessError, SecretError, UsageError, os_errors
from vmconv.interface.scheme import STANDARD_INPUT
from vmconv.model.sources import File

MAX_LENGTH = 8 << 20
"""Bytes of a passphrase; cryptsetup has the same limit for key files."""
MAX_SECRETS = 16


class _Read(NamedTuple):
    """A passphrase, and the file that it is all of; None if it came from a pipe or a terminal."""

    content: bytes
    file: File | None


class Secrets:
    """The passphrases in the files `names`; "-" is standard input. Each is all bytes of its file, as for QEMU.

    `names` is None for a caller that takes no passphrases, such as a command that changes an image where it lies.
    """

    def __init__(self, names: Iterable[str] | None = None) -> None:
        self._taken = names is not None
        self._names = tuple(dict.fromkeys(names or ()))
        if len(self._names) > MAX_SECRETS:
            raise UsageError(f"--secret: {len(self._names)} files, {MAX_SECRETS} at most")

    @cached_property
    def _found(self) -> tuple[_Read, ...]:
        return tuple(map(_read, self._names))

    def for_image(self, name: str) -> tuple[bytes, ...]:
        """Returns the passphrases to try for the image `name`. Raises `SecretError` if there are none."""
        if not self._names:
            raise SecretError(
                f"{name}: is encrypted, and no passphrase is given",
                hint="--secret FILE names a file that has it, --secret - reads it from the terminal or a pipe"
                if self._taken
                else "this takes none; vmconv convert --secret FILE makes an image that is not encrypted",
            )
        return tuple(one.content for one in self._found)

    def refuse_source(self, path: str) -> None:
        """Raises `UsageError` if the source `path` is a pipe that a passphrase would be read from."""
        if path in self._names:
            raise UsageError(f"--secret {path}: it is the source already", hint="name a file that has the passphrase")

    def files(self) -> list[File]:
        """Returns the files that were read, open: who cannot read them must not read what they decrypt."""
        return [one.file for one in self._found if one.file] if "_found" in self.__dict__ else []

    @property
    def typed(self) -> bool:
        """True if a passphrase was read that is in no file, so that only the user has it."""
        return "_found" in self.__dict__ and any(one.file is None for one in self._found)

    def close(self) -> None:
        for file in self.files():
            file.close()
        self.__dict__.pop("_found", None)


def new_passphrase(name: str) -> bytes:
    """Returns the passphrase of a new image: all bytes of the file `name`.

    Raises `UsageError` for standard input: one that is typed once, wrongly, opens nothing later.
    """
    if name == STANDARD_INPUT:
        raise UsageError("--target-secret -: a new passphrase is read from a file", hint="name a file that has it")
    found = _read(name)
    if found.file:
        found.file.close()
    return found.content


def _read(name: str) -> _Read:
    if name == STANDARD_INPUT:
        return _Read(_standard_input(), None)
    with os_errors("cannot be opened as a secret", AccessError):
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    kept = False
    try:
        content = _bounded(descriptor, name)
        kept = stat.S_ISREG(os.fstat(descriptor).st_mode)
        return _Read(content, File(name, descriptor) if kept else None)
    finally:
        if not kept:
            os.close(descriptor)


def _bounded(descriptor: int, name: str) -> bytes:
    """Returns all bytes up to the end. Raises `AccessError` if there are none, or too many."""
    content = bytearray()
    with os_errors("cannot be read as a secret", AccessError, where=name):
        while len(content) <= MAX_LENGTH and (part := os.read(descriptor, 1 << 16)):
            content += part
    if not content or len(content) > MAX_LENGTH:
        what = f"has more than {MAX_LENGTH} bytes" if content else "is empty"
        raise AccessError(f"{name}: {what}, and a secret was expected")
    return bytes(content)


@cache
def _standard_input() -> bytes:
    """Returns what is typed, without its line break, or all that comes from a pipe. It can be read only once."""
    if not sys.stdin.isatty():
        return _bounded(sys.stdin.fileno(), "standard input")
    from getpass import getpass

    try:
        typed = getpass("Passphrase: ")
    except EOFError:
        typed = ""
    if not typed:
        raise AccessError("standard input: no passphrase was typed")
    return os.fsencode(typed)
