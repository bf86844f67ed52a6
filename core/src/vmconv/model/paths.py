r"""File names in images, of this system and of others.

A VMDK from an ESX host names its parent `/vmfs/volumes/...`, one from Windows `C:\...`. Neither path exists here, but
the parent was often moved along and lies beside the image.
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
"""Trees of ESX and macOS that do not exist on Linux."""


def text_of(name: str) -> str:
    """Returns a file name decoded as UTF-8, in any locale.

    Python decodes file names by the locale. Images must contain the bytes of the name itself.
    """
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def named_by(text: str) -> str:
    """Returns the Python file name, in this locale, for UTF-8 text from an image."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def to_windows(name: str) -> str:
    """Returns a file name as a Windows path; raises `PlanError` if Windows would read another name."""
    text = text_of(name)
    # Surrogates stand for bytes that are not UTF-8 (PEP 383).
    if "\\" in text or any("\udc80" <= each <= "\udcff" for each in text):
        raise PlanError(
            f"file name {name!r} cannot be a Windows path, which the format requires",
            hint="rename the file: no backslashes, and UTF-8 only",
        )
    return text.replace("/", "\\")


def from_windows(name: str) -> str:
    """Returns a Windows path as a path of this system; only the base name if it has a drive or a share."""
    if on_windows(name):
        return ntpath.basename(name.replace("/", "\\"))
    path = name.replace("\\", "/")
    while path.startswith("./"):
        path = path[2:]
    return path


def from_url(name: str) -> str:
    """Returns the path of a `file:` URL; any other name unchanged."""
    found = _URL.fullmatch(name)
    if not found:
        return name
    from urllib.parse import unquote

    path = unquote(found[2], errors="surrogateescape")
    # file:///C:/disk.vhd has a slash before the drive.
    return path[1:] if _DRIVE.match(path[1:]) else path


def is_foreign(reference: str) -> bool:
    """True for a path of another system, and for a `file:` URL."""
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
    """Returns the base name of a path of any system; empty if it has none."""
    path = from_url(reference)
    if found := _DATASTORE.fullmatch(path):
        path = found[1]
    name = posixpath.basename(path) if path.startswith("/") and not path.startswith("//") else ntpath.basename(path)
    return "" if name in (".", "..") else name


def beside(directory: str, name: str, but: os.stat_result) -> str | None:
    """Returns the regular file `name` in `directory`, else the only one whose name differs in case; never `but`."""
    # The name comes from an image, and must not lead out of the directory.
    if not name or "/" in name:
        return None
    if _is_file(os.path.join(directory, name), but):
        return os.path.join(directory, name)
    try:
        names = os.listdir(directory)
    except OSError:
        return None
    # The image may come from a system whose file names ignore case.
    wanted = name.casefold()
    alike = [os.path.join(directory, each) for each in names if each.casefold() == wanted]
    found = [path for path in alike if _is_file(path, but)]
    return found[0] if len(found) == 1 else None


def _is_file(path: str, but: os.stat_result) -> bool:
    return os.path.isfile(path) and not os.path.samestat(os.stat(path), but)
