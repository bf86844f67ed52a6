"""One delivery of a webhook: signed by the convention of Standard Webhooks, sent once, not redirected.

https://github.com/standard-webhooks/standard-webhooks: the signature is HMAC-SHA256 over `ID.TIMESTAMP.BODY`.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import re
import secrets
import socket
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime
from typing import Any
from urllib.parse import SplitResult, urlsplit

from vmconv.plugin import UsageError, printable
from vmconv_fleet.deadline import Deadline, TimedConnection
from vmconv_fleet.errors import FleetError
from vmconv_fleet.notices.addresses import ForbiddenAddressError, Network, places_of
from vmconv_fleet.notices.event import Event

PREFIX = "whsec_"
SECRET_BYTES = (24, 64)
CONNECT_S = 5.0
DELIVER_S = 15.0
"""Time for one delivery in all; the receiver answers first and works later."""
MAX_ADDRESSES = 4
"""Addresses of a receiver that are tried."""
MAX_URL = 1000

_HOST = re.compile(r"[A-Za-z0-9.:_-]+")


class DeliveryError(FleetError):
    """A receiver has not accepted an event."""


def new_secret() -> str:
    return PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def key_of(secret: str) -> bytes:
    """Returns the key of a secret. Raises UsageError if the secret is not valid."""
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True) if secret.startswith(PREFIX) else b""
    except (binascii.Error, ValueError):
        key = b""
    least, most = SECRET_BYTES
    if not least <= len(key) <= most:
        raise UsageError(f"this is not the secret of a webhook: {PREFIX} and {least} to {most} bytes in base64")
    return key


def signature(key: bytes, identifier: str, timestamp: int, body: bytes) -> str:
    signed = b"%s.%d.%s" % (identifier.encode(), timestamp, body)
    return "v1," + base64.b64encode(hmac.digest(key, signed, "sha256")).decode()


def parsed(url: str, *, allow_http: bool) -> SplitResult:
    """Returns the parts of a webhook's URL. Raises UsageError, which does not show the URL: it may have a secret."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise UsageError(f"the URL of the webhook is not valid: {exc}") from exc
    if not url.isascii() or not url.isprintable() or " " in url or len(url) > MAX_URL:
        raise UsageError(f"the URL of the webhook has other characters than visible ASCII, or more than {MAX_URL}")
    if parts.scheme not in ("https", "http") or not parts.hostname or port == 0 or not _HOST.fullmatch(parts.hostname):
        raise UsageError("the URL of the webhook is not https://HOST[:PORT]/PATH")
    if parts.scheme == "http" and not allow_http:
        raise UsageError("http is not encrypted: everybody on the way reads the events", hint="--allow-http")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise UsageError("the URL of the webhook has a user, a password or a fragment")
    return parts


def place_in(parts: SplitResult) -> str:
    """Returns what may be shown of a URL: its scheme, host and port. The path may have a secret."""
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port else "")


def body_of(event: Event) -> bytes:
    at = datetime.fromtimestamp(event.at_ms / 1000, UTC).isoformat(timespec="milliseconds")
    return json.dumps({"type": event.type, "timestamp": at.replace("+00:00", "Z"), "data": event.data}).encode()


class Delivery:
    """Delivers bodies to receivers, one at a time; `abort` ends the running one."""

    def __init__(self, allowed: Sequence[Network] = (), ca: str | None = None) -> None:
        self._allowed = allowed
        self._ca = ca
        self._socket: socket.socket | None = None
        self._aborted = False

    def abort(self) -> None:
        self._aborted = True
        self._shut_down()

    def send(self, url: str, secret: str, identifier: str, body: bytes) -> None:
        """Returns once the receiver has accepted the event. Raises DeliveryError otherwise."""
        parts = urlsplit(url)
        timestamp = int(time.time())
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "vmconv-fleet",
            "webhook-id": identifier,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(key_of(secret), identifier, timestamp, body),
        }
        import http.client

        try:
            status = self._post(parts, headers, body)
        except ForbiddenAddressError as exc:
            raise DeliveryError(str(exc), hint=exc.hint) from exc
        except (OSError, http.client.HTTPException, UnicodeError) as exc:
            raise DeliveryError(printable(str(getattr(exc, "strerror", None) or exc) or type(exc).__name__)) from exc
        if not 200 <= status < 300:
            raise DeliveryError(f"status {status}" + (", a redirect" if 300 <= status < 400 else ""))

    def _post(self, parts: SplitResult, headers: dict[str, str], body: bytes) -> int:
        import http.client

        host = parts.hostname or ""
        port = parts.port or (443 if parts.scheme == "https" else 80)
        # A receiver that sends a byte now and then must not hold the others up.
        deadline = Deadline(DELIVER_S)
        connection = http.client.HTTPConnection(host, port)
        with closing(connection), self._connected(host, port, deadline, secure=parts.scheme == "https") as connected:
            connection.sock = TimedConnection(connected, deadline)
            self._refuse_if_aborted()
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            try:
                connection.request("POST", target, body, headers)
                return connection.getresponse().status
            finally:
                self._socket = None

    def _connected(self, host: str, port: int, deadline: Deadline, *, secure: bool) -> socket.socket:
        """Returns a connection to the first permitted address that answers."""
        error: OSError = OSError(f"{host} has no address")
        for place in places_of(host, port, self._allowed, within=deadline.left(CONNECT_S))[:MAX_ADDRESSES]:
            self._refuse_if_aborted()
            seconds = deadline.left(CONNECT_S)
            plain = self._socket = socket.socket(place.family, socket.SOCK_STREAM)
            try:
                plain.settimeout(seconds)
                plain.connect(place.address)
                plain.settimeout(deadline.left(CONNECT_S))
                self._socket = connected = self._secured(plain, host) if secure else plain
                return connected
            except OSError as exc:
                plain.close()
                error = exc
        raise error

    def _refuse_if_aborted(self) -> None:
        if self._aborted:
            raise DeliveryError("the node ends")

    def _secured(self, plain: socket.socket, host: str) -> socket.socket:
        import ssl

        return ssl.create_default_context(cafile=self._ca).wrap_socket(plain, server_hostname=host)

    def _shut_down(self) -> None:
        running: Any = self._socket
        if running is not None:
            # Not SSLSocket's own, which changes the state that the other thread uses.
            with suppress(OSError, ValueError):
                socket.socket.shutdown(running, socket.SHUT_RDWR)
