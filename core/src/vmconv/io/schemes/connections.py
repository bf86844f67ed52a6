"""Connections to servers of HTTP, kept while they are idle. No server can hold a request up for ever."""

from __future__ import annotations

import io
import re
import select
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import TYPE_CHECKING, NamedTuple

from vmconv.errors import UsageError
from vmconv.interface.scheme import parse_url

if TYPE_CHECKING:
    import ssl
    from typing import Any

    from vmconv.interface.scheme import Url

SILENCE = 30.0
"""Seconds that a server may send nothing, or take nothing."""
SLOWEST = 16 << 10
"""Bytes per second that an answer needs, after its first two times `SILENCE` seconds."""

PORTS = {"http": 80, "https": 443}
_STEP = 1 << 20
"""Bytes of a body that are given to the system at once: a time-out is for each."""
_NO_BODY = (204, 304)
_SAFE_METHODS = frozenset({"GET", "HEAD"})
# What a path and a query may hold besides unreserved characters; "%" because they are encoded already.
_SAFE = "/%:@!$&'()*+,;=~?"


class Place(NamedTuple):
    """Where to send a request: `target` is path and query, encoded."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port

    @property
    def authority(self) -> str:
        """Host and port as the Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"

    @classmethod
    def of(cls, url: Url) -> Place:
        from urllib.parse import quote

        host = url.bare_host.encode("idna").decode() if not url.bare_host.isascii() else url.bare_host
        path = quote(url.path or "/", safe=_SAFE)
        query = f"?{quote(url.query, safe=_SAFE)}" if url.query else ""
        return cls(url.scheme, host.lower(), url.port or PORTS[url.scheme], path + query)


class Connections:
    """Idle connections, and new ones; thread-safe. A connection is used by one thread at a time.

    `shown` names in errors what is read. `context` verifies servers, by default as Python does. `silence` is the number
    of seconds that a server may send nothing, or take nothing, by default `SILENCE`.
    """

    def __init__(self, shown: str, context: ssl.SSLContext | None = None, *, silence: float = 0) -> None:
        self._shown, self._context, self._silence = shown, context, silence or SILENCE
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._closed = False

    def take(self, place: Place) -> Connection:
        """Returns a connection to the server of a place; give it back with `put`, or close it."""
        with self._lock:
            for connection in [each for each in self._idle if each.place.origin == place.origin]:
                self._idle.remove(connection)
                if not connection.is_dropped():
                    return connection
                connection.close()
            if place.scheme == "https" and self._context is None:
                import ssl

                self._context = ssl.create_default_context()
            return Connection(place, self._context, self._proxy(place), self._silence)

    def _proxy(self, place: Place) -> Url | None:
        """Returns the proxy that the environment names for a place."""
        from urllib.request import getproxies, proxy_bypass

        proxies = getproxies()
        named = proxies.get(place.scheme)
        if not named or proxy_bypass(place.host) or proxy_bypass(f"{place.host}:{place.port}"):
            return None
        if _is_in_network(place.host, proxies.get("no", "")):
            return None
        proxy = parse_url(named if "://" in named else f"http://{named}")
        if proxy.scheme != "http":
            raise UsageError(f"{proxy.shown}: a proxy of {self._shown} has to be of http")
        return proxy

    def put(self, connection: Connection) -> None:
        """Keeps a connection whose answer has been read to its end."""
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def __del__(self) -> None:
        # Some are kept as long as the process; Python would warn of each socket.
        self.close()


