"""Options of writers: frozen dataclasses with help texts, validated by pydantic.

A plugin writes::

    @dataclass(frozen=True)
    class Options:
        cluster_size: Size = option(65536, "bytes of a cluster, a power of two from 512 to 2M")

and checks fields against each other in `__post_init__`, raising `ValueError`. Defaults and simple values do not need
pydantic, whose import takes longer than a conversion.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from vmconv.errors import PluginError, UsageError, did_you_mean

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

_UNITS = {"": 1, "b": 1, **{letter: 1 << (10 * power) for power, letter in enumerate("kmgtpe", start=1)}}


def parse_size(text: str) -> int:
    """Returns a number of bytes: digits and an optional suffix K M G T P E (powers of 1024), as in qemu-img.

    Raises `ValueError`.
    """
    match = re.fullmatch(r"(\d{1,19})\s*([bkmgtpe]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise ValueError(f"{text!r} is not a size such as 512, 64K or 2M")
    return int(match[1]) * _UNITS[match[2]]


class _SizeSchema:
    """Makes pydantic accept sizes with a suffix. Only pydantic calls it, so it is imported already."""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema

        def parse(value: object) -> object:
            return parse_size(value) if isinstance(value, str) else value

        return core_schema.no_info_before_validator_function(parse, handler(int))


Size = Annotated[int, _SizeSchema()]
"""A number of bytes; strings such as "64K" are accepted."""


def parse_identity(text: str) -> bytes:
    """Returns the 16 bytes of a UUID in big-endian order; braces are allowed. Raises `ValueError`."""
    plain = text.strip().lower().removeprefix("{").removesuffix("}")
    if not re.fullmatch(r"[0-9a-f]{8}(-?[0-9a-f]{4}){3}-?[0-9a-f]{12}", plain):
        raise ValueError(f"{text!r} is not a UUID such as 01234567-89ab-4cde-8f01-23456789abcd")
    found = bytes.fromhex(plain.replace("-", ""))
    if not any(found):
        raise ValueError("the UUID of zeros stands for no image")
    return found


class _IdentitySchema:
    """Makes pydantic accept UUIDs as text and as `uuid.UUID`."""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema

        def parse(value: object) -> object:
            return value if isinstance(value, bytes) else parse_identity(str(value))

        return core_schema.no_info_before_validator_function(
            parse, core_schema.bytes_schema(min_length=16, max_length=16)
        )


Identity = Annotated[bytes, _IdentitySchema()]
"""The 16 bytes of a UUID; its text is accepted."""


def option(default: Any, text: str) -> Any:
    """Returns a dataclass field with its help text."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Identified:
    """Base class for the options of formats whose images have ids (UUID, GUID, CID).

    Writers take the identity from `Placement.identity`: the user's, or a random one.
    """

    identity: Identity | None = option(None, "UUID of the image; random by default. The same UUID gives the same ids")


class Described(NamedTuple):
    """One option as `vmconv formats` lists it."""

    name: str
    default: Any
    help: str


def describe(model: type[Any]) -> Iterator[Described]:
    """Yields the options of a dataclass in the order of its fields."""
    for field in dataclasses.fields(model):
        yield Described(field.name, field.default, field.metadata.get("help", ""))


def choices(model: type[Any]) -> dict[str, list[str]]:
    """Returns the values of each option as text, for those with few; else none."""
    hints = get_type_hints(model, include_extras=True)
    return {field.name: list(_few(hints[field.name])) for field in dataclasses.fields(model)}


def _few(hint: Any) -> Iterator[str]:
    """Yields the values of a type that has few."""
    if get_origin(hint) in (Union, UnionType):
        for member in get_args(hint):
            yield from _few(member)
    elif get_origin(hint) is Literal:
        yield from map(str, get_args(hint))
    elif hint is bool:
        yield from ("on", "off")


def parse_options(model: type[Any], given: Mapping[str, Any], format_name: str) -> Any:
    """Returns the options of a writer from strings or values; raises `UsageError` with the option and its value."""
    if not dataclasses.is_dataclass(model):
        raise PluginError(f"its options are {model!r}, which is not a dataclass", format_name=format_name)
    if not given:
        return model()
    known = [field.name for field in dataclasses.fields(model)]
    for name in given:
        if name not in known:
            have = f"its options are {', '.join(known)}" if known else "it has no options"
            hint = did_you_mean(name, known) + have
            raise UsageError(f"{format_name} has no option {name!r}", hint=hint)
    hints = get_type_hints(model, include_extras=True)
    for name, value in given.items():
        if not (isinstance(value, str) or _fits(hints[name], value)):
            raise UsageError(f"{format_name} option {name}: {value!r} has the wrong type")
    # pydantic finds the same errors below, with better messages.
    with suppress(ValueError):
        return model(**{name: _at_a_glance(hints[name], value) for name, value in given.items()})
    # pydantic handles the other types and words the errors.
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(model).validate_python(dict(given))
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        # Errors of __post_init__ name no field.
        chosen = [field] if field in given else list(given)
        value = f" {', '.join(f'{name}={given[name]}' for name in chosen)}"
        message = first["msg"].removeprefix("Value error, ").rstrip(".")
        if first["type"].startswith("bool"):
            message = "is neither on nor off"
        raise UsageError(f"{format_name} option{value}: {message[:1].lower()}{message[1:]}") from exc


def _fits(hint: Any, value: Any) -> bool:
    """True if a value other than a string has the option's type; strictly, so 1 is not a bool and True not an int."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(member, value) for member in get_args(hint))
    if get_origin(hint) is Literal:
        return any(value == each and type(value) is type(each) for each in get_args(hint))
    if hint == Size:
        return type(value) is int
    return not isinstance(hint, type) or type(value) is hint


def _at_a_glance(hint: Any, value: Any) -> Any:
    """Returns a value from its usual text on the command line; raises `ValueError` if it takes pydantic."""
    if not isinstance(value, str):
        raise ValueError
    if get_origin(hint) in (Union, UnionType):
        for member in get_args(hint):
            with suppress(ValueError):
                return _at_a_glance(member, value)
    elif hint is str or (get_origin(hint) is Literal and value in get_args(hint)):
        return value
    elif hint == Size:
        return parse_size(value)
    elif hint == Identity:
        return parse_identity(value)
    elif hint is bool and value in ("on", "off"):
        return value == "on"
    elif hint is int and value.isascii() and value.isdecimal():
        return int(value)
    raise ValueError
