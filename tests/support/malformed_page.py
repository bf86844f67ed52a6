"""Writes docs/malformed.md from the tests: `python tests/support/malformed_page.py > docs/malformed.md`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.kits import kit
from support.malformed import names, names_with_parents
from vmconv.testing.malformed import KINDS, LARGE, MUCH_MEMORY, SOON

PAGE = """# Malformed images

The malformed images that the tests try, and the required result. `tests/support/malformed_page.py` writes this page
from the tests, and a test compares the two.

A malformed image is read if it can be read correctly. Otherwise it is refused in one line with the file, the field,
its offset and its value. Nothing else may happen: no traceback, no hang, no large allocation caused by a number in
the image, and no access to files that the image may not name.

## Tried for each format

The conformance kit makes malformed images from sound ones, without knowing the format: some hundred of each kind for
each way to write the format. Checksums are corrected, so that more than the checksum is tested. Each image must be
read within {soon} seconds and {memory} MiB of memory. `tests/formats/shared/test_malformed.py` passes some of them, as
files, to `info`, `map`, `check` and `convert` in a separate process, which may use 500 MiB including Python.

| kind | what is made |
| --- | --- |
{kinds}

The ways to write a format are those of its conformance test:

| format | options |
| --- | --- |
{variants}

A raw disk cannot be malformed. Images that are their own parent, and pairs that are each other's parent, are tried
for each format that names its parent's file: {chains}.

## Tried by hand

Cases that the kit cannot generate: single fields and entries, with the words of the message. A test without a list of
inputs has one input, described by its name.
{formats}"""

MODULES = {"qcow2": "formats.qcow2.test_hostile", "check": "formats.shared.test_check"}
"""Where the tests of a format are, when not in the module of its name."""

FEW = 10
"""Inputs of another test that are listed again; of more, only the number is given."""

_NOT_INPUTS = {"operation", "output", "locale"}


def render() -> str:
    """Returns the page."""
    kinds = "\n".join(f"| {name} | {_first_line(maker)} |" for name, maker in KINDS.items())
    variants = "\n".join(f"| {name} | {'; '.join(_variants(name))} |" for name in names())
    formats = "".join(f"\n### {name}\n\n| test | inputs |\n| --- | --- |\n{_rows(name)}\n" for name in names())
    formats += f"\n### every format\n\n| test | inputs |\n| --- | --- |\n{_rows('check')}\n"
    chains = ", ".join(names_with_parents())
    memory = MUCH_MEMORY >> 20
    assert LARGE == 16 << 40, "the docstring of `absurd` says 16 TiB"
    return PAGE.format(soon=SOON, memory=memory, chains=chains, kinds=kinds, variants=variants, formats=formats)


def _first_line(function: Any) -> str:
    return str(function.__doc__).splitlines()[0]


def _variants(name: str) -> Iterator[str]:
    for variant in kit(name).variants:
        yield f"`{','.join(f'{key}={value}' for key, value in variant.items())}`" if variant else "none"


def _rows(name: str) -> str:
    module = import_module(MODULES.get(name, f"formats.{name}.test_{name}"))
    rows, listed = [], set[str]()
    for test, function in vars(module).items():
        if isinstance(function, FunctionType) and any(mark.name == "malformed" for mark in _marks(function)):
            words = test.removeprefix("test_").replace("_", " ")
            inputs = list(dict.fromkeys(_inputs(function)))
            again = len(listed & set(inputs))
            if again > FEW:
                inputs = [f"{again} inputs from above", *(text for text in inputs if text not in listed)]
            listed |= set(inputs)
            rows.append(f"| {words} | {'; '.join(_grouped(inputs))} |")
    assert rows, f"no test of {name} is marked malformed"
    return "\n".join(rows)


def _grouped(inputs: list[str]) -> list[str]:
    """Returns the inputs with those together that differ in their number only: `size=0, 1`."""
    found: list[str] = []
    for text in inputs:
        head = re.match(r".*(=| cut off at )(?=\w+$)", text)
        if head and found and re.match(rf"{re.escape(head[0])}\w+(, \w+)*$", found[-1]):
            found[-1] += f", {text[head.end() :]}"
        else:
            found.append(text)
    return found


def _marks(function: Any) -> list[Any]:
    return list(getattr(function, "pytestmark", []))


def _inputs(function: Any) -> Iterator[str]:
    for mark in _marks(function):
        if mark.name != "parametrize":
            continue
        names, values = mark.args[0], list(mark.args[1])
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        if not _NOT_INPUTS & set(names):
            ids = mark.kwargs.get("ids")
            if callable(ids):
                # It is called with each argument, not with all of a case.
                ids = [ids(value) for value in values] if len(names) == 1 else None
            ids = ids or [None] * len(values)
            yield from (_title(names, value, known) for value, known in zip(values, ids, strict=True))


def _title(names: list[str], value: Any, known: str | None) -> str:
    """Returns one input in words: its id, else the words of its message, else its value."""
    parts = dict(zip(names, value if len(names) > 1 else [value], strict=True))
    text = known or next((parts[key] for key in ("message", "problem") if key in parts), parts[names[0]])
    if isinstance(text, Mapping):
        text = ", ".join(f"{key} {number:#x}" for key, number in text.items())
    if isinstance(text, bytes):
        text = repr(text)[2:-1]
    return _plain(str(text))


def _plain(pattern: str) -> str:
    """Returns a regular expression as words, fit for a cell of a table."""
    text = re.sub(r"\[0-9\]\*|\\d\+", "...", pattern)
    text = re.sub(r"\\x1b", "ESC", text)
    text = re.sub(r"\{\d+\}|\\(?=\W)|(?<=\w)\$$", "", text.replace("\\n", " newline "))
    text = re.sub(r"\s*\.\*\s*", " ... ", text).rstrip(" .:").lstrip()
    return text.replace("|", "&#124;").replace("<", "&lt;").replace("*", "&ast;")


if __name__ == "__main__":
    print(render(), end="")
