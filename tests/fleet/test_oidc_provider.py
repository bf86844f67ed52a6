"""What a node believes of a provider: hostile ID tokens, and providers that are hostile themselves."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from joserfc import jwt
from joserfc.jwk import ECKey, OctKey, OKPKey

from fleet.openid import NOW, Browser, OpenIdProvider
from fleet.serving import tls_files
from vmconv_fleet.oidc import fetching, states
from vmconv_fleet.oidc.fetching import Fetcher, SignInError
from vmconv_fleet.oidc.keys import MAX_KEYS
from vmconv_fleet.oidc.provider import LEEWAY_S, Provider, SignedIn
from vmconv_fleet.oidc.settings import OidcSettings, read


@pytest.fixture
def openid(tmp_path: Path) -> Iterator[OpenIdProvider]:
    with OpenIdProvider(tmp_path / "provider").running() as provider:
        yield provider


def known(openid: OpenIdProvider, **more: Any) -> Provider:
    return Provider(openid.settings(**more), now=lambda: NOW)


def sign_in(openid: OpenIdProvider, provider: Provider | None = None, **answer: Any) -> SignedIn:
    """Returns the person of a whole sign-in, the answer of the provider changed like this."""
    provider = provider or known(openid)
    begun = states.begun("/")
    address = provider.address(state=begun.state, nonce=begun.nonce, verifier=begun.verifier)
    back = Browser(openid.ca).go(address).location
    said = {name: values[0] for name, values in parse_qs(urlsplit(back).query).items()}
    assert said["state"] == begun.state
    return provider.person({**said, **answer}, nonce=begun.nonce, verifier=begun.verifier)


def test_a_person_signs_in(openid: OpenIdProvider) -> None:
    assert sign_in(openid) == (openid.issuer, "248289", "Anna Example", ["ops", "staff"])


@pytest.mark.parametrize("kind", ["RSA", "EC", "Ed25519"])
def test_usual_keys(openid: OpenIdProvider, kind: str) -> None:
    if kind == "RSA":
        openid.use_rsa()
    if kind == "Ed25519":
        openid.key = OKPKey.generate_key("Ed25519", {"kid": "k1"})
        openid.keys = [openid.key.as_dict(private=False)]
    assert sign_in(openid).subject == "248289"


@pytest.mark.parametrize("methods", [["client_secret_post"], ["client_secret_basic", "client_secret_post"], None, 5])
def test_the_secret_is_sent_as_the_provider_takes_it(openid: OpenIdProvider, methods: object) -> None:
    openid.described = {"token_endpoint_auth_methods_supported": methods}
    assert sign_in(openid).subject == "248289"


def test_a_wrong_secret_and_a_missing_one_are_told(openid: OpenIdProvider, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("x")
    with pytest.raises(SignInError, match="refuses the code: invalid_client"):
        sign_in(openid, known(openid, secret_file=str(tmp_path / "wrong")))
    with pytest.raises(SignInError, match="secret cannot be read"):
        sign_in(openid, known(openid, secret_file=str(tmp_path / "none")))


def test_a_code_is_only_for_who_began(openid: OpenIdProvider) -> None:
    """The verifier of PKCE: a stolen code is of no use."""
    provider, begun = known(openid), states.begun("/")
    address = provider.address(state=begun.state, nonce=begun.nonce, verifier=begun.verifier)
    code = parse_qs(urlsplit(Browser(openid.ca).go(address).location).query)["code"][0]
    with pytest.raises(SignInError, match="refuses the code"):
        provider.person({"code": code}, nonce=begun.nonce, verifier=states.begun("/").verifier)


# Hostile tokens


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def compact(header: dict[str, Any], claims: Any, signature: bytes) -> str:
    return ".".join((b64(json.dumps(header).encode()), b64(json.dumps(claims).encode()), b64(signature)))


def by_secret(header: dict[str, Any], claims: Any, secret: bytes) -> str:
    unsigned = compact(header, claims, b"").rstrip(".")
    return f"{unsigned}.{b64(hmac.digest(secret, unsigned.encode(), hashlib.sha256))}"


def pem(openid: OpenIdProvider) -> bytes:
    public: Any = openid.key.public_key
    return bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def swapped(token: str, claims: dict[str, Any]) -> str:
    """Returns a token with other claims and the same signature."""
    header, _, signature = token.split(".")
    return f"{header}.{b64(json.dumps(claims).encode())}.{signature}"


OTHER = ECKey.generate_key("P-256", {"kid": "k1"})
FORGERIES: dict[str, Callable[[OpenIdProvider, dict[str, Any]], str]] = {
    "alg none": lambda _one, claims: compact({"alg": "none"}, claims, b""),
    "alg none with kid": lambda _one, claims: compact({"alg": "none", "kid": "k1"}, claims, b""),
    "alg NoNe": lambda _one, claims: compact({"alg": "NoNe", "kid": "k1"}, claims, b""),
    "HS256 with the public key": lambda one, claims: by_secret({"alg": "HS256", "kid": "k1"}, claims, pem(one)),
    "HS256 with the JWK": lambda one, claims: by_secret(
        {"alg": "HS256", "kid": "k1"}, claims, json.dumps(one.keys[0]).encode()
    ),
    "another key": lambda _one, claims: jwt.encode({"alg": "ES256", "kid": "k1"}, claims, OTHER),
    "a key in the header": lambda _one, claims: jwt.encode(
        {"alg": "ES256", "jwk": OTHER.as_dict(private=False), "kid": "k1"}, claims, OTHER
    ),
    "an unknown key": lambda _one, claims: jwt.encode({"alg": "ES256", "kid": "k2"}, claims, OTHER),
    "a kid that is no text": lambda _one, claims: compact({"alg": "ES256", "kid": ["k1"]}, claims, b"x" * 64),
    "no signature": lambda one, claims: one.signed(claims).rpartition(".")[0] + ".",
    "two parts": lambda one, claims: one.signed(claims).rpartition(".")[0],
    "another payload": lambda one, claims: swapped(one.signed(claims), {**claims, "sub": "root"}),
    "an unknown critical header": lambda _one, claims: compact(
        {"alg": "ES256", "kid": "k1", "crit": ["x"], "x": 1}, claims, b"x" * 64
    ),
    "RS256 with a key of EC": lambda _one, claims: compact({"alg": "RS256", "kid": "k1"}, claims, b"x" * 256),
    "claims that are a list": lambda one, claims: one.signed([claims]),  # type: ignore[arg-type]
    "encrypted": lambda _one, _claims: "a.b.c.d.e",
    "empty": lambda _one, _claims: "",
    "not ASCII": lambda _one, _claims: "\u00e9.\u00e9.\u00e9",
    "a deep header": lambda _one, _claims: f"{b64(b'[' * 60_000)}.{b64(b'{}')}.{b64(b'x' * 64)}",
}


@pytest.mark.parametrize("how", FORGERIES)
def test_a_forged_token_is_refused(openid: OpenIdProvider, how: str) -> None:
    openid.sign = lambda claims: FORGERIES[how](openid, claims)
    with pytest.raises(SignInError, match=r"not signed by the provider|no key|no ID token") as caught:
        sign_in(openid)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": "https://evil.example"},
        {"iss": None},
        {"aud": "another"},
        {"aud": None},
        {"aud": []},
        {"aud": ["another"]},
        {"aud": ["vmconv", "another"]},
        {"aud": ["vmconv", "another"], "azp": "another"},
        {"azp": "another"},
        {"nonce": None},
        {"nonce": "x"},
        {"nonce": 1},
        {"exp": NOW - LEEWAY_S - 1},
        {"exp": None},
        {"exp": "2030-01-01"},
        {"exp": float("nan")},
        {"exp": True},
        {"exp": {}},
        {"iat": NOW + LEEWAY_S + 1},
        {"iat": None},
        {"nbf": NOW + LEEWAY_S + 1},
        {"sub": None},
        {"sub": 5},
        {"sub": ""},
        {"sub": "x" * 256},
        {"sub": "a\nb"},
        {"sub": "\ud800"},
        {"at_hash": "x"},
        {"groups": "admins"},
        {"groups": {"admins": True}},
        {"groups": ["x"] * 10_001},
    ],
    ids=lambda claims: repr(claims)[:40],
)
def test_a_token_for_something_else_is_refused(openid: OpenIdProvider, claims: dict[str, Any]) -> None:
    openid.claims |= claims
    with pytest.raises(SignInError, match=r"not for this sign-in|subject|no list of at most"):
        sign_in(openid)


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": NOW - LEEWAY_S + 1},
        {"iat": NOW + LEEWAY_S},
        {"nbf": NOW + LEEWAY_S},
        {"aud": ["vmconv"]},
        {"aud": ["vmconv", "another"], "azp": "vmconv"},
        {"azp": "vmconv"},
    ],
    ids=lambda claims: repr(claims)[:40],
)
def test_clocks_may_differ_a_little_and_audiences_be_several(openid: OpenIdProvider, claims: dict[str, Any]) -> None:
    openid.claims |= claims
    assert sign_in(openid).subject == "248289"


@pytest.mark.parametrize(
    ("claims", "name", "groups"),
    [
        ({"name": None, "preferred_username": "anna"}, "anna", ["ops", "staff"]),
        ({"name": 5, "email": "a@b.example"}, "a@b.example", ["ops", "staff"]),
        ({"name": ""}, "248289", ["ops", "staff"]),
        ({"groups": None}, "Anna Example", []),
        ({"groups": [1, "ops", None, "a\nb", "\ud800", {}]}, "Anna Example", ["ops"]),
    ],
    ids=str,
)
def test_names_and_groups(openid: OpenIdProvider, claims: dict[str, Any], name: str, groups: list[str]) -> None:
    openid.claims |= claims
    assert sign_in(openid)[2:] == (name, groups)


def test_a_claim_of_another_name_has_the_groups(openid: OpenIdProvider) -> None:
    openid.claims["roles"] = ["dba"]
    assert sign_in(openid, known(openid, groups="roles")).groups == ["dba"]


# Keys


def test_new_keys_of_the_provider_are_fetched(openid: OpenIdProvider) -> None:
    provider = known(openid)
    sign_in(openid, provider)
    openid.key = ECKey.generate_key("P-256", {"kid": "k2"})
    openid.keys.append(openid.key.as_dict(private=False))
    with pytest.raises(SignInError, match="no key 'k2'"):
        sign_in(openid, provider)
    assert openid.count("/keys") == 1
    provider._keys_at -= 31
    assert sign_in(openid, provider).subject == "248289"


def test_unknown_keys_are_no_flood_of_requests(openid: OpenIdProvider) -> None:
    provider = known(openid)
    openid.sign = lambda claims: FORGERIES["an unknown key"](openid, claims)
    for _ in range(5):
        with pytest.raises(SignInError, match="no key"):
            sign_in(openid, provider)
    assert openid.count("/keys") == 1


def test_a_token_names_its_key_unless_there_is_one(openid: OpenIdProvider) -> None:
    openid.sign = lambda claims: jwt.encode({"alg": "ES256"}, claims, openid.key)
    assert sign_in(openid).subject == "248289"
    openid.keys.append(OTHER.as_dict(private=False) | {"kid": "k9"})
    with pytest.raises(SignInError, match="no key ''"):
        sign_in(openid)


@pytest.mark.parametrize(
    "keys",
    [
        None,
        {},
        [],
        [5],
        [{"kty": "oct", "k": "c2VjcmV0", "kid": "k1"}],
        [{"kty": "EC", "kid": "k1"}],
        [{"kty": "EC", "crv": "P-256", "x": "!", "y": 5, "kid": "k1"}],
        [{"kty": "RSA", "n": "AQAB", "e": "AQAB", "kid": "k1"}],
        [{"kty": ["RSA"], "kid": "k1"}],
        [{"kty": "RSA", "n": b64(b"\xff" * 128), "e": "AQAB", "kid": "k1"}],
        [{"kty": "RSA", "n": b64(b"\xff" * 8192), "e": "AQAB", "kid": "k1"}],
        [{**OTHER.as_dict(private=False), "use": "enc"}],
        [OTHER.as_dict(private=False)] * (MAX_KEYS + 1),
    ],
    ids=[
        "null",
        "an object",
        "empty",
        "a number",
        "a secret",
        "EC without a point",
        "EC with an odd point",
        "RSA of three bytes",
        "a type in a list",
        "RSA of 1024 bits",
        "RSA of 65536 bits",
        "for encryption",
        "too many",
    ],
)
def test_a_key_set_without_usable_keys_is_refused(openid: OpenIdProvider, keys: Any) -> None:
    openid.keys = keys
    with pytest.raises(SignInError, match=r"key set has"):
        sign_in(openid)


def test_a_secret_in_the_key_set_is_no_key(openid: OpenIdProvider) -> None:
    secret = OctKey.generate_key(256, {"kid": "k2"})
    openid.keys.append(secret.as_dict(private=True))
    openid.sign = lambda claims: jwt.encode({"alg": "HS256", "kid": "k2"}, claims, secret)
    with pytest.raises(SignInError, match="no key 'k2'"):
        sign_in(openid)


# Hostile providers

DISCOVERY, KEYS, TOKEN = "/.well-known/openid-configuration", "/keys", "/token"


@pytest.mark.parametrize("path", [DISCOVERY, KEYS, TOKEN])
@pytest.mark.parametrize(
    ("status", "data", "said"),
    [
        (500, b"{}", "status 500"),
        (200, b"<html>", "no JSON"),
        (200, b"[" * 100_000, "no JSON"),
        (200, b"[]", "no object"),
        (200, b"\xff", "no JSON"),
        (200, b" " * (fetching.MAX_ANSWER + 1), "more than 262144 bytes"),
        (302, b"", "status 302"),
        (307, b"", "status 307"),
    ],
    ids=["500", "html", "deep", "list", "bytes", "huge", "redirect", "redirect of the form"],
)
def test_an_odd_answer_is_refused(openid: OpenIdProvider, path: str, status: int, data: bytes, said: str) -> None:
    openid.answers[path] = lambda: (status, {"Location": f"{openid.issuer}/elsewhere"}, data)
    with pytest.raises(SignInError, match=said):
        sign_in(openid)
    assert not openid.count("/elsewhere")


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"issuer": "https://evil.example"}, "calls itself 'https://evil.example'"),
        ({"issuer": None}, "calls itself 'None'"),
        ({"token_endpoint": "http://127.0.0.1:1/token"}, "token_endpoint .* is no plain https URL"),
        ({"token_endpoint": "file:///etc/passwd"}, "token_endpoint .* is no plain https URL"),
        ({"jwks_uri": None}, "jwks_uri 'None' is no plain https URL"),
        ({"jwks_uri": "https://u:p@127.0.0.1/keys"}, "jwks_uri .* is no plain https URL"),
        ({"jwks_uri": "https://127.0.0.1:99999/"}, "jwks_uri .* is no plain https URL"),
        ({"jwks_uri": "https://127.0.0.1/a\r\nX: y"}, "jwks_uri .* is no plain https URL"),
        ({"authorization_endpoint": "javascript:alert(1)"}, "authorization_endpoint .* is no plain https URL"),
        ({"authorization_endpoint": ["x"]}, "authorization_endpoint .* is no plain https URL"),
    ],
)
def test_a_description_of_another_provider_or_without_tls_is_refused(
    openid: OpenIdProvider, described: dict[str, Any], said: str
) -> None:
    openid.described = described
    with pytest.raises(SignInError, match=said):
        sign_in(openid)


@pytest.mark.parametrize(
    ("supported", "answer", "ok"),
    [(False, {}, True), (True, {}, False), (False, {"iss": "x"}, False), (True, {"iss": "x"}, False)],
)
def test_the_answer_of_another_provider_is_refused(
    openid: OpenIdProvider, supported: bool, answer: dict[str, Any], ok: bool
) -> None:
    openid.described = {"authorization_response_iss_parameter_supported": supported}
    if ok:
        sign_in(openid, iss=openid.issuer)
        sign_in(openid, **answer)
        return
    with pytest.raises(SignInError, match="another provider"):
        sign_in(openid, **answer)
    assert not openid.count("/token")


def test_a_refusal_of_the_provider_is_told(openid: OpenIdProvider) -> None:
    with pytest.raises(SignInError, match="the provider refuses: no<b>") as caught:
        sign_in(openid, error="access_denied", error_description="no<b>" * 1000)
    assert len(str(caught.value)) <= 300
    with pytest.raises(SignInError, match="no code"):
        sign_in(openid, code="")


@pytest.mark.parametrize("token", [{}, {"id_token": 5}, {"id_token": ["x"]}, {"id_token": None}], ids=str)
def test_an_answer_without_an_id_token_is_refused(openid: OpenIdProvider, token: dict[str, Any]) -> None:
    openid.answers[TOKEN] = lambda: (200, {}, json.dumps({"access_token": "a", **token}).encode())
    with pytest.raises(SignInError, match="no ID token"):
        sign_in(openid)


def test_a_slow_provider_is_given_up(openid: OpenIdProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sends a byte now and then, so no single read is slow."""
    monkeypatch.setattr(fetching, "SECONDS", 0.5)

    def slow() -> tuple[int, dict[str, str], bytes]:
        time.sleep(3)
        return 200, {}, b"{}"

    openid.answers[DISCOVERY] = slow
    began = time.monotonic()
    with pytest.raises(SignInError, match="cannot be asked"):
        sign_in(openid)
    assert time.monotonic() - began < 3


