"""What a selection means, without a database: the oracle of its translation into SQL."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from fnmatch import fnmatchcase

from vmconv_fleet.catalogue.selection import Every, Flag, Match, Not, Number, Selection, Some

Facts = Mapping[str, str | int | bool | tuple[str, ...]]
"""The fields of one disk; a tuple has several names of one object."""

_ORDER = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def selects(selection: Selection, facts: Facts) -> bool:
    """Returns whether the selection chooses the disk."""
    match selection:
        case Match(field, sign, pattern):
            known = facts[field]
            names = known if isinstance(known, tuple) else (str(known),)
            return any(fnmatchcase(name.casefold(), pattern) for name in names) is (sign == "=")
        case Number(field, sign, value):
            number = facts[field]
            assert isinstance(number, int)
            return bool(_ORDER[sign](number, value))
        case Flag(field, wanted):
            return bool(facts[field]) is wanted
        case Not(inner):
            return not selects(inner, facts)
        case Some(parts):
            return any(selects(part, facts) for part in parts)
        case Every(parts):
            return all(selects(part, facts) for part in parts)
