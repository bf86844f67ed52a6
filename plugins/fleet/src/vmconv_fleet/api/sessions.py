"""Sessions of browsers: after a login a cookie stands for the token, as long as the token is valid."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from typing import NamedTuple

LIFETIME = 8 * 3600.0
MAX_SESSIONS = 1000
MAX_OF_ONE = 16
"""Sessions of one holder, who must not end those of others."""


class BrowserSession(NamedTuple):
    """A browser's session. Its forms carry `form_key`, so that only its own pages can submit them."""

    token: str
    holder: str
    form_key: str
    until: float


class BrowserSessions:
    """The sessions of this node, in memory only. Used on the API's loop alone."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, BrowserSession] = OrderedDict()

    def begin(self, token: str, *, holder: str | None = None, lifetime: float = LIFETIME) -> str:
        """Returns a new cookie for a valid token. `holder` is the same for all tokens of a person."""
        holder = holder or token
        own = [cookie for cookie, session in self._sessions.items() if session.holder == holder]
        if len(own) >= MAX_OF_ONE:
            self.end(own[0])
        elif len(self._sessions) >= MAX_SESSIONS:
            self._sessions.popitem(last=False)
        cookie = secrets.token_urlsafe(32)
        until = time.monotonic() + lifetime
        self._sessions[cookie] = BrowserSession(token, holder, secrets.token_urlsafe(32), until)
        return cookie

    def get(self, cookie: str) -> BrowserSession | None:
        session = self._sessions.get(cookie)
        if session and session.until < time.monotonic():
            self.end(cookie)
            return None
        return session

    def end(self, cookie: str) -> None:
        self._sessions.pop(cookie, None)
