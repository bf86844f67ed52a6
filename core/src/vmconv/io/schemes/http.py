"""Reads an object by ranges of HTTP (RFC 9110, section 14). The server is not trusted.

Each answer has to be the range that was asked for, of the size and the version of the first answer; anything else is an
error. A request that fails on the way is repeated from where it ended, a bounded number of times.
"""

from __future__ import annotations

import io
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import TYPE_CHECKING, NamedTuple

from vmconv.errors import AccessError, ReadError, UsageError
from vmconv.interface.scheme import Remote, parse_url
from vmconv.io.remote import BLOCK

if TYPE_CHECKING:
    import ssl
    from typing import Any

    from vmconv.interface.scheme import Url

    Sign = Callable[["Place", Mapping[str, str]], Mapping[str, str]]
    """Returns the headers of a request to a place, with those that sign it."""

MAX_SIZE = 1 << 62
"""Bytes of an object."""
MAX_REDIRECTS = 5
TRIES = 5
"""Requests for one range before it is an error."""
_SHORT, _MOST_SHORT = 64 << 10, 64
"""Answers of fewer bytes, to requests for more, before it is an error."""

SILENCE = 30.0
"""Seconds that a server may send nothing."""
SLOWEST = 16 << 10
"""Bytes per second that an answer needs, after its first `SILENCE` seconds."""
PAUSE = 0.5
"""Seconds before the first retry; doubled for each further one."""
_LONGEST_PAUSE = 30.0
"""Seconds that a server may ask to wait for."""

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
# RFC 9110, section 14.4.
_CONTENT_RANGE = re.compile(r"bytes (?:([0-9]{1,19})-([0-9]{1,19})|\*)/([0-9]{1,19})")
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
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @classmethod
    def of(cls, url: Url) -> Place:
        from urllib.parse import quote

        host = url.bare_host.encode("idna").decode() if not url.bare_host.isascii() else url.bare_host
        path = quote(url.path or "/", safe=_SAFE)
        query = f"?{quote(url.query, safe=_SAFE)}" if url.query else ""
        return cls(url.scheme, host.lower(), url.port or _PORTS[url.scheme], path + query)


class _Version(NamedTuple):
    """What tells versions of an object apart; empty where the server says nothing."""

    etag: str
    modified: str
    size: int

    def conditions(self) -> dict[str, str]:
        """Returns the headers that make a server refuse another version."""
        # If-Match compares strongly (RFC 9110, section 13.1.1): a weak tag would never match.
        if self.etag and not self.etag.startswith("W/"):
            return {"If-Match": self.etag}
        return {"If-Unmodified-Since": self.modified} if self.modified else {}


class _RetryableError(Exception):
    """A request failed in a way that another may not; waits `pause` seconds at least."""

    def __init__(self, what: str, pause: float = 0.0) -> None:
        super().__init__(what)
        self.pause = pause


