"""The provider's keys, and the ID tokens that they verify."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vmconv_fleet.oidc.fetching import SignInError

if TYPE_CHECKING:
    from joserfc.jwk import Key

MAX_KEYS = 100
ALGORITHMS: Mapping[str, tuple[str, ...]] = {
    "RSA": ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    "EC": ("ES256", "ES384", "ES512"),
    "OKP": ("Ed25519",),
}
"""Signatures by type of key. None of them needs a secret, so a public key is never one."""
_RSA_BITS = range(2048, 8193)


def keys_of(jwks: Mapping[str, Any]) -> dict[str, Key]:
    """Returns the keys for signatures by their ids; the id is empty for a key without one.

    Keys of other types or purposes are left out. Raises SignInError if the set has too many or no usable keys.
    """
    found = jwks.get("keys")
    if not isinstance(found, list):
        raise SignInError("the provider's key set has no list of keys")
    if len(found) > MAX_KEYS:
        raise SignInError(f"the provider's key set has {len(found)} keys, {MAX_KEYS} at most")
    usable = {_id(one): key for one in found if isinstance(one, dict) and (key := _key(one)) is not None}
    if not usable:
        raise SignInError("the provider's key set has no key for signatures that vmconv knows")
    return usable


def _id(jwk: Mapping[str, Any]) -> str:
    return str(jwk.get("kid", ""))


def _key(jwk: Mapping[str, Any]) -> Key | None:
    """Returns a key for signatures; None if it is something else, or not valid."""
    from joserfc.errors import JoseError
    from joserfc.jwk import JWKRegistry

    if str(jwk.get("kty")) not in ALGORITHMS or jwk.get("use", "sig") != "sig":
        return None
    public = {name: value for name, value in jwk.items() if name in ("kty", "n", "e", "crv", "x", "y", "kid")}
    try:
        if jwk["kty"] == "RSA" and _bits(jwk) not in _RSA_BITS:
            return None
        return JWKRegistry.import_key(public)
    except (JoseError, ValueError, TypeError, KeyError):
        return None


def _bits(jwk: Mapping[str, Any]) -> int:
    """Returns the size of an RSA key, before anything is computed with it."""
    modulus = str(jwk["n"])
    return int.from_bytes(base64.urlsafe_b64decode(modulus + "=" * (-len(modulus) % 4)), "big").bit_length()


def verified(token: str, keys: Mapping[str, Key]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns header and claims of a token signed by one of the keys.

    Raises UnknownKeyError if the keys lack the token's, and SignInError if the signature is not valid.
    """
    from joserfc import jws, jwt
    from joserfc.errors import JoseError

    try:
        header = dict(jws.extract_compact(token.encode()).headers())
        key = keys.get(str(header.get("kid", ""))) or _only(keys, header)
        if key is None:
            raise UnknownKeyError(f"the provider's key set has no key {str(header.get('kid', ''))[:80]!r}")
        made = jwt.decode(token, key, algorithms=list(ALGORITHMS[key.key_type]))
    except (JoseError, ValueError, TypeError, RecursionError) as exc:
        raise SignInError(f"the ID token is not signed by the provider: {exc}") from exc
    return dict(made.header), dict(made.claims)


def _only(keys: Mapping[str, Key], header: Mapping[str, Any]) -> Key | None:
    """Returns the only key there is, for a token that names none."""
    return next(iter(keys.values())) if len(keys) == 1 and "kid" not in header else None


class UnknownKeyError(SignInError):
    """The key is not in the set: the provider may have new ones."""
