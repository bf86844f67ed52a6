"""Sessions of browsers: who gave a token once is known by a cookie, as long as the token stays good."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from typing import NamedTuple

LIFETIME = 8 * 3600.0
MAX_SESSIONS = 1000


class BrowserSession(NamedTuple):
    """One browser's session. `form_key` is in each form that it is shown: only who can read the page can send it."""

    token: str
    form_key: str
    until: float


class BrowserSessions:
    """The sessions of this node, in memory: they end with it. Used on the API's loop alone."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, BrowserSession] = OrderedDict()

    def begin(self, token: str) -> str:
        """Returns the new cookie of somebody whose token was found good."""
        while len(self._sessions) >= MAX_SESSIONS:
            self._sessions.popitem(last=False)
        cookie = secrets.token_urlsafe(32)
        self._sessions[cookie] = BrowserSession(token, secrets.token_urlsafe(32), time.monotonic() + LIFETIME)
        return cookie

    def get(self, cookie: str) -> BrowserSession | None:
        session = self._sessions.get(cookie)
        if session and session.until < time.monotonic():
            self.end(cookie)
            return None
        return session

    def end(self, cookie: str) -> None:
        self._sessions.pop(cookie, None)
