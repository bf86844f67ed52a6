"""Arguments of the Python API: their types and their validation.

The command line builds the same named tuples from argparse's values, without pydantic, whose import takes longer than a
conversion.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar, get_type_hints

from vmconv.errors import UsageError

if TYPE_CHECKING:
    from uuid import UUID

    from pydantic import BaseModel, GetCoreSchemaHandler
    from pydantic_core import CoreSchema

    from vmconv.interface.backend import Created
    from vmconv.model.plan import Plan, Progress
    from vmconv.syncing.request import SyncPlan
else:
    # Importing the classes would import numpy, which commands that read only a header do not need.
    SyncPlan, Plan, Progress, Created = Any, Any, Callable[[int, int], None], Callable[[str, int], None]

StrPath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
"""A path as Python's own functions accept it."""
if TYPE_CHECKING:
    OptionValue: TypeAlias = str | bytes | int | bool | UUID | None
else:
    # UUIDs are converted to text before validation; the command line does not import the class.
    OptionValue = str | bytes | int | bool | None
"""The value of a writer's option: text as on the command line, or a value of the option's type."""
ZeroCopy = Literal["auto", "require"]
Cache = Literal["writeback", "unsafe"]
Verify = Literal["metadata", "sample", "bytes", "qemu"]
Preallocation = Literal["off", "falloc", "full"]
Existing = Literal["refuse", "skip", "compare"]
"""A target that exists: an error, left as it is, or left as it is if it is the source's disk."""
"""How a result is compared with its source before it appears under its name; see the guide."""

_Tuple = TypeVar("_Tuple", bound=tuple[Any, ...])
_SHOWN = 80


class _Parsed:
    """Makes pydantic call a function before its own validation. Only pydantic calls it, so it is imported already."""

    def __init__(self, parse: Callable[[object], object]) -> None:
        self._parse = parse

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(self._parse, handler(source))


