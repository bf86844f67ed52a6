"""Errors of validation for people: the field, its value and what is allowed, in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vmconv_fleet.catalogue.fields import ALLOWED

_MAX_VALUE = 80

_WORDS: Mapping[str, str] = {
    "string_too_short": "{min_length} characters at least",
    "string_too_long": "{max_length} characters at most",
    "too_short": "{min_length} items at least",
    "too_long": "{max_length} items at most",
    "greater_than_equal": "{ge} or more",
    "greater_than": "more than {gt}",
    "less_than_equal": "{le} or less",
    "less_than": "less than {lt}",
    "literal_error": "{expected}",
    "string_type": "a text",
    "list_type": "a list",
    "dict_type": "an object",
    "model_attributes_type": "an object",
    "finite_number": "a finite number",
}
_KINDS: Mapping[str, str] = {"int": "a whole number", "float": "a number", "bool": "yes or no (true or false)"}


def complaint(errors: Sequence[Mapping[str, Any]]) -> str:
    """Returns the first error of pydantic's list in one line."""
    first = errors[0]
    field = ".".join(str(part) for part in first["loc"])
    said = _said(first)
    return f"{field}: {said}" if field else said


def _said(error: Mapping[str, Any]) -> str:
    kind, context = str(error["type"]), error.get("ctx") or {}
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return "is not allowed here"
    if kind == "json_invalid":
        return f"the body is not JSON: {context.get('error', '')}"
    if kind in ("value_error", "assertion_error"):
        return str(context.get("error") or error["msg"])
    allowed = _allowed(kind, context)
    return (
        f"{_value(error.get('input'))} is not allowed: {allowed or str(error['msg']).removeprefix('Input should be ')}"
    )


def _allowed(kind: str, context: Mapping[str, Any]) -> str | None:
    if kind == "string_pattern_mismatch":
        return ALLOWED.get(str(context.get("pattern")))
    if kind in _WORDS:
        return _WORDS[kind].format_map(context)
    return _KINDS.get(kind.partition("_")[0])


def _value(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= _MAX_VALUE else f"{said[:_MAX_VALUE]}…"
