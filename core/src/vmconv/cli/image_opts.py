"""Sources in QEMU's notations, `json:{...}` and `--image-opts`, as a path and a format.

Only what a path and a format can say is taken. Everything else is refused by its key, because a source is a file that
the user names and nothing else is opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from vmconv.errors import UsageError
from vmconv.interface.scheme import STANDARD_INPUT, is_url

_JSON = "json:"
_FILE_DRIVERS = ("file", "host_device")
_KEYS = frozenset({"driver", "filename", "file.driver", "file.filename"})
_MOST = 64 << 10
"""Characters of a source in such a notation."""


def named(text: str, format_name: str | None, *, image_opts: bool) -> tuple[str, str | None]:
    """Returns path and format of the source that the user named. Raises `UsageError` for more than that."""
    if image_opts:
        given = _options(text)
    elif text.startswith(_JSON) and not os.path.lexists(text):
        given = _members(text)
    else:
        return text, format_name
    if format_name is not None:
        raise UsageError(f"-f and the notation of {text[:64]!r} exclude each other: its driver is the format")
    return _source(given)


def _source(given: dict[str, str]) -> tuple[str, str]:
    unknown = sorted(given.keys() - _KEYS)
    if unknown:
        hint = f"of QEMU's options: {', '.join(sorted(_KEYS))}"
        if given.get("driver") == "raw" and unknown[0] in ("offset", "size"):
            hint = "vmconv convert --offset and --length take a part of the disk"
        raise UsageError(f"{unknown[0]}={given[unknown[0]]}: is not taken", hint=hint)
    driver, protocol = given.get("driver"), given.get("file.driver", "file")
    if driver in _FILE_DRIVERS and "filename" in given and not any(key.startswith("file.") for key in given):
        return _local(given["filename"]), "raw"
    if protocol not in _FILE_DRIVERS:
        raise UsageError(f"file.driver={protocol}: only file and host_device are read")
    if driver is None or driver in _FILE_DRIVERS or "file.filename" not in given or "filename" in given:
        raise UsageError("a source in QEMU's notation has driver=FORMAT and file.filename=PATH")
    return _local(given["file.filename"]), driver


def _local(path: str) -> str:
    """Returns the path of a file whose name may look like a URL or like standard input."""
    try:
        if "\0" in path or not os.fsencode(path):
            raise ValueError
    except ValueError:
        raise UsageError(f"filename={path!r}: is not the name of a file") from None
    return f"./{path}" if is_url(path) or path == STANDARD_INPUT else path


def _options(text: str) -> dict[str, str]:
    """Returns the options of `key=value,key=value`, in which a comma of a value is written twice."""
    given: dict[str, str] = {}
    for escaped in text[:_MOST].replace(",,", "\0").split(","):
        part = escaped.replace("\0", ",")
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise UsageError(f"--image-opts: {part!r} is not key=value")
        _add(given, key, value)
    return given


def _members(text: str) -> dict[str, str]:
    """Returns the members of a JSON object; those of nested objects with dots in their keys, as QEMU has them."""
    try:
        found = json.loads(text.removeprefix(_JSON), object_pairs_hook=_once) if len(text) <= _MOST else None
        if not isinstance(found, dict):
            raise UsageError(f"{text[:64]!r}: is not an object of at most {_MOST} characters")
        given: dict[str, str] = {}
        for key, value in _flat(found, ""):
            _add(given, key, value)
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"{text[:64]!r}: is not JSON: {exc}") from exc
    return given


def _once(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object; raises `UsageError` for a key that is there twice, as QEMU does."""
    found: dict[str, Any] = {}
    for key, value in members:
        if key in found:
            raise UsageError(f"{key}: is given twice")
        found[key] = value
    return found


def _flat(members: dict[str, Any], above: str) -> Iterator[tuple[str, str]]:
    for key, value in members.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        elif isinstance(value, str):
            yield f"{above}{key}", value
        elif f"{above}{key}" in _KEYS:
            raise UsageError(f"{above}{key}: is not text")
        else:
            # It is refused by its key.
            yield f"{above}{key}", json.dumps(value)


def _add(given: dict[str, str], key: str, value: str) -> None:
    if key in given:
        raise UsageError(f"{key}: is given twice")
    given[key] = value
