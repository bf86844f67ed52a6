"""Pictures of disks and plans: a file that others can look at, or lines in the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vmconv.cli.output import say, size_text
from vmconv.errors import ExistsError, PlanError, os_errors

if TYPE_CHECKING:
    import argparse

    from vmconv.inspect.strips import Strip
    from vmconv.model.image import Image
    from vmconv.model.plan import Plan

_DISK_LINES, _FILE_LINES = 12, 3
_MAX_FILES = 12
_SUFFIXES = (".svg", ".html")
_BLOCKS, _ASCII = "·░▒█", ".-+#"


def add_picture(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--picture",
        type=_picture_name,
        metavar="FILE",
        help=f"draw {what} into FILE, a new .svg or .html that needs no other file",
    )


def _picture_name(text: str) -> str:
    import argparse

    if os.path.splitext(text)[1] not in _SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text}: a picture is .svg or .html")
    return text


def draw_image(path: str, image: Image) -> None:
    """Draws a disk: its guest's bytes, and its files."""
    from vmconv.cli.drawing import LINE
    from vmconv.inspect.strips import of_image

    strips = of_image(image, LINE * _DISK_LINES, LINE * _FILE_LINES)
    _write(path, f"{image.file.name}", _layers(image), strips)


def draw_plan(path: str, image: Image, plan: Plan) -> None:
    """Draws a plan: the source's disk, and what becomes of each part of the new files."""
    from vmconv.cli.drawing import LINE
    from vmconv.inspect.strips import of_image, of_plan

    strips = [*of_image(image, LINE * _DISK_LINES, LINE * _FILE_LINES), *of_plan(plan, LINE * _FILE_LINES)]
    notes = [*_layers(image), *(f"copied because {copy.reason}: {size_text(copy.bytes)}" for copy in plan.copies)]
    _write(path, f"{image.file.name} becomes {plan.files[-1].name}", notes, strips)


def _layers(image: Image) -> list[str]:
    names = [layer.file.name for layer in image.chain()]
    return [f"{len(names)} layers, the top first: {', '.join(names)}"] if len(names) > 1 else []


def _write(path: str, title: str, notes: Sequence[str], strips: Sequence[Strip]) -> None:
    """Makes the file of a picture. Raises `ExistsError` if its name is taken."""
    from vmconv.cli.drawing import html, svg

    left = len(strips) - _MAX_FILES
    more = [f"{left} more files are not drawn"] if left > 0 else []
    draw = html if path.endswith(".html") else svg
    text = draw(title, [*notes, *more], strips[:_MAX_FILES])
    try:
        with os_errors("cannot be made", PlanError, where=path), open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except PlanError as exc:
        if isinstance(exc.__cause__, FileExistsError):
            raise ExistsError(f"{path}: already exists", hint="choose another name for the picture") from exc
        raise


def print_bars(image: Image, width: int) -> None:
    """Prints a disk in lines of the terminal, and what the characters mean."""
    from vmconv.inspect.strips import of_image

    for one in of_image(image, width * 4, width)[: 1 + _MAX_FILES]:
        say(f"{one.title}: {size_text(one.size)}")
        for line in _bar(one, width):
            print(f"  {line}")
        for category, count in zip(one.categories, one.bytes, strict=True):
            if count:
                say(f"  {_mark(category.look)} {size_text(count):>9}  {category.words}")


def _bar(one: Strip, width: int) -> Iterator[str]:
    marks = [_mark(category.look) for category in one.categories]
    text = "".join(marks[category] for category in one.category.tolist())
    yield from (text[at : at + width] for at in range(0, len(text), width))


def _mark(look: str) -> str:
    """Returns the character of a look, of those that the terminal can show."""
    encoding = (sys.stdout.encoding or "").lower()
    marks = _BLOCKS if encoding.startswith("utf") else _ASCII
    if look == "hole":
        return marks[0]
    if look == "zero":
        return marks[1]
    if look == "metadata":
        return marks[2]
    return marks[3]
