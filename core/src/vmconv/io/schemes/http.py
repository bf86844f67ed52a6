"""Reads an object by ranges of HTTP (RFC 9110, section 14). The server is not trusted.

Each answer has to be the range that was asked for, of the size and the version of the first answer; anything else is an
error. A request that fails on the way is repeated from where it ended, a bounded number of times.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Mapping
from http.client import HTTPException, HTTPResponse
from typing import TYPE_CHECKING, NamedTuple

from vmconv.errors import AccessError, ReadError, UsageError
from vmconv.interface.scheme import Remote, parse_url
from vmconv.io.remote import BLOCK
from vmconv.io.schemes.connections import PORTS, Connection, Connections, Place, basic, failure

if TYPE_CHECKING:
    import ssl
    from email.message import Message

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

PAUSE = 0.5
"""Seconds before the first retry; doubled for each further one."""
_LONGEST_PAUSE = 30.0
"""Seconds that a server may ask to wait for."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
# RFC 9110, section 14.4.
_CONTENT_RANGE = re.compile(r"bytes (?:([0-9]{1,19})-([0-9]{1,19})|\*)/([0-9]{1,19})")


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
        seen: Mapping[str, str] | Message | None = None,
    ) -> None:
        if not url.host:
            raise UsageError(f"{url.shown}: has no host")
        self.shown = url.shown
        self._sign, self._renew = sign, renew
        self._credentials = basic(url)
        self._named = self._at = place or Place.of(url)
        self._connections = Connections(url.shown, context)
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
            self._connections.close()
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
        self._connections.close()

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
            why = failure(exc)
        finally:
            if whole:
                self._connections.put(connection)
            else:
                connection.close()
        if not done:
            raise _RetryableError(why)
        return done

    def _answer(self, offset: int, length: int) -> tuple[Connection, HTTPResponse]:
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
            connection = self._connections.take(place)
            try:
                answer = connection.ask(place, self._signed(place, headers), length)
            except (OSError, HTTPException) as exc:
                connection.close()
                self._refuse_unreachable(exc)
                raise _RetryableError(failure(exc)) from exc
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
        if url.scheme not in PORTS or not url.host:
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
            raise ReadError(f"{self.shown}: cannot be reached: {failure(exc)}") from exc
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
