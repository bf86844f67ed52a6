"""Types of options: windows of time, and numbers by name."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from vmconv.plugin import UsageError
from vmconv_fleet.words import numbers_by_name

T = TypeVar("T")

NONE = "none"
"""The value that takes a rule back; an option that is not given changes nothing."""


def none_or(type_: Callable[[str], T]) -> Callable[[str], T | str]:
    def value(text: str) -> T | str:
        return NONE if text == NONE else type_(text)

    return value


def numbers(type_: Callable[[str], int]) -> Callable[[str], dict[str, int]]:
    """Returns the type of NAME=NUMBER,NAME=NUMBER."""
    return partial(numbers_by_name, type_)


def names(text: str) -> list[str]:
    """Returns the names of NAME,NAME."""
    return [name for name in text.split(",") if name]


def window(text: str) -> str:
    """Returns a window with its time zone, by default that of this machine."""
    from vmconv_fleet.catalogue.windows import WindowError, parsed

    try:
        # The owner of the disk checks the zone, which may be unknown here.
        parsed(text.partition(" ")[0])
    except WindowError as exc:
        raise UsageError(str(exc), hint=exc.hint) from exc
    return text if " " in text else f"{text} {_local_zone()}"


def _local_zone() -> str:
    """Returns the name of this machine's time zone. Raises UsageError if it has none."""
    place = os.environ.get("TZ", "").removeprefix(":") or os.path.realpath("/etc/localtime")
    name = place.rpartition("/zoneinfo/")[2]
    if re.fullmatch(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*", name) and not name.startswith("localtime"):
        return name
    hours, rest = divmod(-time.timezone, 3600)
    if rest or time.daylight:
        raise UsageError("this machine's time zone has no name", hint="write it: '22:00-05:00 Europe/Berlin'")
    # POSIX has the signs the other way round.
    return f"Etc/GMT{-hours:+d}" if hours else "UTC"
