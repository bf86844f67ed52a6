"""The object of zeros: what ranges without payload refer to."""

from __future__ import annotations

from functools import cache
from hashlib import md5

ZEROS = 4 << 20
"""Bytes of the object: sent once per container, and read once per so many bytes of zeros."""


@cache
def etag_of_zeros() -> str:
    return md5(bytes(ZEROS), usedforsecurity=False).hexdigest()


def is_zeros(etag: str, size: int) -> bool:
    """Returns whether an object with this ETag and size holds nothing but zeros."""
    return size == ZEROS and etag == etag_of_zeros()