def _path(value: object) -> str:
    try:
        text = os.fsdecode(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError("is not a path") from None
    if not text:
        raise ValueError("is empty")
    if "\0" in text:
        raise ValueError("has a NUL byte")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError("cannot be encoded as a file name") from None
    return text


def _each(value: object, what: str) -> list[object]:
    if isinstance(value, str | bytes | os.PathLike | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"is not a list of {what}")
    return list(value)


def _paths(value: object) -> list[str]:
    return [_path(each) for each in _each(value, "paths")]


def _names(value: object) -> list[object]:
    return _each(value, "names")


def _mapping(value: object) -> dict[object, object]:
    if not isinstance(value, Mapping):
        raise ValueError("is not a mapping")
    from uuid import UUID

    return {key: str(each) if isinstance(each, UUID) else each for key, each in value.items()}


def _mode(value: object) -> object:
    if isinstance(value, int) and not 0 <= value <= 0o777:
        raise ValueError("is not a file mode from 0 to 0o777")
    return value


Mode = Annotated[int, _Parsed(_mode)]
FilePath = Annotated[str, _Parsed(_path)]
"""A path; a string after validation."""
FilePaths = Annotated[Sequence[str], _Parsed(_paths)]
Names = Annotated[Sequence[str], _Parsed(_names)]
WriterOptions = Annotated[Mapping[str, OptionValue], _Parsed(_mapping)]
OptionsByFormat = Annotated[Mapping[str, WriterOptions], _Parsed(_mapping)]


class RunOptions(NamedTuple):
    """Arguments of a conversion besides those of the request: verification and callbacks."""

    verify: bool | Verify = True
    announce: Callable[[Plan], None] | None = None
    progress: Progress | None = None
    verifying: Progress | None = None
    created: Created | None = None


class SyncOptions(NamedTuple):
    """Arguments of a sync besides those of the request: verification and callbacks."""

    verify: bool | Verify = True
    announce: Callable[[SyncPlan], None] | None = None
    progress: Progress | None = None
    verifying: Progress | None = None
    comparing: Progress | None = None


class FanoutTargets(NamedTuple):
    """Arguments of fan-out besides those common to all its requests."""

    formats: Names
    directory: FilePath
    options: OptionsByFormat


class Reading(NamedTuple):
    """An image to read."""

    path: FilePath
    format_name: str | None = None
    backing_format: str | None = None
    allow_external: FilePaths = ()
    force_share: bool = False
    from_snapshot: str | None = None
    secrets: FilePaths = ()
    parents: FilePaths = ()


class CheckOptions(NamedTuple):
    """Arguments of a check besides the image."""

    payload: bool = False


class MapOptions(NamedTuple):
    """Arguments of a map besides the image: the part of the disk, in bytes."""

    start_offset: int = 0
    max_length: int | None = None


class ImagePair(NamedTuple):
    """Two images to compare."""

    left: FilePath
    right: FilePath
    left_format: str | None = None
    right_format: str | None = None
    backing_format: str | None = None
    allow_external: FilePaths = ()
    force_share: bool = False
    strict: bool = False
    secrets: FilePaths = ()
    parents: FilePaths = ()


class RestoreOptions(NamedTuple):
    """A file to restore from its journal or undo file; `trust` accepts one of any user."""

    path: FilePath
    trust: bool = False


class Resizing(NamedTuple):
    """A disk to resize to `size` bytes, or with `relative` by `size` bytes; `shrink` allows a smaller one.

    `preallocation` allocates the space that a raw disk grows by, and "full" writes zeros there, too.
    """

    path: FilePath
    size: int
    relative: bool = False
    source_format: str | None = None
    shrink: bool = False
    keep_undo: bool = False
    any_owner: bool = False
    allow_external: FilePaths = ()
    source_backing_format: str | None = None
    preallocation: Preallocation = "off"

    @property
    def editing(self) -> Editing:
        return Editing(self.path, self.source_format, self.keep_undo, self.allow_external)


class Measuring(NamedTuple):
    """The disk in `source`, or an empty one of `size` bytes, and the image of it to measure."""

    target_format: str
    source: FilePath | None = None
    size: int | None = None
    options: WriterOptions = MappingProxyType({})
    source_format: str | None = None
    snapshot: str | None = None
    force_share: bool = False
    allow_external: FilePaths = ()
    source_backing_format: str | None = None
    secrets: FilePaths = ()
    parents: FilePaths = ()


class Editing(NamedTuple):
    """An image whose metadata changes where it lies."""

    path: FilePath
    source_format: str | None = None
    keep_undo: bool = False
    allow_external: FilePaths = ()


class Bitmapping(NamedTuple):
    """Changes of the bitmap `name`, made in their order as one.

    Each is a verb: "add", "remove", "clear", "enable", "disable", or "merge:SOURCE" with the name of another bitmap,
    of the image `merge_from` if it is given.
    """

    path: FilePath
    name: str
    changes: Names
    granularity: int = 0
    source_format: str | None = None
    keep_undo: bool = False
    allow_external: FilePaths = ()
    merge_from: FilePath | None = None
    merge_format: str | None = None

    @property
    def editing(self) -> Editing:
        return Editing(self.path, self.source_format, self.keep_undo, self.allow_external)


class Repairing(NamedTuple):
    """An image to repair: only leaks, or all that can be."""

    path: FilePath
    what: Literal["leaks", "all"] = "all"
    source_format: str | None = None
    keep_undo: bool = False
    allow_external: FilePaths = ()

    @property
    def editing(self) -> Editing:
        return Editing(self.path, self.source_format, self.keep_undo, self.allow_external)


class Snapshotting(NamedTuple):
    """An internal snapshot to take, to delete, or to go back to."""

    path: FilePath
    verb: Literal["create", "delete", "apply"]
    name: str
    source_format: str | None = None
    keep_undo: bool = False
    allow_external: FilePaths = ()

    @property
    def editing(self) -> Editing:
        return Editing(self.path, self.source_format, self.keep_undo, self.allow_external)


class Rebasing(NamedTuple):
    """A layer that gets another parent, or none for an empty name; with `unsafe` only the stored name changes.

    `parents` are those of layers whose parent, up to now, is not where they say.
    """

    path: FilePath
    backing_file: str
    backing_format: str | None = None
    unsafe: bool = False
    source_format: str | None = None
    keep_undo: bool = False
    allow_external: FilePaths = ()
    parents: FilePaths = ()

    @property
    def editing(self) -> Editing:
        return Editing(self.path, self.source_format, self.keep_undo, self.allow_external)


class Committing(NamedTuple):
    """The top of layers whose content goes into `base`, by default its parent; `keep_top` does not empty it."""

    path: FilePath
    base: FilePath | None = None
    keep_top: bool = False
    source_format: str | None = None
    force: bool = False
    allow_external: FilePaths = ()
    source_backing_format: str | None = None


class Descriptor(NamedTuple):
    """An open descriptor to write to."""

    descriptor: int


def checked(kind: type[_Tuple], /, **given: object) -> _Tuple:
    """Returns `kind` of the given arguments; raises `UsageError` for the first invalid one.

    Types are strict: "no" is not a bool, and a string is not a list of strings.
    """
    from pydantic import ValidationError

    refuse_unknown(kind._fields, given)  # type: ignore[attr-defined]
    try:
        found = _model(kind).model_validate(given)
    except ValidationError as exc:
        raise _refused(exc) from exc
    # Defaults come from the tuple and need no validation.
    return kind(**{name: getattr(found, name) for name in found.model_fields_set})


def refuse_unknown(names: Sequence[str], given: Mapping[str, object]) -> None:
    """Raises `UsageError` for an argument with another name; the hint suggests the nearest."""
    for name in given:
        if name not in names:
            from difflib import get_close_matches

            close = get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}" if close else f"arguments are {', '.join(names)}"
            raise UsageError(f"there is no argument {name!r}", hint=hint)


