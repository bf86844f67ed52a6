r"""Names of files in images: of this system, and of the systems that images were made on.

A VMDK from an ESX host names its parent by `/vmfs/volumes/...`, one from Windows by `C:\...`: neither is here, though
the file was brought along and lies beside the image.
"""

from __future__ import annotations

import ntpath
import os
import posixpath
import re

from vmconv.errors import PlanError

_DRIVE = re.compile(r"[A-Za-z]:")
_URL = re.compile(r"file://([^/]*)(/.*)", re.IGNORECASE | re.DOTALL)
_DATASTORE = re.compile(r"\[[^\]/]+\] ?(.+)", re.DOTALL)
_ELSEWHERE = ("/vmfs/", "/Users/", "/Volumes/")
"""Where ESX and macOS keep files; no such directories are on Linux."""


def text_of(name: str) -> str:
    """Returns the UTF-8 text that the bytes of a file name are, whatever encoding the locale has.

    Python decodes file names by the locale: where that is not UTF-8, the string is another one than users see. What
    goes into an image has to be the name itself.
    """
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def named_by(text: str) -> str:
    """Returns the file name, as Python has it here, whose bytes are this UTF-8 text."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def to_windows(name: str) -> str:
    """Returns the name of a file of this system as a path of Windows; raises `PlanError` where it would be another."""
    text = text_of(name)
    if "\\" in text or any("\udc80" <= each <= "\udcff" for each in text):
        raise PlanError(
            f"file name {name!r} cannot be a path of Windows, which the format needs",
            hint="rename the file: no backslashes, and UTF-8 only",
        )
    return text.replace("/", "\\")


def from_windows(name: str) -> str:
    """Returns a path of Windows as one of this system; the name alone where it has a drive or a share."""
    if on_windows(name):
        return ntpath.basename(name.replace("/", "\\"))
    path = name.replace("\\", "/")
    while path.startswith("./"):
        path = path[2:]
    return path


def from_url(name: str) -> str:
    """Returns the path that a `file:` URL names; any other name as it is."""
    found = _URL.fullmatch(name)
    if not found:
        return name
    from urllib.parse import unquote

    path = unquote(found[2], errors="surrogateescape")
    # file:///C:/disk.vhd
    return path[1:] if _DRIVE.match(path[1:]) else path


def is_foreign(reference: str) -> bool:
    """True for a path that only another system can have written, and for a URL of a file."""
    return bool(
        on_windows(reference)
        or _URL.fullmatch(reference)
        or _DATASTORE.fullmatch(reference)
        or reference.startswith(_ELSEWHERE)
    )


def on_windows(name: str) -> bool:
    """True for a path with a drive or a share."""
    return bool(_DRIVE.match(name)) or name.startswith(("\\\\", "//"))


def base_of(reference: str) -> str:
    """Returns the base name in a path of whatever system; empty where there is none."""
    path = from_url(reference)
    if found := _DATASTORE.fullmatch(path):
        path = found[1]
    name = posixpath.basename(path) if path.startswith("/") and not path.startswith("//") else ntpath.basename(path)
    return "" if name in (".", "..") else name


def beside(directory: str, name: str, but: os.stat_result) -> str | None:
    """Returns the regular file of that name in `directory`, or else the only one whose name differs by case alone.

    It is not the file `but`, which is the one that asks.
    """
    if not name or "/" in name:
        return None
    if _is_file(os.path.join(directory, name), but):
        return os.path.join(directory, name)
    try:
        names = os.listdir(directory)
    except OSError:
        return None
    wanted = name.casefold()
    alike = [os.path.join(directory, each) for each in names if each.casefold() == wanted]
    found = [path for path in alike if _is_file(path, but)]
    return found[0] if len(found) == 1 else None


def _is_file(path: str, but: os.stat_result) -> bool:
    return os.path.isfile(path) and not os.path.samestat(os.stat(path), but)
