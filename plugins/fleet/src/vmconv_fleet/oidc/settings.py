"""The settings of the sign-in: the table `oidc` of `node.toml`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

MINUTES = range(5, 24 * 60 + 1)
_TEXTS = ("issuer", "client", "url", "secret_file", "ca", "groups", "scope")
_NEEDED = ("issuer", "client", "url")
CALLBACK = "/login/callback"


class OidcSettings(NamedTuple):
    """Where people sign in.

    `issuer` is the provider, `client` this node's id there, `secret_file` the file with its secret (none: a public
    client), `url` the address of this node's console for browsers, `ca` the certificate that the provider's is signed
    by (none: the system's). `groups` names the claim with a person's groups. A session lasts `minutes`.
    """

    issuer: str
    client: str
    url: str
    secret_file: str = ""
    ca: str = ""
    groups: str = "groups"
    scope: str = "openid profile"
    minutes: int = 60

    @property
    def redirect(self) -> str:
        """The address to which the provider sends a browser back."""
        return self.url + CALLBACK


def read(table: Mapping[str, Any]) -> OidcSettings:
    """Returns the settings. Raises ValueError if they are not valid."""
    if unknown := sorted(set(table) - set(OidcSettings._fields)):
        raise ValueError(f"unknown setting {unknown[0]!r}, known are {', '.join(OidcSettings._fields)}")
    if missing := [name for name in _NEEDED if not table.get(name)]:
        raise ValueError(f"setting {missing[0]!r} is missing")
    for name in _TEXTS:
        if not isinstance(table.get(name, ""), str) or not str(table.get(name, "")).isprintable():
            raise ValueError(f"setting {name!r} is {table[name]!r}")
    minutes = table.get("minutes", 60)
    if isinstance(minutes, bool) or minutes not in MINUTES:
        raise ValueError(f"setting 'minutes' is {minutes!r}, {MINUTES[0]} to {MINUTES[-1]} are possible")
    if "openid" not in str(table.get("scope", "openid")).split():
        raise ValueError("setting 'scope' lacks openid")
    refuse_unless_https(str(table["issuer"]), "issuer")
    where = refuse_unless_https(str(table["url"]), "url")
    return OidcSettings(**{**table, "url": f"https://{where.netloc}"})


def refuse_unless_https(url: str, what: str, *, query: bool = False) -> SplitResult:
    """Returns the parts of a URL. Raises ValueError unless it is plain https; with `query` it may have one."""
    wrong = ValueError(f"{what} {url[:200]!r} is no plain https URL")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise wrong
    try:
        parts = urlsplit(url)
        plain = parts.scheme == "https" and parts.hostname and parts.port != 0
    except ValueError:
        raise wrong from None
    if not plain or parts.username or parts.fragment or (parts.query and not query):
        raise wrong
    return parts
