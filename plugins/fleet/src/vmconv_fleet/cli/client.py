"""The client of a node's API: by the socket of a node on this machine, or over HTTPS with a token."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Self
from urllib.parse import urlencode, urlsplit

from vmconv.plugin import AccessError, UsageError, VmconvError

TOKEN = "VMCONV_FLEET_TOKEN"
"""Environment variable: the token for HTTPS."""

_PATIENCE = 330.0
_FIRST, _LATER = 100, 1000
"""The sizes of pages."""


class UnreachableError(VmconvError):
    """No node can be reached."""


class NotThereError(VmconvError):
    """The node does not know the object."""


class OlderNodeError(VmconvError):
    """The node runs an earlier version, which does not know the request."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the node runs an earlier version, which does not know {what}", hint="upgrade the node")


class Reply(NamedTuple):
    status: int
    content: Any


class _SocketConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class NodeClient:
    """The API of the node that `where` names: its directory, or a URL of HTTPS.

    `ca` is the certificate of the fleet's authority, for a URL. Each call opens a connection, because nodes close idle
    ones. Use as a context manager.
    """

    def __init__(self, where: str, *, ca: str | None = None, token: str | None = None) -> None:
        self.where = where
        self._headers = {"Accept": "application/json", "Connection": "close"}
        self._connection = self._connect(where, ca, token)

    def _connect(self, where: str, ca: str | None, token: str | None) -> http.client.HTTPConnection:
        """Returns the connection, which opens at its first use."""
        if "://" not in where:
            self._headers["X-Vmconv-User"] = _user()
            return _SocketConnection(os.path.join(where, "api.sock"), _PATIENCE)
        url = urlsplit(where)
        if url.scheme != "https" or not url.hostname:
            raise UsageError(f"{where}: is not a URL of https", hint="https://HOST:7449, or a node's directory")
        if not token:
            raise UsageError(f"{where}: a token is needed", hint=f"set {TOKEN}, or name a file with --token-file")
        self._headers["Authorization"] = f"Bearer {token}"
        import ssl

        context = ssl.create_default_context(cafile=ca)
        return http.client.HTTPSConnection(url.hostname, url.port or 7449, timeout=_PATIENCE, context=context)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._connection.close()

    def call(self, method: str, path: str, body: object = None, *, query: Mapping[str, Any] | None = None) -> Reply:
        """Returns the node's answer. Raises the error in the answer, or UnreachableError without one."""
        response = self._send(method, path, body, query)
        content = _content(response)
        if response.status in (200, 202) or (response.status == 409 and "request" in content):
            return Reply(response.status, content)
        raise _error(response.status, content)

    def get(self, path: str, **query: Any) -> Any:
        return self.call("GET", path, query={key: value for key, value in query.items() if value is not None}).content

    def everything(self, path: str, **query: Any) -> list[dict[str, Any]]:
        """Returns all items of a list."""
        return [item for page in self.pages(path, **query) for item in page]

    def pages(self, path: str, **query: Any) -> Iterator[list[dict[str, Any]]]:
        """Yields the items of a list page by page, a small page first."""
        after, limit = None, _FIRST
        while True:
            page = self.get(path, limit=limit, after=after, **query)
            yield page["items"]
            after, limit = page["next"], _LATER
            if after is None:
                return

    def lines(self, path: str, **query: Any) -> Iterator[str]:
        """Yields the lines of an answer as they arrive; it may have no end."""
        response = self._send("GET", path, None, query)
        if response.status != 200:
            raise _error(response.status, _content(response))
        if self._connection.sock:
            self._connection.sock.settimeout(None)
        for line in _lines(self.where, response):
            yield line.decode("utf-8", "replace")

    def _send(self, method: str, path: str, body: object, query: Mapping[str, Any] | None) -> http.client.HTTPResponse:
        data = None if body is None else json.dumps(body)
        headers = self._headers | ({} if data is None else {"Content-Type": "application/json"})
        target = path + (f"?{urlencode(query)}" if query else "")
        self._connection.close()
        try:
            self._connection.request(method, target, data, headers)
            return self._connection.getresponse()
        except (FileNotFoundError, ConnectionRefusedError) as exc:
            raise UnreachableError(
                f"{self.where}: no node runs here", hint="vmconv node run starts it; --node names another one"
            ) from exc
        except PermissionError as exc:
            raise AccessError(f"{self.where}: only the node's own user can open its socket") from exc
        except (OSError, http.client.HTTPException) as exc:
            raise UnreachableError(f"{self.where}: {exc}") from exc


def _lines(where: str, response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yields the lines of an answer. Raises UnreachableError if it is cut off."""
    rest = b""
    try:
        # http.client's own `readline` takes a lost connection for the end.
        while piece := response.read1(1 << 16):
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines
    except (OSError, http.client.HTTPException) as exc:
        raise UnreachableError(f"{where}: the answer has ended early") from exc
    if rest:
        yield rest


def _user() -> str:
    """Returns the name of the local user, for the history."""
    import pwd

    try:
        return os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"


def _content(response: http.client.HTTPResponse) -> Any:
    data = response.read()
    try:
        return json.loads(data)
    except ValueError:
        return {"error": data.decode("utf-8", "replace")[:200]}


def _error(status: int, content: Any) -> VmconvError:
    said = content if isinstance(content, dict) else {}
    if status in (404, 405) and "detail" in said:
        # A node's own answers have `error`; this one is of no route.
        return OlderNodeError("this request")
    message, hint = str(said.get("error", f"status {status}")), said.get("hint")
    kind: type[VmconvError] = {401: AccessError, 403: AccessError, 404: NotThereError, 422: UsageError}.get(
        status, VmconvError
    )
    return kind(message, hint=hint)
