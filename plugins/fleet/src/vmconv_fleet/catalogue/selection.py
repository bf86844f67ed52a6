"""Selections of disks and machines: `format=vmdk and node=n0*`, `size>=10G and not in-use`, `name='web *' or depth>0`.

    selection   = conjunction *( "or" conjunction )
    conjunction = term *( "and" term )
    term        = "not" term / "(" selection ")" / field [ operator value ]
    operator    = "=" / "!=" / "<" / "<=" / ">" / ">="

A value is a word, or anything in quotes. `=` and `!=` take `*`, `?` and `[...]` in it, as in file names of a shell, and
ignore case. A field alone is true if its value is yes. Sizes take qemu-img's suffixes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from vmconv.plugin import UsageError, parse_size
from vmconv_fleet.replication.indexing import MAX_INTEGER, Where


class Fields(NamedTuple):
    """The fields that a kind of record is selected by, with their meanings; others than these two sets are texts."""

    meanings: Mapping[str, str]
    numbers: frozenset[str]
    flags: frozenset[str]


DISKS = Fields(
    {
        "actual-size": "bytes on storage",
        "datastore": "its datastore",
        "depth": "images below it",
        "format": "its format",
        "id": "its id in the catalogue",
        "identity": "the UUID in the image",
        "in-use": "whether it is open for writing",
        "name": "its path below the datastore",
        "node": "its owner's name or id",
        "problem": "whether it cannot be read",
        "size": "bytes of the guest's disk",
    },
    frozenset({"actual-size", "depth", "size"}),
    frozenset({"in-use", "problem"}),
)

VMS = Fields(
    {
        "datastore": "its datastore",
        "disks": "the number of its disks",
        "file": "the path of its configuration below the datastore",
        "firmware": "bios or uefi",
        "format": "the format of its configuration",
        "id": "its id in the catalogue",
        "memory": "bytes of its memory",
        "name": "its name",
        "node": "its owner's name or id",
        "os": "its operating system, a short id of libosinfo",
        "problem": "whether its configuration cannot be read",
        "processors": "the number of its processors",
        "system": "its operating system as the configuration says it",
    },
    frozenset({"disks", "memory", "processors"}),
    frozenset({"problem"}),
)

MAX_LENGTH = 4000
MAX_DEPTH = 50

_TOKEN = re.compile(
    r"\s*(?:(?P<quoted>'[^']*'|\"[^\"]*\")|(?P<mark>!=|<=|>=|[=<>()])|(?P<word>[^\s()=<>!'\"]+)|(?P<bad>\S))"
)

_SIGNS = frozenset({"=", "!=", "<", "<=", ">", ">="})
_WILD = re.compile(r"[*?\[]")
_MAX_STARS = 2
"""GLOB of SQLite takes time that grows with the power of the number of stars."""


class Owner(NamedTuple):
    """A node as selections know it; `number` is that in the database's indexes."""

    number: int
    name: str
    node: str


class Match(NamedTuple):
    """A text of the record that fits a pattern, or does not if `sign` is `!=`."""

    field: str
    sign: str
    pattern: str


class Number(NamedTuple):
    """A comparison of a number."""

    field: str
    sign: str
    value: int


class Flag(NamedTuple):
    field: str
    wanted: bool


class Not(NamedTuple):
    inner: Selection


class Some(NamedTuple):
    """Any of several selections."""

    parts: tuple[Selection, ...]


class Every(NamedTuple):
    """All of several selections."""

    parts: tuple[Selection, ...]


Selection = Match | Number | Flag | Not | Some | Every


def condition(selection: Selection, owners: Sequence[Owner]) -> Where:
    """Returns the condition on the columns of the kind's index."""
    match selection:
        case Match("node", sign, pattern):
            fitting = [one.number for one in owners if any(fnmatchcase(name.casefold(), pattern) for name in one[1:])]
            return Where(f"owner {_IN[sign]} (SELECT value FROM json_each(?))", (json.dumps(fitting),))
        case Match(field, sign, pattern):
            return _match("lower(id)" if field == "id" else field, sign, pattern)
        case Number(field, sign, value):
            # SQLite has no larger integers, and no column does.
            return _number_condition(field.replace("-", "_"), sign, value)
        case Flag(field, wanted):
            return Where(f"{field.replace('-', '_')} = {int(wanted)}")
        case Not(inner):
            found = condition(inner, owners)
            return Where(f"NOT ({found.sql})", found.arguments)
        case Some(parts) | Every(parts):
            found_all = [condition(part, owners) for part in parts]
            word = " OR " if isinstance(selection, Some) else " AND "
            arguments = tuple(argument for one in found_all for argument in one.arguments)
            return Where(word.join(f"({one.sql})" for one in found_all), arguments)


_IN = {"=": "IN", "!=": "NOT IN"}


def _match(column: str, sign: str, pattern: str) -> Where:
    if not _WILD.search(pattern):
        return Where(f"{column} {sign} ?", (pattern,))
    negated = "" if sign == "=" else "NOT "
    # The sets of GLOB are not those of a shell.
    if "[" in pattern or pattern.count("*") > _MAX_STARS:
        return Where(f"{negated}fits({column}, ?)", (pattern,))
    return Where(f"{negated}({column} GLOB ?)", (pattern,))


