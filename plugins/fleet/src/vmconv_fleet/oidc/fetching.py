"""HTTPS requests to the provider, which may be hostile: no redirects, bounded in size and time."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Mapping
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from vmconv_fleet.deadline import Deadline, TimedConnection
from vmconv_fleet.errors import FleetError
from vmconv_fleet.resolving import Resolver

MAX_ANSWER = 256 << 10
CONNECT_S = 5.0
SECONDS = 10.0
"""Time for one request in all."""


_RESOLVER = Resolver()


class SignInError(FleetError):
    """A person cannot sign in: the provider's fault, or the person's."""


class Fetcher:
    """Requests over TLS; `ca` is the file to trust, the system's if empty."""

    def __init__(self, ca: str) -> None:
        try:
            self._context = ssl.create_default_context(cafile=ca or None)
        except (OSError, ssl.SSLError) as exc:
            raise SignInError(f"{ca}: cannot be read as certificates: {exc}") from exc

    def get(self, url: str) -> dict[str, Any]:
        return self._json("GET", url, None, {})

    def post(self, url: str, body: str, headers: Mapping[str, str]) -> dict[str, Any]:
        """Sends a form. The answer to a refused one is an object too, with `error`."""
        return self._json("POST", url, body, {"Content-Type": "application/x-www-form-urlencoded", **headers})

    def _json(self, method: str, url: str, body: str | None, headers: Mapping[str, str]) -> dict[str, Any]:
        """Returns the object in the answer. Raises SignInError for any other answer."""
        status, data = self._send(method, url, body, {"Accept": "application/json", **headers})
        # RFC 6749, 5.2: an error of the token endpoint.
        if status != 200 and not (method == "POST" and status in (400, 401)):
            raise SignInError(f"{url}: the provider answers with status {status}")
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as exc:
            raise SignInError(f"{url}: the provider's answer is no JSON") from exc
        if not isinstance(found, dict):
            raise SignInError(f"{url}: the provider's answer is no object")
        return found

    def _send(self, method: str, url: str, body: str | None, headers: Mapping[str, str]) -> tuple[int, bytes]:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 443
        deadline = Deadline(SECONDS)
        connection = http.client.HTTPSConnection(host, port, context=self._context)
        try:
            with closing(connection), self._connected(host, port, deadline) as connected:
                connection.sock = TimedConnection(connected, deadline)
                path = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
                connection.request(method, path, body, dict(headers))
                response = connection.getresponse()
                data = response.read(MAX_ANSWER + 1)
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise SignInError(f"{parts.netloc}: the provider cannot be asked: {exc}") from exc
        if len(data) > MAX_ANSWER:
            raise SignInError(f"{url}: the provider's answer has more than {MAX_ANSWER} bytes")
        return response.status, data

    def _connected(self, host: str, port: int, deadline: Deadline) -> ssl.SSLSocket:
        """Returns a connection to the first address that answers."""
        error = OSError(f"{host} has no address")
        for *_, address in _RESOLVER.addresses(host, port, within=deadline.left(CONNECT_S)):
            seconds = deadline.left(CONNECT_S)
            try:
                plain = socket.create_connection((str(address[0]), port), timeout=seconds)
            except OSError as exc:
                error = exc
                continue
            plain.settimeout(deadline.left())
            return self._context.wrap_socket(plain, server_hostname=host)
        raise error