class Connection:
    """A connection to one place, perhaps through a proxy."""

    def __init__(self, place: Place, context: ssl.SSLContext | None, proxy: Url | None, silence: float) -> None:
        self.place = place
        self._used = False
        self._silence = silence
        self._whole = proxy is not None and place.scheme == "http"
        host, port = (proxy.bare_host, proxy.port or 80) if proxy else (place.host, place.port)
        self._headers = {"Proxy-Authorization": basic(proxy)} if proxy and basic(proxy) else {}
        if place.scheme == "https":
            self._http: HTTPConnection = HTTPSConnection(host, port, timeout=silence, context=context)
            if proxy:
                self._http.set_tunnel(place.host, place.port, self._headers)
        else:
            self._http = HTTPConnection(host, port, timeout=silence)

    def ask(
        self, place: Place, headers: Mapping[str, str], length: int, method: str = "GET", body: bytes = b""
    ) -> HTTPResponse:
        """Sends a request and returns its answer, of which only the head has been read.

        `length` is the number of bytes that the answer may have; more time than they need is not given. Raises
        `OSError` or `HTTPException`; a request that changes nothing is sent again if the server has closed an idle
        connection.
        """
        target = f"http://{place.authority}{place.target}" if self._whole else place.target
        sent = {**headers, **(self._headers if self._whole else {})}
        if "Host" not in sent:
            sent["Host"] = place.authority
        if method not in _SAFE_METHODS:
            sent["Content-Length"] = str(len(body))
        used, self._used = self._used, True
        try:
            return self._asked(method, target, sent, length, body)
        except (OSError, HTTPException) as exc:
            # A server closes idle connections when it likes.
            if not used or isinstance(exc, TimeoutError) or method not in _SAFE_METHODS:
                raise
            self._http.close()
            return self._asked(method, target, sent, length, body)

    def _asked(self, method: str, target: str, headers: Mapping[str, str], length: int, body: bytes) -> HTTPResponse:
        if self._http.sock is None:
            # The answer of a proxy that makes a tunnel has an end, too.
            self._http.response_class = self._until(0)
            self._http.connect()
        # Reading an answer has changed it.
        self._http.sock.settimeout(self._silence)
        try:
            self._http.request(method, target, body=_pieces(body) if body else None, headers=dict(headers))
        except (BrokenPipeError, ConnectionResetError):
            # A server may answer, and close, before it has all of a body.
            if not body:
                raise
        self._http.response_class = self._until(length)
        return self._http.getresponse()

    def _until(self, length: int) -> Any:
        """Returns how to make an answer of `length` bytes, which is read from now on."""
        return partial(_Answer, self._silence, time.monotonic() + 2 * self._silence + length / SLOWEST)

    def is_dropped(self) -> bool:
        """Whether an idle connection is of no use: its end, or bytes that nobody asked for, have arrived."""
        if self._http.sock is None:
            return False
        # TLS may have decrypted more than has been read.
        if getattr(self._http.sock, "pending", int)():
            return True
        poll = select.poll()
        poll.register(self._http.sock, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        self._http.close()


def _pieces(body: bytes) -> Iterator[memoryview]:
    view = memoryview(body)
    for at in range(0, len(view), _STEP):
        yield view[at : at + _STEP]


class _Timed(io.RawIOBase):
    """The bytes of a socket, until a deadline. Each byte of a slow server would otherwise reset the time-out."""

    def __init__(self, connection: socket.socket, silence: float, deadline: float) -> None:
        self._socket = connection
        self._stream: Any = connection.makefile("rb", buffering=0)
        self._silence, self._deadline = silence, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(min(self._silence, left))
        count: int = self._stream.readinto(buffer)
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Answer(HTTPResponse):
    """An answer that is read until a deadline, and whose end is clear (RFC 9112, section 6.3)."""

    def __init__(self, silence: float, deadline: float, connection: socket.socket, *args: Any, **named: Any) -> None:
        super().__init__(connection, *args, **named)
        self.fp.close()
        self.fp = io.BufferedReader(_Timed(connection, silence, deadline))

    def begin(self) -> None:
        super().begin()
        while 100 < self.status < 200 and self.status != HTTPStatus.SWITCHING_PROTOCOLS:
            # The answer itself is still to come.
            self.headers = None  # type: ignore[assignment]
            super().begin()
        if self.status < 200:
            raise HTTPException(f"the server answers {self.status}")
        lengths = {text.strip() for text in self.headers.get_all("Content-Length", [])}
        if len(lengths) > 1 or any(not re.fullmatch("[0-9]{1,19}", text) for text in lengths):
            raise HTTPException("the length of the answer is not clear")
        encoded = self.headers.get_all("Transfer-Encoding")
        if encoded and not self.chunked:
            raise HTTPException(f"the server sends Transfer-Encoding {', '.join(encoded)[:40]!r}")
        if encoded and (lengths or self.status in _NO_BODY):
            # Where the next answer begins may be seen in two ways.
            self.will_close = True
        if self.status in _NO_BODY:
            self.chunked, self.length = False, 0

    def _read_next_chunk_size(self) -> int:
        # Python reads to the end of the connection for a size of -1.
        size: int = super()._read_next_chunk_size()  # type: ignore[misc]
        if size < 0:
            raise ValueError
        return size


def _is_in_network(host: str, networks: str) -> bool:
    """Returns whether a host is an address in one of the networks, such as 10.0.0.0/8, of `no_proxy`."""
    from ipaddress import ip_address, ip_network

    for network in networks.split(","):
        # Other parts are names.
        with suppress(ValueError):
            if ip_address(host) in ip_network(network.strip(), strict=False):
                return True
    return False


def basic(url: Url) -> str:
    """Returns the Authorization header of a URL with a user (RFC 7617), empty for one without."""
    if not (url.user or url.password):
        return ""
    from base64 import b64encode
    from urllib.parse import unquote_to_bytes

    return "Basic " + b64encode(unquote_to_bytes(url.user) + b":" + unquote_to_bytes(url.password)).decode()


def failure(exc: Exception) -> str:
    """Returns what an error message says of a request that failed."""
    if isinstance(exc, TimeoutError):
        return "the server is silent, or too slow"
    text = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
    return " ".join(text.split())[:200] or type(exc).__name__
