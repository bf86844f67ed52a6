"""What callers of the Python API give: its types, and how it is checked before anything is done with it.

The command line makes the same named tuples of what argparse has checked, without pydantic, whose import would take
longer than a conversion.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar, get_type_hints

from vmconv.errors import UsageError

if TYPE_CHECKING:
    from uuid import UUID

    from pydantic import BaseModel, GetCoreSchemaHandler
    from pydantic_core import CoreSchema

    from vmconv.interface.backend import Created
    from vmconv.model.plan import Plan, Progress
else:
    # Importing the classes would import numpy, which a command that reads one header does not need.
    Plan, Progress, Created = Any, Callable[[int, int], None], Callable[[str, int], None]

StrPath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
"""A path as Python's own functions accept it."""
if TYPE_CHECKING:
    OptionValue: TypeAlias = str | bytes | int | bool | UUID | None
else:
    # UUIDs become text before this is checked; the command line does not import the class.
    OptionValue = str | bytes | int | bool | None
"""The value of a writer's option: as on the command line, or of the option's own type."""
ZeroCopy = Literal["auto", "require"]
Cache = Literal["writeback", "unsafe"]
Verify = Literal["metadata", "sample", "bytes", "qemu"]
"""What of a result is compared with its source before it gets its name; see the guide."""

_Tuple = TypeVar("_Tuple", bound=tuple[Any, ...])
_SHOWN = 80


class _Parsed:
    """Tells pydantic, which is imported by then, to look at a value with a function first."""

    def __init__(self, parse: Callable[[object], object]) -> None:
        self._parse = parse

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(self._parse, handler(source))


def _path(value: object) -> str:
    try:
        text = os.fsdecode(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError("is no path") from None
    if not text:
        raise ValueError("is empty")
    if "\0" in text:
        raise ValueError("has a NUL byte")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError("cannot be the name of a file here") from None
    return text


def _each(value: object, what: str) -> list[object]:
    if isinstance(value, str | bytes | os.PathLike | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"is no list of {what}")
    return list(value)


def _paths(value: object) -> list[str]:
    return [_path(each) for each in _each(value, "paths")]


def _names(value: object) -> list[object]:
    return _each(value, "names")


def _mapping(value: object) -> dict[object, object]:
    if not isinstance(value, Mapping):
        raise ValueError("is no mapping")
    from uuid import UUID

    return {key: str(each) if isinstance(each, UUID) else each for key, each in value.items()}


def _mode(value: object) -> object:
    if isinstance(value, int) and not 0 <= value <= 0o777:
        raise ValueError("is no set of permission bits, 0 to 0o777")
    return value


Mode = Annotated[int, _Parsed(_mode)]
FilePath = Annotated[str, _Parsed(_path)]
"""A path: always a string where it has been checked."""
FilePaths = Annotated[Sequence[str], _Parsed(_paths)]
Names = Annotated[Sequence[str], _Parsed(_names)]
WriterOptions = Annotated[Mapping[str, OptionValue], _Parsed(_mapping)]
OptionsByFormat = Annotated[Mapping[str, WriterOptions], _Parsed(_mapping)]


class Making(NamedTuple):
    """How something is made, besides what the request says."""

    verify: bool | Verify = True
    announce: Callable[[Plan], None] | None = None
    progress: Progress | None = None
    verifying: Progress | None = None
    created: Created | None = None


class Fan(NamedTuple):
    """What fan-out is given besides what all its requests have in common."""

    formats: Names
    directory: FilePath
    options: OptionsByFormat


class Reading(NamedTuple):
    """An image to look at."""

    path: FilePath
    format_name: str | None = None
    backing_format: str | None = None
    allow_external: FilePaths = ()
    force_share: bool = False


class Pair(NamedTuple):
    """Two images of one disk."""

    left: FilePath
    right: FilePath
    left_format: str | None = None
    right_format: str | None = None
    backing_format: str | None = None
    allow_external: FilePaths = ()
    force_share: bool = False
    strict: bool = False


class Believed(NamedTuple):
    """A file that is brought back by what lies beside it, and whether that may be anybody's."""

    path: FilePath
    trust: bool = False


class Descriptor(NamedTuple):
    """An open file to write to."""

    descriptor: int


def checked(kind: type[_Tuple], /, **given: object) -> _Tuple:
    """Returns `kind` made of what was given; raises `UsageError` naming the first argument that cannot be.

    Types are strict: "no" is no bool, and a string is no list of strings.
    """
    from pydantic import ValidationError

    refuse_unknown(kind._fields, given)  # type: ignore[attr-defined]
    try:
        found = _model(kind).model_validate(given)
    except ValidationError as exc:
        raise _refused(exc) from exc
    # What was not given keeps the default of the tuple, which needs no check.
    return kind(**{name: getattr(found, name) for name in found.model_fields_set})


def refuse_unknown(names: Sequence[str], given: Mapping[str, object]) -> None:
    """Raises UsageError for an argument that has none of the names, saying which one was meant."""
    for name in given:
        if name not in names:
            from difflib import get_close_matches

            close = get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}" if close else f"arguments are {', '.join(names)}"
            raise UsageError(f"there is no argument {name!r}", hint=hint)


_MODELS: dict[type, type[BaseModel]] = {}


def _model(kind: type[_Tuple]) -> type[BaseModel]:
    if kind not in _MODELS:
        from pydantic import ConfigDict, create_model

        optional: Mapping[str, object] = kind._field_defaults  # type: ignore[attr-defined]
        fields: dict[str, Any] = {
            name: (hint, None if name in optional else ...)
            for name, hint in get_type_hints(kind, include_extras=True).items()
        }
        _MODELS[kind] = create_model(kind.__name__, __config__=ConfigDict(strict=True), **fields)
    return _MODELS[kind]


_WORDS = {
    "bool_type": "is neither True nor False",
    "callable_type": "cannot be called",
    "int_type": "is no integer",
    "missing": "is missing",
    "string_type": "is no string",
    "string_unicode": "is no text: it has half a character",
}


def _refused(exc: Any) -> UsageError:
    """Returns the error for what pydantic found first."""
    first = exc.errors(include_url=False)[0]
    # Of the members of a union pydantic gives the name too, behind that of the field.
    place = ".".join(str(part) for part in first["loc"] if part not in ("str", "int", "bool"))
    said = _WORDS.get(first["type"], first["msg"].removeprefix("Value error, "))
    if first["type"] == "literal_error":
        said = f"is not {first['ctx']['expected']}"
    return UsageError(f"argument {place}: {_shown(first['input'])} {said[:1].lower()}{said[1:]}")


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
