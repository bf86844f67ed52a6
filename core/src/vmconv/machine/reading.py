"""Bounded reading of configurations: text, XML, and values of the model, with errors that name file and element."""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING, Any, TypeVar
from xml.etree.ElementTree import Element, TreeBuilder, tostring

from pydantic import BaseModel, ValidationError

from vmconv.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vmconv.model.sources import File

MAX_CONFIG = 8 << 20
"""Bytes of a configuration. The largest that we have seen has 400 KB."""

MAX_ELEMENTS = 100_000
MAX_DEPTH = 100

_SHOWN = 60
"""Characters of a value in an error."""

_KEPT = 1 << 14
"""Characters of an unknown element that are kept."""

Part = TypeVar("Part", bound=BaseModel)


def refused(file: File, element: str, problem: str, *, hint: str | None = None) -> ImageError:
    """Returns the error for an element of a configuration, such as `scsi0:1.fileName` or `Item (line 12)`."""
    return ImageError(f"{file.name}: {element}: {problem}", hint=hint)


def quoted(value: object) -> str:
    """Returns a value of a configuration for an error, cut to a line."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def config_bytes(file: File) -> bytes:
    """Returns a whole configuration; raises `ImageError` if it has more than `MAX_CONFIG` bytes."""
    if file.size > MAX_CONFIG:
        raise ImageError(f"{file.name}: has {file.size} bytes, a configuration has at most {MAX_CONFIG}")
    return file.read(0, file.size)


def config_text(file: File, data: bytes | None = None, *, encoding: str = "utf-8") -> str:
    """Returns the text of a configuration: UTF-8, UTF-16 with a byte order mark, or else `encoding`.

    `data` are its bytes, by default the whole file. Raises `ImageError` with the offset of undecodable bytes.
    """
    data = config_bytes(file) if data is None else data
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(mark):
            encoding = name
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as exc:
        raise ImageError(f"{file.name}: text at {exc.start:#x}: is not {encoding}") from exc
    except LookupError as exc:
        raise ImageError(f"{file.name}: encoding {quoted(encoding)} is not known") from exc


class _Bounded(TreeBuilder):
    """Counts elements and depth while a tree is built, and stores the line of each element."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.depth = 0

    def start(self, tag: Any, attrs: Any) -> Element:
        self.count += 1
        self.depth += 1
        if self.count > MAX_ELEMENTS:
            raise _TooMuchError(f"more than {MAX_ELEMENTS} elements")
        if self.depth > MAX_DEPTH:
            raise _TooMuchError(f"elements nested deeper than {MAX_DEPTH}")
        return super().start(tag, attrs)

    def end(self, tag: str) -> Element:
        self.depth -= 1
        return super().end(tag)


class _TooMuchError(Exception):
    pass


def parse_xml(file: File, data: bytes | None = None) -> Element:
    """Returns the root of an XML document, by default the whole file.

    Raises `ImageError` for a DOCTYPE, and so for entities, for more than `MAX_ELEMENTS` elements, a depth of more than
    `MAX_DEPTH`, and malformed XML, with its line.
    """
    from xml.parsers import expat

    content = config_bytes(file) if data is None else data
    tree = _Bounded()
    parser = expat.ParserCreate(namespace_separator="}")
    parser.buffer_text = True
    # As ElementTree does: {namespace}name.
    parser.StartElementHandler = lambda tag, attrs: tree.start(_name(tag), {_name(k): v for k, v in attrs.items()})
    parser.EndElementHandler = lambda tag: tree.end(_name(tag))
    parser.CharacterDataHandler = tree.data
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(content, True)
        return tree.close()
    except expat.ExpatError as exc:
        what = expat.ErrorString(exc.code)
        raise ImageError(f"{file.name}: line {exc.lineno}: is not well-formed XML: {what}") from exc
    except (LookupError, ValueError) as exc:
        # The declaration names an encoding that Python does not have, or expat cannot use.
        raise ImageError(f"{file.name}: line 1: its encoding cannot be read: {exc}") from exc
    except _TooMuchError as exc:
        raise ImageError(f"{file.name}: line {parser.CurrentLineNumber}: {exc}") from exc


def _name(tag: str) -> str:
    return "{" + tag if "}" in tag else tag


def _refuse_doctype(*_: object) -> None:
    raise _TooMuchError("has a DOCTYPE, which no configuration needs")


def unknown(element: Element, path: str, known: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yields the path and the value of each attribute and element that `known` does not have.

    `known` maps the path of an element to its attributes: `name`, or `name=value` for one value only. `*` stands for
    all attributes and elements below. Paths have no namespaces, and in the result the number of a repeated element.
    """
    yield from _unknown(element, path, path, {name: attributes.split() for name, attributes in known.items()})


def _unknown(element: Element, path: str, shown: str, known: Mapping[str, list[str]]) -> Iterator[tuple[str, str]]:
    attributes = known[path]
    if attributes == ["*"]:
        return
    for name, value in element.attrib.items():
        plain = _local(name)
        if not {plain, f"{plain}={value}"}.intersection(attributes):
            yield f"{shown}@{plain}", value[:_KEPT]
    count: dict[str, int] = {}
    for child in element:
        name = _local(child.tag)
        count[name] = count.get(name, 0) + 1
        place = f"{shown}/{name}" + (f"[{count[name]}]" if count[name] > 1 else "")
        if f"{path}/{name}" in known:
            yield from _unknown(child, f"{path}/{name}", place, known)
        else:
            yield place, tostring(child, encoding="unicode").strip()[:_KEPT]


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def number(file: File, element: str, text: str, low: int, high: int) -> int:
    """Returns a decimal number from `low` to `high`; raises `ImageError` for anything else."""
    if not re.fullmatch(r"[+-]?\d{1,30}", text.strip()) or not low <= int(text) <= high:
        raise refused(file, element, f"{quoted(text)} is not a number from {low} to {high}")
    return int(text)


def mac_address(file: File, element: str, text: str) -> str:
    """Returns a MAC address in the model's form; raises `ImageError` for other text."""
    digits = re.sub(r"[:.\-]", "", text.strip()).lower()
    if not re.fullmatch(r"[0-9a-f]{12}", digits):
        raise refused(file, element, f"{quoted(text)} is not a MAC address")
    return ":".join(digits[at : at + 2] for at in range(0, 12, 2))


def part(file: File, element: str, kind: type[Part], /, **values: Any) -> Part:
    """Returns a part of the model; raises `ImageError` with the field and the value that the model refuses."""
    try:
        return kind(**values)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        where = ".".join(str(each) for each in first["loc"])
        raise refused(file, f"{element} {where}".rstrip(), f"{quoted(first['input'])}: {first['msg']}") from exc
