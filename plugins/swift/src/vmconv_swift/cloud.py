"""A cloud by its name: the address of its object store, and tokens for it.

openstacksdk reads what OpenStack's own client reads: clouds.yaml, secure.yaml, and the variables OS_*. A token that is
there already needs none of that: OS_STORAGE_URL and OS_AUTH_TOKEN are what `swift auth` prints.
"""

from __future__ import annotations

import os
import re
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from vmconv.plugin import AccessError, Connections, Place, UsageError, parse_url

if TYPE_CHECKING:
    import ssl

ENVIRONMENT = "-"
"""The name of the cloud that the environment describes."""
SILENCE = 60
"""Seconds that the store may send nothing, or take nothing."""


class _Access(NamedTuple):
    """How the store is reached: a token, or a session that gets tokens; and how its certificate is verified.

    `authority` names a file with certificates; empty for those that Python knows, None for no verification. `own` are
    the files of a certificate that the store asks for, and its key.
    """

    address: str
    token: str
    session: Any
    authority: str | None
    own: tuple[str, str | None] | None


class Cloud:
    """Access to the object store of one cloud.

    `endpoint` is the URL of its account, without a slash at its end, and `place` the same. `connections` are to the
    store, and kept until `close`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        given, token = (os.environ.get(f"OS_{what}", "") for what in ("STORAGE_URL", "AUTH_TOKEN"))
        ready = name == ENVIRONMENT and given and token
        self._access = access = (
            _Access(given, token, None, os.environ.get("OS_CACERT", ""), None) if ready else _signed_in(name)
        )
        if not access.address:
            raise AccessError(f"swift://{name}: the cloud has no object store")
        if access.authority is None:
            raise UsageError(
                f"swift://{name}: verify is false", hint="name the authority's certificate as cacert in clouds.yaml"
            )
        self.endpoint = _address(name, access.address.rstrip("/"))
        self.place = Place.of(parse_url(self.endpoint))
        self.connections = Connections(f"swift://{name}", self.context(), silence=SILENCE)

    def token(self) -> str:
        """Returns a token, a new one if the last has expired. Raises `ConnectionError` if another try may help."""
        found = self._access.token if self._access.session is None else self._new_token()
        if not re.fullmatch("[!-~]*", found):
            raise AccessError(f"swift://{self.name}: the token has other characters than a header may have")
        return found

    def _new_token(self) -> str:
        from keystoneauth1 import exceptions

        try:
            return str(self._access.session.get_token() or "")
        except exceptions.SSLError as exc:
            raise AccessError(f"swift://{self.name}: {_short(exc)}") from exc
        except (exceptions.ConnectionError, exceptions.HttpServerError) as exc:
            raise ConnectionError(_short(exc)) from exc
        except exceptions.ClientException as exc:
            raise AccessError(f"swift://{self.name}: {_short(exc)}") from exc

    def renew(self) -> bool:
        """Forgets the token, so that the next is a new one; False if there can be no other."""
        if self._access.session is None:
            return False
        # That there is no token to forget means that another thread was first.
        self._access.session.invalidate()
        return True

    def context(self) -> ssl.SSLContext | None:
        """Returns how to verify the store's certificate; None for the default."""
        authority, own = self._access.authority, self._access.own
        if not authority and not own:
            return None
        import ssl

        try:
            made = ssl.create_default_context(cafile=authority or None)
        except OSError as exc:
            raise UsageError(f"{authority}: cannot be read as certificates: {exc}") from exc
        if own:
            try:
                # OpenSSL would ask the terminal for the passphrase of a key.
                made.load_cert_chain(*own, password=lambda: "")
            except OSError as exc:
                raise UsageError(f"{own[0]}: cannot be read as a certificate with its key: {exc}") from exc
        return made

    def close(self) -> None:
        self.connections.close()


def _signed_in(name: str) -> _Access:
    """Returns a session with a cloud, and the address of its object store, empty if it has none."""
    with warnings.catch_warnings():
        # The library warns of what it does not use here.
        warnings.simplefilter("ignore")
        from keystoneauth1.exceptions import ClientException
        from openstack.config import OpenStackConfig
        from openstack.exceptions import SDKException

        try:
            region = OpenStackConfig().get_one(cloud=None if name == ENVIRONMENT else name)
            session: Any = region.get_session()
            address = str(region.get_session_endpoint("object-store") or "")
        except (ClientException, SDKException) as exc:
            raise AccessError(f"swift://{name}: {_short(exc)}") from exc
    authority = {True: "", False: None}.get(session.verify, session.verify)
    own = (session.cert, None) if isinstance(session.cert, str) else session.cert
    return _Access(address, "", session, authority, own)


def _short(exc: Exception) -> str:
    return " ".join(str(exc).split())[:300]


def _address(name: str, endpoint: str) -> str:
    url = parse_url(endpoint)
    if url.scheme not in ("http", "https") or not url.host or url.query or url.user:
        raise AccessError(f"swift://{name}: {url.shown} is not the address of an object store")
    return endpoint


@cache
def cloud_of(name: str) -> Cloud:
    """Returns the session with a cloud, one for the whole process."""
    return Cloud(name)
