"""An OpenID provider, as this node knows it: its endpoints and keys, codes for ID tokens, and the people in them."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vmconv.plugin import os_errors
from vmconv_fleet.oidc.fetching import Fetcher, SignInError
from vmconv_fleet.oidc.keys import UnknownKeyError, keys_of, verified
from vmconv_fleet.oidc.settings import OidcSettings, refuse_unless_https

if TYPE_CHECKING:
    from joserfc.jwk import Key

LEEWAY_S = 60
"""How far the provider's clock may be off."""
MAX_GROUPS = 10_000
_FRESH_S = 3600.0
_AGAIN_S = 30.0
"""The least time between two requests for the keys, so that unknown keys are no flood of them."""
_MAX_SECRET = 4096
_SUBJECT = re.compile(r"[ -~]{1,255}")


class SignedIn(NamedTuple):
    """A person, as the provider's ID token states them."""

    issuer: str
    subject: str
    name: str
    groups: Sequence[str]


class Provider:
    """The provider of the settings. May be used from any thread; `now` is the time in seconds since 1970."""

    def __init__(self, settings: OidcSettings, now: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._now = now
        self._fetcher = Fetcher(settings.ca)
        self._lock = threading.Lock()
        self._metadata: Mapping[str, Any] = {}
        self._keys: Mapping[str, Key] = {}
        self._metadata_at = self._keys_at = float("-inf")

    def address(self, *, state: str, nonce: str, verifier: str) -> str:
        """Returns the provider's page where a person signs in."""
        endpoint = self._endpoint("authorization_endpoint")
        address, _ = self._client().create_authorization_url(endpoint, state=state, code_verifier=verifier, nonce=nonce)
        return str(address)

    def person(self, answer: Mapping[str, str], *, nonce: str, verifier: str) -> SignedIn:
        """Returns the person of the provider's answer in the browser's address. Raises SignInError."""
        self._refuse_other_issuer(answer)
        if "error" in answer:
            raise SignInError(f"the provider refuses: {answer.get('error_description') or answer['error']}"[:300])
        if not answer.get("code"):
            raise SignInError("the provider has sent no code")
        token = self._exchange(answer["code"], verifier)
        text = token.get("id_token")
        if not isinstance(text, str):
            raise SignInError("the provider has sent no ID token")
        return self._signed_in(self._claims(text, nonce, token.get("access_token")))

    def _client(self) -> Any:
        from authlib.oauth2.client import OAuth2Client

        settings = self._settings
        return OAuth2Client(
            None,
            settings.client,
            redirect_uri=settings.redirect,
            scope=settings.scope,
            code_challenge_method="S256",
        )

    def _refuse_other_issuer(self, answer: Mapping[str, str]) -> None:
        """Raises SignInError for the answer of another provider (RFC 9207)."""
        stated = answer.get("iss")
        if stated is None and not self._described().get("authorization_response_iss_parameter_supported"):
            return
        if stated != self._settings.issuer:
            raise SignInError(f"the answer is from another provider, {str(stated)[:200]!r}")

    def _exchange(self, code: str, verifier: str) -> dict[str, Any]:
        """Returns the provider's tokens for a code."""
        from authlib.oauth2.auth import ClientAuth
        from authlib.oauth2.rfc6749.parameters import prepare_token_request

        settings = self._settings
        body = prepare_token_request(
            "authorization_code", code=code, redirect_uri=settings.redirect, code_verifier=verifier
        )
        url = self._endpoint("token_endpoint")
        auth = ClientAuth(settings.client, self._secret(), self._method())
        _, headers, body = auth.prepare("POST", url, {}, body)
        found = self._fetcher.post(url, body, headers)
        if "error" in found:
            why = str(found.get("error_description") or found["error"])
            raise SignInError(f"the provider refuses the code: {why[:300]}")
        return found

    def _method(self) -> str:
        """Returns how this node authenticates: with its secret in a header, in the body, or not."""
        if not self._settings.secret_file:
            return "none"
        known = self._described().get("token_endpoint_auth_methods_supported")
        known = known if isinstance(known, list) else ["client_secret_basic"]
        takes_body = "client_secret_basic" not in known and "client_secret_post" in known
        return "client_secret_post" if takes_body else "client_secret_basic"

    def _secret(self) -> str | None:
        path = self._settings.secret_file
        if not path:
            return None
        with os_errors("the secret cannot be read", SignInError, where=path), open(path, encoding="utf-8") as file:
            return file.read(_MAX_SECRET).strip()

    def _claims(self, text: str, nonce: str, access_token: object) -> Mapping[str, Any]:
        """Returns the claims of an ID token for this client and this sign-in. Raises SignInError for any other."""
        from authlib.oidc.core import CodeIDToken
        from joserfc.errors import JoseError

        header, claims = self._verified(text)
        settings = self._settings
        options = {
            "iss": {"essential": True, "value": settings.issuer},
            "aud": {"essential": True, "value": settings.client},
            "sub": {"essential": True},
            "nonce": {"essential": True, "value": nonce},
        }
        params = {"nonce": nonce, "client_id": settings.client, "access_token": access_token}
        try:
            CodeIDToken(claims, header, options, params).validate(int(self._now()), LEEWAY_S)
        except (JoseError, ValueError, TypeError, AttributeError, OverflowError) as exc:
            raise SignInError(f"the ID token is not for this sign-in: {exc}") from exc
        return claims

    def _verified(self, text: str) -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            return verified(text, self._known_keys())
        except UnknownKeyError:
            return verified(text, self._known_keys(newer=True))

    def _known_keys(self, *, newer: bool = False) -> Mapping[str, Key]:
        with self._lock:
            keys, age = self._keys, time.monotonic() - self._keys_at
        if age < (_AGAIN_S if newer else _FRESH_S):
            return keys
        keys = keys_of(self._fetcher.get(self._endpoint("jwks_uri")))
        with self._lock:
            self._keys, self._keys_at = keys, time.monotonic()
        return keys

    def _described(self) -> Mapping[str, Any]:
        """Returns the provider's description of itself (OpenID Connect Discovery)."""
        with self._lock:
            found, age = self._metadata, time.monotonic() - self._metadata_at
        if age < _FRESH_S:
            return found
        from authlib.oidc.discovery import get_well_known_url

        found = self._fetcher.get(get_well_known_url(self._settings.issuer, external=True))
        if found.get("issuer") != self._settings.issuer:
            raise SignInError(f"the provider calls itself {str(found.get('issuer'))[:200]!r}, not as in node.toml")
        with self._lock:
            self._metadata, self._metadata_at = found, time.monotonic()
        return found

    def _endpoint(self, name: str) -> str:
        url = self._described().get(name)
        try:
            refuse_unless_https(str(url), name, query=True)
        except ValueError as exc:
            raise SignInError(f"the provider's {exc}") from exc
        return str(url)

    def _signed_in(self, claims: Mapping[str, Any]) -> SignedIn:
        subject = claims["sub"]
        if not isinstance(subject, str) or not _SUBJECT.fullmatch(subject):
            raise SignInError("the ID token's subject is no text of at most 255 ASCII characters")
        groups = claims.get(self._settings.groups, [])
        if not isinstance(groups, list) or len(groups) > MAX_GROUPS:
            raise SignInError(f"the claim {self._settings.groups!r} is no list of at most {MAX_GROUPS} groups")
        names = (claims.get(one) for one in ("name", "preferred_username", "email"))
        name = next((one for one in names if isinstance(one, str) and one), subject)
        printable = [one for one in groups if isinstance(one, str) and one.isprintable()]
        return SignedIn(self._settings.issuer, subject, name, printable)
