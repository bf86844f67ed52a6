"""A small OpenID provider over TLS, which is honest unless a test makes it lie; and a browser without a window."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import secrets
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.cookies import SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlencode, urlsplit

from joserfc import jws
from joserfc.jwk import ECKey, Key, RSAKey

from fleet.serving import tls_files
from vmconv_fleet.oidc.settings import OidcSettings
from vmconv_fleet.testing import PATIENCE

NOW = 1_800_000_000
CLIENT, SECRET = "vmconv", "s3cret"
ANNA = {"sub": "248289", "name": "Anna Example", "groups": ["ops", "staff"]}

Claims = dict[str, Any]
Answer = tuple[int, dict[str, str], bytes]


class Page(NamedTuple):
    """An answer as a browser sees it."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def location(self) -> str:
        return self.headers["location"]


class OpenIdProvider:
    """A provider with one person, who is always signed in there.

    Each sign-in gets `claims`; `sign` makes the ID token. `answers` replaces the answers to paths, `described` fields
    of the description. `asked` are the requests so far.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self._tls_key, self.ca = tls_files(directory)
        self.key: Key = ECKey.generate_key("P-256", {"kid": "k1"})
        self.keys: list[dict[str, Any]] = [self.key.as_dict(private=False)]
        self.claims: Claims = dict(ANNA)
        self.now: Callable[[], float] = lambda: NOW
        self.sign: Callable[[Claims], str] = self.signed
        self.described: dict[str, Any] = {}
        self.answers: dict[str, Callable[[], Answer]] = {}
        self.asked: list[str] = []
        self._codes: dict[str, dict[str, str]] = {}
        self.issuer = ""

    def settings(self, url: str = "https://127.0.0.1:7449", **more: Any) -> OidcSettings:
        """Returns the settings of a node whose console is at the address."""
        secret = Path(self.ca).with_name("secret")
        secret.write_text(SECRET + "\n")
        return OidcSettings(self.issuer, CLIENT, url, **{"ca": self.ca, "secret_file": str(secret), **more})

    def signed(self, claims: Claims) -> str:
        algorithm = {"EC": "ES256", "RSA": "RS256", "OKP": "Ed25519"}[self.key.key_type]
        header = {"alg": algorithm, "kid": self.key.kid}
        return jws.serialize_compact(header, json.dumps(claims).encode(), self.key, algorithms=[algorithm])

    def use_rsa(self, bits: int = 2048) -> None:
        self.key = RSAKey.generate_key(bits, {"kid": "k1"})
        self.keys = [self.key.as_dict(private=False)]

    def count(self, path: str) -> int:
        return sum(one.partition("?")[0] == path for one in self.asked)

    @contextmanager
    def running(self) -> Iterator[OpenIdProvider]:
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.answer(self, b"")

            def do_POST(self) -> None:
                provider.answer(self, self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, *_said: object) -> None:
                pass

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.ca, self._tls_key)
        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads = True
            server.socket = context.wrap_socket(server.socket, server_side=True)
            self.issuer = f"https://127.0.0.1:{server.server_port}"
            thread = threading.Thread(target=lambda: server.serve_forever(0.02), daemon=True)
            thread.start()
            yield self
            server.shutdown()
            thread.join(PATIENCE)

    def answer(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        self.asked.append(handler.path)
        path = urlsplit(handler.path).path
        if path in self.answers:
            status, headers, data = self.answers[path]()
        else:
            status, headers, data = self._answer(path, handler, body)
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    def _answer(self, path: str, handler: BaseHTTPRequestHandler, body: bytes) -> Answer:
        if path == "/.well-known/openid-configuration":
            return _json(self._description())
        if path == "/keys":
            return _json({"keys": self.keys})
        if path == "/authorize":
            return self._authorize(_fields(urlsplit(handler.path).query))
        if path == "/token":
            return self._token(_fields(body.decode()), handler.headers.get("Authorization", ""))
        return 404, {}, b""

    def _description(self) -> dict[str, Any]:
        places = {"authorization_endpoint": "authorize", "token_endpoint": "token", "jwks_uri": "keys"}
        urls = {name: f"{self.issuer}/{path}" for name, path in places.items()}
        return {"issuer": self.issuer, **urls, **self.described}

    def _authorize(self, asked: dict[str, str]) -> Answer:
        assert (asked["response_type"], asked["client_id"]) == ("code", CLIENT)
        assert asked["code_challenge_method"] == "S256"
        assert "openid" in asked["scope"].split()
        code = secrets.token_urlsafe()
        self._codes[code] = asked
        back = urlencode({"code": code, "state": asked["state"]})
        return 302, {"Location": f"{asked['redirect_uri']}?{back}"}, b""

    def _token(self, given: dict[str, str], authorization: str) -> Answer:
        """Refuses what RFC 6749 and RFC 7636 have it refuse."""
        asked = self._codes.pop(given["code"], None)
        basic = f"Basic {base64.b64encode(f'{CLIENT}:{SECRET}'.encode()).decode()}"
        digest = hashlib.sha256(given.get("code_verifier", "").encode()).digest()
        challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        if authorization != basic and given.get("client_secret") != SECRET:
            return _json({"error": "invalid_client"}, 401)
        if asked is None or asked["redirect_uri"] != given["redirect_uri"] or asked["code_challenge"] != challenge:
            return _json({"error": "invalid_grant", "error_description": "<b>no such code</b>"}, 400)
        return _json({"access_token": "a", "token_type": "Bearer", "id_token": self.sign(self.stated(asked["nonce"]))})

    def stated(self, nonce: str) -> Claims:
        """Returns the claims of an ID token; a claim that is None is left out."""
        now = int(self.now())
        claims = {"iss": self.issuer, "aud": CLIENT, "iat": now, "exp": now + 300, "nonce": nonce, **self.claims}
        return {name: value for name, value in claims.items() if value is not None}


def _fields(text: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(text).items()}


def _json(content: object, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


class Browser:
    """Keeps cookies as one host's pages set them; follows no redirect by itself."""

    def __init__(self, *authorities: str) -> None:
        self._context = ssl.create_default_context()
        for file in authorities:
            self._context.load_verify_locations(file)
        self.cookies: dict[str, dict[str, str]] = {}
        self.set: list[str] = []

    def go(self, url: str, form: Mapping[str, str] | None = None, **headers: str) -> Page:
        parts = urlsplit(url)
        cookies = self.cookies.setdefault(parts.netloc, {})
        sent = {"Cookie": "; ".join(f"{name}={value}" for name, value in cookies.items())} if cookies else {}
        connection = http.client.HTTPSConnection(parts.netloc, timeout=PATIENCE, context=self._context)
        path = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
        body = None if form is None else urlencode(form)
        sent |= {} if form is None else {"Content-Type": "application/x-www-form-urlencoded"}
        connection.request("GET" if form is None else "POST", path, body, {**sent, **headers})
        response = connection.getresponse()
        page = Page(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read().decode())
        for line in response.headers.get_all("Set-Cookie", []):
            self.set.append(line)
            for name, morsel in SimpleCookie(line).items():
                if morsel.value:
                    cookies[name] = morsel.value
                else:
                    cookies.pop(name, None)
        connection.close()
        return page

    def follow(self, url: str, until: str = "/login/callback") -> Page:
        """Follows redirects until after a page whose path is `until`."""
        for _ in range(20):
            page = self.go(url)
            if urlsplit(url).path == until or page.status not in (302, 303):
                return page
            parts = urlsplit(url)
            url = page.location if "://" in page.location else f"https://{parts.netloc}{page.location}"
        raise AssertionError(f"too many redirects, to {url}")
