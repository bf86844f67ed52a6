"""Tokens of people: made once, shown once, kept as a hash, and known on every node of the fleet.

A token is `vmf_<owner>_<id>_<secret>`: owner and id name its record, so a lookup is one read. The secret has 256 random
bits, which cannot be guessed, so a single SHA-256 is enough.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import NamedTuple

_TOKEN = re.compile(r"vmf_(?P<owner>[1-9a-f][0-9a-f]{31})_(?P<id>[0-9a-f]{12})_(?P<secret>[A-Za-z0-9_-]{43})")


class NewToken(NamedTuple):
    """A new token: `text` for its holder alone, `id` and `hash` for the record."""

    text: str
    id: str
    hash: str


def make(owner: str) -> NewToken:
    """Returns a new token; its record belongs to `owner`."""
    identifier = secrets.token_hex(6)
    text = f"vmf_{owner}_{identifier}_{secrets.token_urlsafe(32)}"
    return NewToken(text, identifier, hashed(text))


def reference(text: str) -> tuple[str, str] | None:
    """Returns owner and id of a token's record; None if the text is not a token."""
    match = _TOKEN.fullmatch(text)
    return (match["owner"], match["id"]) if match else None


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def fits(text: str, hash_: str) -> bool:
    """Returns whether the token has this hash, in constant time."""
    return hmac.compare_digest(hashed(text), hash_)