def _number_condition(column: str, sign: str, value: int) -> Where:
    if value > MAX_INTEGER:
        return Where("1" if sign in ("<", "<=", "!=") else "0")
    return Where(f"{column} {sign} ?", (value,))


class _Token(NamedTuple):
    """A token of the text; `mark` is its meaning to the grammar, empty for a quoted value."""

    mark: str
    text: str
    at: int


def parse(text: str, fields: Fields = DISKS) -> Selection:
    """Returns the predicate of a selection by these fields. Raises UsageError with the position of a syntax error."""
    if len(text) > MAX_LENGTH:
        raise UsageError(f"selection of {len(text)} characters, {MAX_LENGTH} at most")
    parser = _Parser(text, fields)
    selection = parser.selection(0)
    parser.end()
    return selection


class _Parser:
    def __init__(self, text: str, fields: Fields) -> None:
        self._text = text
        self._fields = fields
        self._tokens = list(_tokens(text))
        self._next = 0

    def selection(self, depth: int) -> Selection:
        if depth > MAX_DEPTH:
            raise UsageError(f"selection nested deeper than {MAX_DEPTH}")
        parts = [self._conjunction(depth)]
        while self._takes("or"):
            parts.append(self._conjunction(depth))
        return parts[0] if len(parts) == 1 else Some(tuple(parts))

    def end(self) -> None:
        if self._next < len(self._tokens):
            raise self._wrong("'and', 'or' or the end")

    def _conjunction(self, depth: int) -> Selection:
        parts = [self._term(depth)]
        while self._takes("and"):
            parts.append(self._term(depth))
        return parts[0] if len(parts) == 1 else Every(tuple(parts))

    def _term(self, depth: int) -> Selection:
        if depth > MAX_DEPTH:
            raise UsageError(f"selection nested deeper than {MAX_DEPTH}")
        if self._takes("not"):
            return Not(self._term(depth + 1))
        if self._takes("("):
            inner = self.selection(depth + 1)
            if not self._takes(")"):
                raise self._wrong("')'")
            return inner
        return self._comparison()

    def _comparison(self) -> Selection:
        token = self._peek()
        if token is None or token.mark not in self._fields.meanings:
            raise self._wrong("a field", hint=f"fields: {', '.join(self._fields.meanings)}")
        self._next += 1
        sign = self._peek()
        if sign is None or sign.mark not in _SIGNS:
            return _flag(self._fields, token.mark, wanted=True)
        self._next += 1
        value = self._peek()
        if value is None or value.mark in _SIGNS or value.mark in ("(", ")"):
            raise self._wrong(f"a value after {token.mark}{sign.mark}")
        self._next += 1
        return _compare(self._fields, token.mark, sign.mark, value.text)

    def _peek(self) -> _Token | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def _takes(self, mark: str) -> bool:
        token = self._peek()
        if token is None or token.mark != mark:
            return False
        self._next += 1
        return True

    def _wrong(self, wanted: str, hint: str | None = None) -> UsageError:
        token = self._peek()
        found = f"{token.text!r} at character {token.at + 1}" if token else "the end"
        return UsageError(f"selection {self._text!r}: {found} where {wanted} was expected", hint=hint)


def _tokens(text: str) -> list[_Token]:
    tokens = []
    end = len(text.rstrip())
    at = 0
    while at < end:
        match = _TOKEN.match(text, at)
        assert match, "anything but spaces matches `bad`"
        kind = str(match.lastgroup)
        found, start = match[kind], match.start(kind)
        if kind == "bad":
            raise UsageError(f"selection {text!r}: {found!r} at character {start + 1} is not valid here")
        quoted = kind == "quoted"
        tokens.append(_Token("" if quoted else found, found[1:-1] if quoted else found, start))
        at = match.end()
    return tokens


def _compare(fields: Fields, field: str, sign: str, value: str) -> Selection:
    if field in fields.numbers:
        return _number(field, sign, value)
    if sign not in ("=", "!="):
        raise UsageError(f"selection: {field} has no order, so not {sign!r}", hint="= or !=")
    if field in fields.flags:
        if value not in ("yes", "no"):
            raise UsageError(f"selection: {field}{sign}{value}: it is yes or no")
        return _flag(fields, field, wanted=(value == "yes") is (sign == "="))
    if "\0" in value or not _is_unicode(value):
        raise UsageError(f"selection: {field}{sign}{value!r}: nothing can have this value")
    return Match(field, sign, value.casefold())


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _number(field: str, sign: str, value: str) -> Selection:
    try:
        return Number(field, sign, parse_size(value))
    except ValueError as exc:
        raise UsageError(f"selection: {field}{sign}{value}: {exc}") from exc


def _flag(fields: Fields, field: str, *, wanted: bool) -> Selection:
    if field not in fields.flags:
        raise UsageError(f"selection: {field} needs a value", hint=f"such as {field}=...")
    return Flag(field, wanted)
