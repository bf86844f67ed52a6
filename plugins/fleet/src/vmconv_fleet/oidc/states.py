"""A sign-in between its two requests: sealed in the browser's cookie, so that strangers who begin many cost nothing."""

from __future__ import annotations

import hmac
import json
import re
import secrets
import time
from collections.abc import Callable
from typing import NamedTuple

from cryptography.fernet import Fernet, InvalidToken

from vmconv_fleet.oidc.fetching import SignInError

LIFETIME_S = 600
MAX_PATH = 1000
_PATH = re.compile(r"/(?:[!-\[\]-~]+)?")
"""Visible ASCII without a backslash, which browsers take for a slash."""


class SignInState(NamedTuple):
    """`state` is the provider's to send back, `nonce` is in the ID token, `verifier` proves who began (PKCE)."""

    state: str
    nonce: str
    verifier: str
    next: str


def begun(next_: str) -> SignInState:
    """Returns a new sign-in that leads to a page of this node."""
    state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
    return SignInState(state, nonce, verifier, own_path(next_))


def own_path(path: str | None) -> str:
    """Returns the path if it leads to a page of this node; "/" otherwise."""
    if not path or len(path) > MAX_PATH or path.startswith("//") or not _PATH.fullmatch(path):
        return "/"
    return path


class Seal:
    """Seals sign-ins, with a key of this process. `now` is the time in seconds since 1970."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._fernet = Fernet(Fernet.generate_key())
        self._now = now

    def close(self, state: SignInState) -> str:
        return self._fernet.encrypt_at_time(json.dumps(state).encode(), int(self._now())).decode()

    def open(self, cookie: str, state: str) -> SignInState:
        """Returns the sign-in of this browser. Raises SignInError if it began no such one, or too long ago."""
        try:
            found = SignInState(*json.loads(self._fernet.decrypt_at_time(cookie, LIFETIME_S, int(self._now()))))
        except (InvalidToken, ValueError, TypeError) as exc:
            raise SignInError("this browser has begun no sign-in here, or too long ago", hint="sign in again") from exc
        if not hmac.compare_digest(found.state.encode(), state.encode()):
            raise SignInError("this answer belongs to another sign-in", hint="sign in again")
        return found
