"""The chain of an image as a tree, with what is missing or refused in its place."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from vmconv.cli.colours import paint
from vmconv.cli.output import size_text
from vmconv.errors import VmconvError, printable
from vmconv.model.image import Image
from vmconv.model.references import OWN_ROLES

_SHOWN = 8
"""Files of one layer."""
_INDENT = " " * 4


def chain_lines(image: Image) -> Iterator[str]:
    """Yields the lines of a tree: the image, below it its own other files, then its parent with the same again."""
    branch, last = _marks()
    yield _layer(image)
    indent = ""
    layer: Image | None = image
    while layer is not None:
        own = [one for one in layer.dependencies if one.role in OWN_ROLES]
        below = [printable(f"{one.name} ({one.role})") for one in own[:_SHOWN]]
        if len(own) > _SHOWN:
            below.append(f"... {len(own)} files in all")
        has_parent = layer.parent_reference is not None
        for number, line in enumerate(below):
            yield f"{indent}{branch if has_parent or number < len(below) - 1 else last}{line}"
        if not has_parent:
            return
        try:
            parent = layer.parent
        except VmconvError as exc:
            named = printable(str(layer.parent_reference))
            yield f"{indent}{last}{paint(f'{named}: not readable', 'error', sys.stdout)}: {exc}"
            if exc.hint:
                yield f"{indent}{_INDENT}{paint('hint', 'hint', sys.stdout)}: {exc.hint}"
            return
        if parent is None:
            return
        yield f"{indent}{last}{_layer(parent)}"
        indent += _INDENT
        layer = parent


def _layer(image: Image) -> str:
    taken = image.file.stored()
    name = paint(printable(image.file.path), "strong", sys.stdout)
    return f"{name} ({image.format_name}, {size_text(image.size)}, {size_text(taken)} on disk)"


def _marks() -> tuple[str, str]:
    """Returns the marks of a branch and of the last one, in ASCII if standard output has no others."""
    marks = ("├── ", "└── ")
    try:
        "".join(marks).encode(sys.stdout.encoding or "ascii")
    except (UnicodeError, LookupError):
        return "|-- ", "`-- "
    return marks