class HttpObject(Remote):
    """The object at a URL. `sign` adds the headers that authorize a request; they go to no other host.

    Opening it asks for the first block, which tells size and version, unless `seen` are the headers of an answer to
    HEAD. `renew` gets new credentials, once per request, if the server says that they do not hold (401). `context`
    verifies the server, by default as Python does.
    """

    def __init__(
        self,
        url: Url,
        *,
        place: Place | None = None,
        sign: Sign | None = None,
        renew: Callable[[], object] | None = None,
        context: ssl.SSLContext | None = None,
        seen: Mapping[str, str] | None = None,
    ) -> None:
        if not url.host:
            raise UsageError(f"{url.shown}: has no host")
        self.shown = url.shown
        self._sign, self._renew = sign, renew
        self._credentials = _basic(url)
        self._named = self._at = place or Place.of(url)
        self._pool = _Pool(url.shown, context)
        self._version: _Version | None = None
        self.size = BLOCK
        if seen is not None:
            self.size = int(seen["Content-Length"])
            self._version = _Version(seen.get("ETag") or "", seen.get("Last-Modified") or "", self.size)
            return
        try:
            head = bytearray(BLOCK)
            done = self._read(0, memoryview(head))
            self.head = bytes(head[:done])
            self.version = self._stated_version()
        except BaseException:
            self._pool.close()
            raise

    @property
    def etag(self) -> str:
        """The entity tag of the version that was opened, without its quotes; empty if the server states none."""
        return self._version.etag.strip('"') if self._version else ""

    def _stated_version(self) -> str:
        return f"{self._version.etag} {self._version.modified}" if self._version else ""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._read(offset, buffer)

    def close(self) -> None:
        self._pool.close()

    def _read(self, offset: int, buffer: memoryview) -> int:
        """Fills the buffer and returns the bytes; fewer only at the end of the object, by the first request."""
        done, tries, short = 0, 0, 0
        while done < len(buffer):
            try:
                step = self._fetch(offset + done, buffer[done:])
                done += step
                short += step < _SHORT
            except _RetryableError as again:
                tries += 1
                if tries >= TRIES:
                    raise ReadError(f"{self.shown}: cannot be read at {offset + done:#x}: {again}") from again
                # The place that a redirect led to may be gone by now.
                self._at = self._named
                time.sleep(min(_LONGEST_PAUSE, max(again.pause, PAUSE * 2 ** (tries - 1))))
            if self._version and offset + done >= self._version.size:
                break
            if short > _MOST_SHORT:
                raise ReadError(f"{self.shown}: cannot be read at {offset + done:#x}: answers end after a few bytes")
        return done

    def _fetch(self, offset: int, buffer: memoryview) -> int:
        """Requests one range; returns the bytes that came, at least one. Raises `_RetryableError` if none did."""
        connection, answer = self._answer(offset, len(buffer))
        done, whole, why = 0, False, "the answer ends too early"
        try:
            length = self._expected(answer, offset, len(buffer))
            while done < length:
                step = answer.readinto(buffer[done:length])
                if not step:
                    break
                done += step
            # Only after a whole answer does the connection begin with another one.
            whole = done == length and not answer.will_close and not answer.read(1)
        except (OSError, HTTPException) as exc:
            why = _said(exc)
        finally:
            if whole:
                self._pool.put(connection)
            else:
                connection.close()
        if not done:
            raise _RetryableError(why)
        return done

    def _answer(self, offset: int, length: int) -> tuple[_Connection, HTTPResponse]:
        """Returns the answer to a request for a range, after redirects, and its connection."""
        headers = {
            "Range": f"bytes={offset}-{offset + length - 1}",
            "Accept-Encoding": "identity",
            "User-Agent": "vmconv",
            **(self._version.conditions() if self._version else {}),
        }
        renew = self._renew
        for _ in range(MAX_REDIRECTS + 1):
            place = self._at
            connection = self._pool.take(place)
            try:
                answer = connection.ask(place, self._signed(place, headers), length)
            except (OSError, HTTPException) as exc:
                connection.close()
                self._refuse_unreachable(exc)
                raise _RetryableError(_said(exc)) from exc
            if answer.status == 206:
                return connection, answer
            connection.close()
            if answer.status == 401 and renew:
                renew()
                renew = None
            elif answer.status in _REDIRECTS:
                self._at = self._redirected(place, answer)
            else:
                self._refuse(answer, place, offset)
        raise AccessError(f"{self.shown}: more than {MAX_REDIRECTS} redirects")

    def _signed(self, place: Place, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Returns the headers of a request, with credentials for the host that the user named only."""
        if place.origin != self._named.origin:
            return headers
        if self._sign:
            return self._sign(place, headers)
        return {**headers, "Authorization": self._credentials} if self._credentials else headers

    def _redirected(self, place: Place, answer: HTTPResponse) -> Place:
        from urllib.parse import urljoin

        location = answer.headers.get("Location") or ""
        if not location:
            raise AccessError(f"{self.shown}: redirects to nowhere ({answer.status})", hint=_other_region(answer))
        try:
            host = f"[{place.host}]" if ":" in place.host else place.host
            url = parse_url(urljoin(f"{place.scheme}://{host}:{place.port}{place.target}", location).partition("#")[0])
        except (UsageError, ValueError) as exc:
            raise AccessError(f"{self.shown}: redirects to {location[:200]!r}, which is no URL") from exc
        if url.scheme not in _PORTS or not url.host:
            raise AccessError(f"{self.shown}: redirects to {url.shown}, which is not of HTTP")
        if place.scheme == "https" and url.scheme != "https":
            raise AccessError(
                f"{self.shown}: redirects to {url.shown}, which is not encrypted", hint="name that URL if you trust it"
            )
        return Place.of(url)

    def _refuse_unreachable(self, exc: Exception) -> None:
        """Raises an error if trying again is of no use."""
        import ssl

        if self._version is None and isinstance(exc, (socket.gaierror, ConnectionRefusedError)):
            raise ReadError(f"{self.shown}: cannot be reached: {_said(exc)}") from exc
        if isinstance(exc, ssl.SSLCertVerificationError):
            hint = "SSL_CERT_FILE names a file with the certificates of other authorities"
            raise AccessError(f"{self.shown}: its certificate is refused: {exc.verify_message}", hint=hint) from exc

    def _refuse(self, answer: HTTPResponse, place: Place, offset: int) -> None:
        """Raises the error of an answer without the range."""
        status = f"{answer.status} {answer.reason[:80]}".rstrip()
        if answer.status == 200:
            raise AccessError(
                f"{self.shown}: its server sends no ranges",
                hint="read it as a stream: curl URL | vmconv convert - TARGET, or download it first",
            )
        if answer.status in _BUSY:
            asked = answer.headers.get("Retry-After") or ""
            raise _RetryableError(
                f"the server answers {status}", float(asked) if re.fullmatch(r"[0-9]{1,4}", asked) else 0.0
            )
        if self._version and answer.status in (412, 416):
            raise self._changed(f"the server answers {status}")
        if answer.status == 416 and (found := _content_range(answer)) and found[2] == 0:
            raise AccessError(f"{self.shown}: is empty")
        # A place that a redirect led to may have expired.
        if self._version and place != self._named:
            raise _RetryableError(f"the server answers {status}")
        where = f" at {offset:#x}" if self._version else ""
        said = f"{self.shown}: cannot be read{where}: the server answers {status}"
        raise AccessError(said, hint=_other_region(answer))

    def _expected(self, answer: HTTPResponse, offset: int, length: int) -> int:
        """Returns the bytes that an answer has; raises an error unless they are those that were asked for."""
        found = _content_range(answer)
        said = (answer.headers.get("Content-Range") or answer.headers.get("Content-Type") or "nothing")[:100]
        if found is None or found[0] != offset or found[2] > MAX_SIZE:
            raise ReadError(f"{self.shown}: asked for {length} bytes from {offset:#x}, the server sends {said!r}")
        version = _Version(answer.headers.get("ETag") or "", answer.headers.get("Last-Modified") or "", found[2])
        if self._version is None:
            self._version, self.size = version, version.size
        elif version != self._version:
            raise self._changed(_difference(self._version, version))
        end = min(offset + length, self.size)
        if found[1] != end - 1:
            raise ReadError(f"{self.shown}: asked for {length} bytes from {offset:#x}, the server sends {said!r}")
        stated = answer.headers.get("Content-Length")
        if stated is not None and stated != str(end - offset):
            raise ReadError(f"{self.shown}: Content-Length {stated[:40]} for {end - offset} bytes from {offset:#x}")
        encoding = answer.headers.get("Content-Encoding") or "identity"
        if encoding != "identity":
            raise ReadError(
                f"{self.shown}: the server sends Content-Encoding {encoding[:40]!r}, which was not asked for"
            )
        return end - offset

    def _changed(self, how: str) -> AccessError:
        return AccessError(
            f"{self.shown}: changed while it was being read: {how}", hint="try again when nobody writes to it"
        )


def _other_region(answer: HTTPResponse) -> str | None:
    """Returns the hint of S3 for a bucket in another region."""
    region = answer.headers.get("x-amz-bucket-region") or ""
    return f"the bucket is in {region}: AWS_REGION={region}" if re.fullmatch(r"[a-z0-9-]{1,32}", region) else None


def _content_range(answer: HTTPResponse) -> tuple[int, int, int] | None:
    """Returns first and last byte of an answer and the object's size; -1 for bytes that it does not have."""
    found = _CONTENT_RANGE.fullmatch((answer.headers.get("Content-Range") or "").strip())
    return (int(found[1] or -1), int(found[2] or -1), int(found[3])) if found else None


def _difference(old: _Version, new: _Version) -> str:
    names = {"etag": "ETag", "modified": "Last-Modified", "size": "size"}
    name = next(name for name in old._fields if getattr(old, name) != getattr(new, name))
    before, after = (str(getattr(each, name))[:100] or "none" for each in (old, new))
    return f"{names[name]} was {before}, is {after}"


def _basic(url: Url) -> str:
    """Returns the Authorization header of a URL with a user (RFC 7617), empty for one without."""
    if not (url.user or url.password):
        return ""
    from base64 import b64encode
    from urllib.parse import unquote_to_bytes

    return "Basic " + b64encode(unquote_to_bytes(url.user) + b":" + unquote_to_bytes(url.password)).decode()


def _said(exc: Exception) -> str:
    if isinstance(exc, TimeoutError):
        return "the server is silent, or too slow"
    text = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
    return " ".join(text.split())[:200] or type(exc).__name__


# -- connections


class _Timed(io.RawIOBase):
    """The bytes of a socket, until a deadline. Each byte of a slow server would otherwise reset the time-out."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._socket = connection
        self._stream: Any = connection.makefile("rb", buffering=0)
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(min(SILENCE, left))
        count: int = self._stream.readinto(buffer)
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Answer(HTTPResponse):
    """An answer that is read until a deadline."""

    def __init__(self, deadline: float, connection: socket.socket, *args: Any, **named: Any) -> None:
        super().__init__(connection, *args, **named)
        self.fp.close()
        self.fp = io.BufferedReader(_Timed(connection, deadline))


class _Connection:
    """A connection to one place, perhaps through a proxy."""

    def __init__(self, place: Place, context: ssl.SSLContext | None, proxy: Url | None) -> None:
        self.place = place
        self.used = False
        self._whole = proxy is not None and place.scheme == "http"
        host, port = (proxy.bare_host, proxy.port or 80) if proxy else (place.host, place.port)
        self._headers = {"Proxy-Authorization": _basic(proxy)} if proxy and _basic(proxy) else {}
        if place.scheme == "https":
            self._http: HTTPConnection = HTTPSConnection(host, port, timeout=SILENCE, context=context)
            if proxy:
                self._http.set_tunnel(place.host, place.port, self._headers)
        else:
            self._http = HTTPConnection(host, port, timeout=SILENCE)

    def ask(self, place: Place, headers: Mapping[str, str], length: int) -> HTTPResponse:
        """Sends a request and returns its answer, of which only the head has been read."""
        self._http.response_class = partial(_Answer, time.monotonic() + 2 * SILENCE + length / SLOWEST)  # type: ignore[assignment]
        target = f"http://{place.authority}{place.target}" if self._whole else place.target
        sent = {**headers, **(self._headers if self._whole else {})}
        if "Host" not in sent:
            sent["Host"] = place.authority
        used, self.used = self.used, True
        try:
            self._http.request("GET", target, headers=sent)
            return self._http.getresponse()
        except (OSError, HTTPException) as exc:
            # A server closes idle connections when it likes.
            if not used or isinstance(exc, TimeoutError):
                raise
            self._http.close()
            self._http.request("GET", target, headers=sent)
            return self._http.getresponse()

    def close(self) -> None:
        self._http.close()


class _Pool:
    """Idle connections; each is used by one thread at a time."""

    def __init__(self, shown: str, context: ssl.SSLContext | None) -> None:
        self._shown = shown
        self._idle: list[_Connection] = []
        self._lock = threading.Lock()
        self._context = context
        self._closed = False

    def take(self, place: Place) -> _Connection:
        with self._lock:
            for connection in self._idle:
                if connection.place.origin == place.origin:
                    self._idle.remove(connection)
                    return connection
            if place.scheme == "https" and self._context is None:
                import ssl

                self._context = ssl.create_default_context()
            return _Connection(place, self._context, self._proxy(place))

    def _proxy(self, place: Place) -> Url | None:
        """Returns the proxy that the environment names for a place."""
        from urllib.request import getproxies, proxy_bypass

        named = getproxies().get(place.scheme)
        if not named or proxy_bypass(place.host):
            return None
        proxy = parse_url(named if "://" in named else f"http://{named}")
        if proxy.scheme != "http":
            raise UsageError(f"{proxy.shown}: a proxy of {self._shown} has to be of http")
        return proxy

    def put(self, connection: _Connection) -> None:
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
