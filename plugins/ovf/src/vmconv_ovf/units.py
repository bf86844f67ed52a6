"""Units of quantities: programmatic units (DSP0004, Annex C) such as `byte * 2^20`, and the words of OVF 0.9."""

from __future__ import annotations

import re

_WORDS = {"byte": 1, "bytes": 1, "b": 1}
for _power, _prefix in enumerate(("kilo", "mega", "giga", "tera"), start=1):
    for _word in (f"{_prefix}byte", f"{_prefix}bytes", f"{_prefix[0]}b"):
        _WORDS[_word] = 1 << (10 * _power)

_FACTOR = re.compile(r"\*(\d{1,19})(?:\^(\d{1,2}))?")
_LARGEST = 1 << 62


def bytes_of(unit: str) -> int | None:
    """Returns the number of bytes of a unit; None for one that is no unit of bytes."""
    compact = "".join(unit.split()).lower()
    found = re.match(r"[a-z]+", compact)
    size = _WORDS.get(found[0]) if found else None
    at = found.end() if found else 0
    while size is not None and at < len(compact):
        factor = _FACTOR.match(compact, at)
        if factor is None:
            return None
        size *= int(factor[1]) ** int(factor[2] or 1)
        size = size if 0 < size <= _LARGEST else None
        at = factor.end()
    return size
