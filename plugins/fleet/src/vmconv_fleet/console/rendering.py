"""Templates and their filters: escaping of foreign text; sizes, ages and moments in words."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from vmconv.plugin import printable, size_text
from vmconv_fleet.catalogue.kinds import JobPlan
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
    }
    return environment


def render(template: str, values: Mapping[str, Any]) -> str:
    return _environment().get_template(template).render(values)
