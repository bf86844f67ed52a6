"""Text for people: ages, moments, plans, progress, and untrusted names."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from vmconv.plugin import UsageError, printable, size_text

MAX_NAME = 200
UNITS = {unit: 1 << 10 * power for power, unit in enumerate("KMGT", 1)}


def age_text(milliseconds: int | None) -> str:
    """Returns a span of time for people, in its two largest units."""
    if milliseconds is None:
        return "never"
    seconds = milliseconds // 1000
    if seconds < 1:
        return "now"
    parts = [(seconds // 86400, "d"), (seconds // 3600 % 24, "h"), (seconds // 60 % 60, "min"), (seconds % 60, "s")]
    first = next(index for index, (value, _) in enumerate(parts) if value)
    return " ".join(f"{value} {unit}" for value, unit in parts[first : first + 2] if value)


def time_text(milliseconds: int | None) -> str:
    """Returns a moment in the time of this machine, with its time zone."""
    if not milliseconds:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(milliseconds / 1000))


def soon_text(milliseconds: int) -> str:
    """Returns a moment in the time of this machine, without the date if it is within a day."""
    then = time_text(milliseconds)[:-3]
    return then.partition(" ")[2] if milliseconds < (time.time() + 86_000) * 1000 else then


def cell(text: object) -> str:
    """Returns a cell of a table, escaped: untrusted names could control the terminal."""
    return printable(str(text)) if text not in (None, "") else "-"


def role_text(granted: Mapping[str, Any], name: Callable[[str], str]) -> str:
    """Returns the role that a record grants, with the datastores where it is higher; `name` is that of a node.

    A session has the roles of the person's groups.
    """
    if person := granted.get("person"):
        return f"of {', '.join(person['groups'])}"
    by_role: dict[str, list[str]] = {}
    for reference, role in sorted((granted.get("datastores") or {}).items()):
        node, _, datastore = reference.partition("/")
        by_role.setdefault(role, []).append(f"{name(node)}:{datastore}")
    higher = [f"{role} of {', '.join(places)}" for role, places in by_role.items()]
    return "; ".join(higher if higher and granted["role"] == "viewer" else [granted["role"], *higher])


def trap_in(name: str) -> str | None:
    """Returns why a name must not be given to a node, a person, a token, a datastore or a file; None if it may.

    Programs take such a name for an option, hide it, or show it as another one.
    """
    if not name or name[0] in "-.":
        return f"begins with {name[0]!r}" if name else "is empty"
    if name != name.strip():
        return "begins or ends with a space"
    # Control and format characters, those that reverse the text among them, surrogates, and separators of lines.
    for one in name:
        if one == "/" or unicodedata.category(one) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
            return f"contains the character U+{ord(one):04X}"
    return f"is longer than {MAX_NAME} bytes" if len(name.encode()) > MAX_NAME else None


def plan_text(plan: Mapping[str, Any] | None) -> str:
    if not plan:
        return "-"
    parts = [(name, int(plan.get(name, 0))) for name in ("shared", "copied", "written", "referenced")]
    said = [f"{name} {size_text(value)}" for name, value in parts if value or name in ("shared", "copied")]
    return ", ".join(said)


def progress_text(job: Mapping[str, Any]) -> str:
    """Returns the progress of a job."""
    progress = job.get("progress")
    if job.get("state") == "running" and progress and progress["total"]:
        return f"{progress['done'] / progress['total']:.0%}"
    return "100%" if job.get("state") == "done" else "-"


def numbers_by_name(type_: Callable[[str], int], text: str) -> dict[str, int]:
    """Returns the numbers of NAME=NUMBER,NAME=NUMBER. Raises UsageError if the text is something else."""
    found = {}
    for part in map(str.strip, text.split(",")):
        name, equals, number = part.partition("=")
        try:
            found[name] = type_(number)
        except ValueError as exc:
            raise UsageError(f"{part[:40]!r}: {number[:40]!r} is not a number") from exc
        if not equals or not name:
            raise UsageError(f"{part[:40]!r} is not NAME=NUMBER")
    return found


def exact_size(size: int) -> str:
    """Returns a number of bytes as an option takes it: `100M`, or `1025`."""
    unit = next((unit for unit in "TGMK" if size and size % UNITS[unit] == 0), "")
    return f"{size // UNITS.get(unit, 1)}{unit}"
