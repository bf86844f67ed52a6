"""Templates and their filters: escaping of foreign text; sizes, ages and moments in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from vmconv.plugin import printable, size_text
from vmconv_fleet.catalogue.kinds import JobPlan, Strip
from vmconv_fleet.replication.records import Record
from vmconv_fleet.words import age_text, exact_size, time_text

if TYPE_CHECKING:
    from jinja2 import Environment


def address_of(pages: str, record: Record) -> str:
    """Returns the address of a record's page. Its id may be anything: another node has chosen it."""
    return f"/{pages}/{quote(record.owner, safe='')}/{quote(record.id, safe='')}"


class BarSegment(NamedTuple):
    """A segment of a bar; `x` and `width` are in percent."""

    name: str
    size: int
    x: float
    width: float


def parts_of(plan: JobPlan) -> list[BarSegment]:
    """Returns the shared, referenced, copied and written parts of a result as segments of a bar."""
    names = ("shared", "referenced", "copied", "written")
    sizes = [(name, int(getattr(plan, name))) for name in names]
    total = sum(size for _, size in sizes)
    parts: list[BarSegment] = []
    at = 0.0
    for name, size in sizes:
        width = 100 * size / total if total else 0.0
        parts.append(BarSegment(name, size, round(at, 3), round(width, 3)))
        at += width
    return parts


class Run(NamedTuple):
    """A run of equal parts of a strip on one of its lines; `x`, `y` and `width` are in parts, `look` is its style."""

    look: str
    x: int
    y: int
    width: int


LINE = 40
"""Parts of a strip on one line: few enough to be seen on a phone."""
LOOKS = {
    "h": ("hole", "not allocated"),
    "z": ("zeros", "zeros"),
    "p": ("payload", "payload"),
    "b": ("below", "payload of layers below"),
    "k": ("packed", "compressed or encoded payload"),
    "s": ("shared", "shared"),
    "c": ("copied", "copied"),
    "m": ("written", "metadata"),
}
"""The style of each letter of a strip, and what it says. Another node may have letters that this one does not know."""
_UNKNOWN = ("unknown", "something else")


def runs_of(strip: Strip) -> list[Run]:
    """Returns the runs of a strip, line by line."""
    found: list[Run] = []
    for y, at in enumerate(range(0, len(strip.parts), LINE)):
        x = 0
        for letter, group in groupby(strip.parts[at : at + LINE]):
            width = sum(1 for _ in group)
            found.append(Run(LOOKS.get(letter, _UNKNOWN)[0], x, y, width))
            x += width
    return found


def looks_of(strip: Strip) -> list[tuple[str, str, int]]:
    """Returns style, words and percent of the parts of each letter in a strip."""
    counts = Counter(LOOKS.get(letter, _UNKNOWN) for letter in strip.parts)
    return [
        (*look, round(100 * counts[look] / len(strip.parts))) for look in (*LOOKS.values(), _UNKNOWN) if counts[look]
    ]


def _moment(milliseconds: int | None) -> str:
    return time_text(milliseconds) if milliseconds else "\N{EN DASH}"


def _shown(value: Any) -> Any:
    """Returns foreign text without characters that hide or change the direction of text."""
    from markupsafe import Markup

    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value)
    return "\N{EN DASH}" if value is None else value


@cache
def _environment() -> Environment:
    # Most callers of a node read the API only.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vmconv_fleet.console"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "address": address_of,
        "age": age_text,
        "moment": _moment,
        "percent": lambda part, whole: f"{100 * part / whole:.0f}" if whole else "0",
        "exact": exact_size,
        "size": size_text,
        "parts": parts_of,
        "runs": runs_of,
        "looks": looks_of,
    }
    return environment


def render(template: str, values: Mapping[str, Any]) -> str:
    return _environment().get_template(template).render(values)