# Building a model takes longer than using it.
_MODELS: dict[type, type[BaseModel]] = {}


def _model(kind: type[_Tuple]) -> type[BaseModel]:
    if kind not in _MODELS:
        from pydantic import ConfigDict, create_model

        optional: Mapping[str, object] = kind._field_defaults  # type: ignore[attr-defined]
        fields: dict[str, Any] = {
            name: (hint, None if name in optional else ...)
            for name, hint in get_type_hints(kind, include_extras=True).items()
        }
        _MODELS[kind] = create_model(
            kind.__name__, __config__=ConfigDict(strict=True, arbitrary_types_allowed=True), **fields
        )
    return _MODELS[kind]


_WORDS = {
    "bool_type": "is neither True nor False",
    "callable_type": "is not callable",
    "int_type": "is not an integer",
    "missing": "is missing",
    "string_type": "is not a string",
    "string_unicode": "is not valid text: it has a lone surrogate",
}

_ARGUMENTS = {"blank": "size"}
"""Fields with another name than the argument of the API that sets them."""


def _refused(exc: Any) -> UsageError:
    """Returns the error for pydantic's first finding."""
    found = exc.errors(include_url=False)
    first = found[0]
    # For a union, pydantic appends the name of the member to that of the field.
    place = ".".join(str(part) for part in first["loc"] if part not in ("str", "int", "bool"))
    place = _ARGUMENTS.get(place, place)
    said = _WORDS.get(first["type"], first["msg"].removeprefix("Value error, "))
    # Of a union, too: the members' findings follow each other.
    words = [one["ctx"]["expected"] for one in found if one["type"] == "literal_error" and one["loc"][0] == place]
    if words:
        said = f"is not {'True, False, ' if first['type'] == 'bool_type' else ''}{words[0]}"
    return UsageError(f"argument {place}: {_shown(first['input'])} {said[:1].lower()}{said[1:]}")


def _shown(value: object) -> str:
    try:
        text = repr(value)
    # The repr of a caller's object may raise anything.
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
