"""Strips as one self-contained SVG or HTML file, in light and dark, in colours and in black and white."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

from vmconv.cli.output import size_text
from vmconv.errors import printable

if TYPE_CHECKING:
    from vmconv.inspect.strips import Strip

LINE = 400
"""Parts of a strip on one line; each is two units wide."""
_LEFT, _STEP, _TALL, _GAP = 88, 2, 16, 3
_WIDTH = _LEFT + LINE * _STEP + 12
_TITLE, _LEGEND, _AFTER = 30, 22, 26
_LONGEST = 58
_COLUMN = _WIDTH // 2

_STYLE = """
svg { --ground: #ffffff; --text: #17202b; --muted: #5d6b7b; --hole: #eef1f4; --zero: #cfd7e0; --line: #dfe4ea;
  --layer0: #1f6feb; --layer1: #e08a1e; --layer2: #14958a; --layer3: #9a5bd8; --layer4: #c2417c; --layer5: #6b7f1f;
  --shared: #14958a; --copied: #e08a1e; --metadata: #7d6bd0; font-family: system-ui, sans-serif; font-size: 13px; }
@media (prefers-color-scheme: dark) { svg { --ground: #10161d; --text: #e4eaf1; --muted: #93a1b1; --hole: #1e2833;
  --zero: #3a4857; --line: #2a3643; --layer0: #5b9bff; --layer1: #f0a848; --layer2: #3fc4b6; --layer3: #bb8cf0;
  --layer4: #ee77ad; --layer5: #a9c24a; --shared: #3fc4b6; --copied: #f0a848; --metadata: #a99cf0; } }
@media print { svg { --ground: #ffffff; --text: #000000; --muted: #444444; --hole: #f4f4f4; --zero: #d0d0d0; } }
.ground { fill: var(--ground); } text { fill: var(--text); } .small { fill: var(--muted); font-size: 11px; }
.title { font-weight: 600; font-size: 15px; } .head { font-weight: 600; font-size: 18px; }
.part { opacity: .45; } .frame { fill: none; stroke: var(--line); }
"""


def svg(title: str, notes: Sequence[str], strips: Sequence[Strip]) -> str:
    """Returns the picture: a heading with notes below it, and each strip in lines, with its legend."""
    body: list[str] = []
    y = 34
    body.append(_text(12, y, title, "head"))
    for note in notes:
        y += 20
        body.append(_text(12, y, note, "small"))
    y += 16
    for one in strips:
        y = _strip(one, y, body)
    looks = sorted({look for one in strips for category in one.categories for look in category.look.split()})
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" width="100%" '
            f'style="max-width: {_WIDTH}px" role="img" aria-labelledby="title">',
            f'<title id="title">{_safe(title)}</title>',
            f"<style>{_STYLE}{_rules(looks)}</style>",
            '<defs><pattern id="hatch" width="4" height="4" patternUnits="userSpaceOnUse">'
            '<path d="M0 4L4 0" style="stroke: var(--ground); stroke-width: 1.4"/></pattern></defs>',
            f'<rect class="ground" width="{_WIDTH}" height="{y}"/>',
            *body,
            "</svg>\n",
        )
    )


def html(title: str, notes: Sequence[str], strips: Sequence[Strip]) -> str:
    """Returns a page with the picture, and the same sums as tables."""
    tables = "\n".join(_table(one) for one in strips)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_safe(title)}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font-family: system-ui, sans-serif; margin: 1rem auto; max-width: {_WIDTH}px; padding: 0 .5rem; }}
table {{ border-collapse: collapse; margin: 1rem 0; width: 100%; }} caption {{ text-align: left; font-weight: 600; }}
th, td {{ text-align: left; padding: .2rem .5rem; border-top: 1px solid #8888; overflow-wrap: anywhere; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
</style>
</head>
<body>
{svg(title, notes, strips)}
{tables}
</body>
</html>
"""


def _rules(looks: Sequence[str]) -> str:
    """Returns the style of each look; compressed payload is hatched above its layer's colour."""
    return "".join(f".{look} {{ fill: var(--{look}); }}\n" for look in looks if look != "compressed")


def _strip(one: Strip, top: int, body: list[str]) -> int:
    """Adds a strip below `top`, and returns where it ends."""
    y = top + _TITLE
    body.append(_text(12, y - 10, f"{one.title}: {size_text(one.size)}", "title"))
    lines = -(-len(one.category) // LINE)
    for line in range(lines):
        at = one.size * line * LINE // len(one.category)
        body.append(f'<text class="small" x="{_LEFT - 8}" y="{y + line * (_TALL + _GAP) + 12}" text-anchor="end">')
        body.append(f"{size_text(at)}</text>")
    body.extend(_paths(one, y))
    y += lines * (_TALL + _GAP) + 8
    return _legend(one, y, body) + _AFTER


def _paths(one: Strip, top: int) -> Iterator[str]:
    """Yields a path for each category and weight: the rectangles of all its runs."""
    found: dict[tuple[int, bool], list[str]] = {}
    for start, length, key in _runs(one):
        line, column = divmod(start, LINE)
        y = top + line * (_TALL + _GAP)
        found.setdefault(key, []).append(f"M{_LEFT + column * _STEP} {y}h{length * _STEP}v{_TALL}h-{length * _STEP}z")
    for (category, full), rectangles in sorted(found.items()):
        shape = "".join(rectangles)
        looks = one.categories[category].look.split()
        weight = "" if full else " part"
        yield f'<path class="{looks[-1]}{weight}" d="{shape}"/>'
        if looks[0] == "compressed":
            yield f'<path fill="url(#hatch)" d="{shape}"/>'


def _runs(one: Strip) -> Iterator[tuple[int, int, tuple[int, bool]]]:
    """Yields `(first part, parts, (category, full))` of each run of equal parts on one line."""
    at = 0
    marks = zip(one.category.tolist(), one.full.tolist(), (i // LINE for i in range(len(one.category))), strict=True)
    for (category, full, _), group in groupby(marks):
        length = sum(1 for _ in group)
        yield at, length, (category, full)
        at += length


def _legend(one: Strip, top: int, body: list[str]) -> int:
    shown = [(category, count) for category, count in zip(one.categories, one.bytes, strict=True) if count]
    for place, (category, count) in enumerate(shown):
        x, y = 12 + place % 2 * _COLUMN, top + place // 2 * _LEGEND
        looks = category.look.split()
        body.append(f'<rect class="{looks[-1]}" x="{x}" y="{y}" width="12" height="12"/>')
        if looks[0] == "compressed":
            body.append(f'<rect fill="url(#hatch)" x="{x}" y="{y}" width="12" height="12"/>')
        body.append(_text(x + 20, y + 11, f"{size_text(count)} {category.words}", ""))
    return top + -(-len(shown) // 2) * _LEGEND


def _table(one: Strip) -> str:
    rows = "\n".join(
        f'<tr><td>{_safe(category.words)}</td><td class="number">{count}</td></tr>'
        for category, count in zip(one.categories, one.bytes, strict=True)
        if count
    )
    return (
        f"<table><caption>{_safe(one.title)}: {one.size} bytes</caption>\n"
        f'<tr><th scope="col">what</th><th scope="col" class="number">bytes</th></tr>\n{rows}</table>'
    )


def _text(x: int, y: int, text: str, style: str) -> str:
    shown = text if len(text) <= _LONGEST or style == "small" else f"{text[:30]}…{text[-27:]}"
    return f'<text{f" class={chr(34)}{style}{chr(34)}" if style else ""} x="{x}" y="{y}">{_safe(shown)}</text>'


def _safe(text: str) -> str:
    return escape(printable(text))