def test_a_provider_with_another_certificate_is_refused(openid: OpenIdProvider, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    _, other = tls_files(tmp_path / "other")
    with pytest.raises(SignInError, match="certificate verify failed"):
        sign_in(openid, known(openid, ca=other))
    with pytest.raises(SignInError, match="cannot be read as certificates"):
        known(openid, ca=str(tmp_path / "none"))


# Settings and the state of a sign-in

GOOD = {"issuer": "https://id.example/realms/dc", "client": "vmconv", "url": "https://n01.example:7449"}


def test_settings_are_read() -> None:
    settings = read({**GOOD, "url": "https://n01.example:7449/", "minutes": 5})
    assert settings == OidcSettings(**GOOD, minutes=5)
    assert settings.redirect == "https://n01.example:7449/login/callback"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"isuer": "x"}, "unknown setting 'isuer'"),
        ({"client": ""}, "setting 'client' is missing"),
        ({"issuer": None}, "setting 'issuer' is missing"),
        ({"issuer": 5}, "setting 'issuer' is 5"),
        ({"client": "a\nb"}, "setting 'client' is"),
        ({"issuer": "http://id.example"}, "issuer 'http://id.example' is no plain https URL"),
        ({"url": "https://n01.example/?x"}, "url .* is no plain https URL"),
        ({"url": "https://u@n01.example"}, "url .* is no plain https URL"),
        ({"url": "https://[::1"}, "url .* is no plain https URL"),
        ({"scope": "profile"}, "lacks openid"),
        ({"minutes": 1}, "'minutes' is 1, 5 to 1440"),
        ({"minutes": True}, "'minutes' is True"),
        ({"minutes": "60"}, "'minutes' is '60'"),
    ],
)
def test_wrong_settings_are_told(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read({**GOOD, **more})


@pytest.mark.parametrize("path", [None, "", "x", "/x y", " /x", "/\t/evil.example", "/\n/evil.example", "/%\\"])
@pytest.mark.parametrize("end", ["", "x" * 1000])
def test_only_own_pages_come_next(path: str | None, end: str) -> None:
    assert states.own_path(path + end if path is not None else None) == "/"


@pytest.mark.parametrize("path", ["//", "///", "/\\", "\\\\", "https://", "//\u00e9", "javascript:", "\\/", "/\\/"])
def test_other_sites_come_not_next(path: str) -> None:
    assert states.own_path(f"{path}evil.example") == "/"


@pytest.mark.parametrize("path", ["/", "/jobs/n01/j1", "/disks?select=format%3Dvmdk&sort=-size", "/a//b", "/x#y"])
def test_own_pages_come_next(path: str) -> None:
    assert states.own_path(path) == path


def test_a_sealed_state_is_that_of_its_browser_and_time() -> None:
    now = [1000.0]
    seal, begun = states.Seal(lambda: now[0]), states.begun("/jobs")
    cookie = seal.close(begun)
    assert seal.open(cookie, begun.state) == begun
    assert begun.verifier not in cookie
    for wrong in ("", "x", cookie[:-2], states.Seal(lambda: now[0]).close(begun)):
        with pytest.raises(SignInError, match="begun no sign-in"):
            seal.open(wrong, begun.state)
    for state in ("", "x", states.begun("/").state, "\u00e9"):
        with pytest.raises(SignInError, match="another sign-in"):
            seal.open(cookie, state)
    now[0] += states.LIFETIME_S + 1
    with pytest.raises(SignInError, match="too long ago"):
        seal.open(cookie, begun.state)


def test_addresses_that_hang_do_not_exceed_the_time_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "CONNECT_S", 0.2, raising=False)
    monkeypatch.setattr(fetching, "SECONDS", 0.3)
    with ExitStack() as stack:
        last = stack.enter_context(socket.create_server(("127.0.1.4", 0)))
        port = last.getsockname()[1]
        for host in ("127.0.1.1", "127.0.1.2", "127.0.1.3"):
            stack.enter_context(socket.create_server((host, port), backlog=0))
            for _ in range(3):
                # They fill the backlog: no other connection is accepted.
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex((host, port))
        real = socket.getaddrinfo

        def found(host: str, *arguments: Any, **more: Any) -> Any:
            hosts = [f"127.0.1.{n}" for n in (1, 2, 3, 4)] if host == "id.example" else [host]
            return [entry for one in hosts for entry in real(one, *arguments, **more)]

        monkeypatch.setattr(socket, "getaddrinfo", found)
        with pytest.raises(SignInError, match="timed out"):
            Fetcher("").get(f"https://id.example:{port}/")
        last.setblocking(False)
        with pytest.raises(BlockingIOError):
            last.accept()
