"""A cloud by its name: the address of its object store, and tokens for it.

openstacksdk reads what OpenStack's own client reads: clouds.yaml, secure.yaml, and the variables OS_*. A token that is
there already needs none of that: OS_STORAGE_URL and OS_AUTH_TOKEN are what `swift auth` prints.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

from vmconv.plugin import AccessError, UsageError, parse_url

if TYPE_CHECKING:
    import ssl

ENVIRONMENT = "-"
"""The name of the cloud that the environment describes."""


class Cloud:
    """A session with one cloud; `endpoint` is the URL of its account, without a slash at its end."""

    def __init__(self, name: str) -> None:
        self.name = name
        given, token = (os.environ.get(f"OS_{what}", "") for what in ("STORAGE_URL", "AUTH_TOKEN"))
        ready = name == ENVIRONMENT and given and token
        self.session, address = _with_token(given, token) if ready else _signed_in(name)
        if not address:
            raise AccessError(f"swift://{name}: the cloud has no object store")
        self.endpoint = _address(name, address.rstrip("/"))
        if self.session.verify is False:
            raise UsageError(
                f"swift://{name}: verify is false", hint="name the authority's certificate as cacert in clouds.yaml"
            )

    def token(self) -> str:
        """Returns a token, a new one if the last has expired."""
        from keystoneauth1.exceptions import ClientException

        try:
            return str(self.session.get_token() or "")
        except ClientException as exc:
            raise AccessError(f"swift://{self.name}: {' '.join(str(exc).split())[:300]}") from exc

    def renew(self) -> None:
        """Forgets the token, so that the next is a new one."""
        self.session.invalidate()

    def context(self) -> ssl.SSLContext | None:
        """Returns how to verify the store's certificate; None for the default."""
        if self.session.verify is True:
            return None
        import ssl

        try:
            return ssl.create_default_context(cafile=str(self.session.verify))
        except OSError as exc:
            raise UsageError(f"{self.session.verify}: cannot be read as certificates: {exc}") from exc


def _with_token(address: str, token: str) -> tuple[Any, str]:
    """Returns a session with this token, and the address of the object store."""
    from keystoneauth1.session import Session
    from keystoneauth1.token_endpoint import Token

    return Session(Token(address, token), verify=os.environ.get("OS_CACERT") or True), address


def _signed_in(name: str) -> tuple[Any, str]:
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
            return session, str(region.get_session_endpoint("object-store") or "")
        except (ClientException, SDKException) as exc:
            raise AccessError(f"swift://{name}: {' '.join(str(exc).split())[:300]}") from exc


def _address(name: str, endpoint: str) -> str:
    url = parse_url(endpoint)
    if url.scheme not in ("http", "https") or not url.host or url.query or url.user:
        raise AccessError(f"swift://{name}: {url.shown} is not the address of an object store")
    return endpoint


@cache
def cloud_of(name: str) -> Cloud:
    """Returns the session with a cloud, one for the whole process."""
    return Cloud(name)
