"""Requests to one account of the object store (the Object Storage API v1). The store is not trusted with numbers."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from email.utils import parsedate_to_datetime
from functools import cache, cached_property
from hashlib import md5
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from vmconv.plugin import MAX_SIZE, AccessError, BackendError, ReadError
from vmconv_swift.cloud import cloud_of
from vmconv_swift.names import ObjectName

if TYPE_CHECKING:
    from email.message import Message

    from vmconv.plugin import Url
    from vmconv_swift.cloud import Cloud

Answered = TypeVar("Answered")

TRIES = 5
"""Requests before one that fails on the way is an error."""
PAUSE = 0.5
"""Seconds before the first retry; doubled for each further one."""
MAX_LISTING = 64 << 20
"""Bytes of one page of a listing."""
_PAGE = 10000
_WORDS = 64 << 10
"""Bytes of an answer that has nothing but words."""
_BUSY = frozenset({408, 429, 498, 500, 502, 503, 504})
_MARK = "X-Object-Meta-Vmconv"
_ETAG = re.compile(r'"?([0-9a-f]{32})"?')


class Found(NamedTuple):
    """An object of the store: ETag in hexadecimal, size in bytes, when it was last changed or touched.

    `large` is True for a static large object. `now` is the store's clock. Both times are seconds since 1970. `headers`
    are those of the answer.
    """

    etag: str
    size: int
    large: bool
    modified: float
    now: float
    headers: Message

    @property
    def expires(self) -> bool:
        """Whether the store will remove it at a time that was set."""
        return "X-Delete-At" in self.headers

    @property
    def mark(self) -> str:
        """What tells it from others of the same content; empty if nothing was stated when it was made."""
        return str(self.headers.get(_MARK) or "")


class Answer(NamedTuple):
    """An answer of the store; `cut` is True if its body was longer than what was read. `tries` is its number."""

    status: int
    reason: str
    headers: Message
    body: bytes
    cut: bool
    tries: int


class Entry(NamedTuple):
    """A row of a listing; `etag` is the one that the object itself has, also if it is a large one."""

    name: str
    size: int
    modified: float
    etag: str


class Sent(NamedTuple):
    """Bytes of bodies that were sent."""

    payload: int = 0
    metadata: int = 0


class Client:
    """Requests to one account; thread-safe. Names in errors are those of `swift://CLOUD/CONTAINER/OBJECT`.

    `requests` is the number of requests so far, with those of `SwiftObject`.
    """

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud
        self.sent = Sent()
        self.requests = 0
        self._lock = threading.Lock()
        self._last: tuple[Answer, float] | None = None
        """The last answer, and when it arrived."""

    def shown(self, where: ObjectName) -> str:
        return f"swift://{self.cloud.name}{where.path}"

    # -- objects

    def head(self, where: ObjectName, *, newest: bool = False) -> Found | None:
        """Returns what is known of an object; None if there is none. `newest` asks all of its replicas."""
        headers = {"X-Newest": "true"} if newest else {}
        answer = self._ask("HEAD", where.quoted, self.shown(where), headers=headers, good=(200, 204, 404))
        return None if answer.status == 404 else self._found(answer, where)

    def read(self, where: ObjectName, limit: int, query: str = "", *, newest: bool = False) -> bytes:
        """Returns the content of an object of at most `limit` bytes, or its manifest; see `head`."""
        headers = {"X-Newest": "true"} if newest else {}
        return self._ask("GET", where.quoted + query, self.shown(where), headers=headers, limit=limit).body

    def read_if_there(self, where: ObjectName, limit: int) -> bytes | None:
        """Returns what `read` does; None if there is no such object."""
        answer = self._ask("GET", where.quoted, self.shown(where), good=(200, 404), limit=limit)
        return None if answer.status == 404 else answer.body

    def read_range(self, where: ObjectName, etag: str, offset: int, length: int) -> bytes:
        """Returns a range of an object. Raises `ReadError` unless it has this ETag."""
        headers = {"Range": f"bytes={offset}-{offset + length - 1}", "If-Match": f'"{etag}"'}
        said = self.shown(where)
        answer = self._ask("GET", where.quoted, said, good=(206,), headers=headers, limit=length)
        if encoding := answer.headers.get("Content-Encoding"):
            # Who reads the published object over HTTP may decode it, and would have other bytes.
            raise ReadError(f"{said}: has the Content-Encoding {str(encoding)[:40]!r}")
        data = answer.body
        if len(data) != length:
            raise ReadError(f"{said}: asked for {length} bytes from {offset:#x}, the store sends {len(data)}")
        return data

    def put(self, where: ObjectName, body: bytes, *, etag: str | None = None, payload: bool = False) -> str:
        """Makes or replaces an object, and returns its ETag: its MD5, which the store has checked.

        `etag` is the MD5 that it should have, by default that of `body`. Raises `AccessError` if it has another.
        """
        etag = etag or md5(body, usedforsecurity=False).hexdigest()
        answer = self._ask("PUT", where.quoted, self.shown(where), body, {"Etag": etag}, (201, 422), payload=payload)
        if answer.status == 422:
            raise AccessError(
                f"{self.shown(where)}: the store received other bytes than those with the MD5 {etag}",
                hint="try again when nobody writes to the source",
            )
        if (stored := _etag(answer)) != etag:
            raise BackendError(f"{self.shown(where)}: the store has the MD5 {stored or 'of nothing'}, {etag} was sent")
        return etag

    def put_new(self, where: ObjectName, body: bytes) -> None:
        """Makes an object, unless there is one of this name."""
        self._ask("PUT", where.quoted, self.shown(where), body, {"If-None-Match": "*"}, (201, 412))

    def put_manifest(
        self,
        where: ObjectName,
        body: bytes,
        etag: str,
        size: int,
        *,
        new: bool = False,
        look: bool = True,
        mark: str = "",
    ) -> bool:
        """Makes a static large object; False if `new` and the name is taken.

        Raises `BackendError` unless the object has this ETag and size. Without `look` the caller looks at it. `mark`
        tells it from others of the same content.
        """
        headers = {"Etag": etag, "Content-Type": "application/octet-stream"} | ({"If-None-Match": "*"} if new else {})
        if mark:
            headers[_MARK] = mark
        query = "?multipart-manifest=put"
        answer = self._ask("PUT", where.quoted + query, self.shown(where), body, headers, (201, 202, 400, 409, 412))
        if answer.status == 412:
            there = self.head(where)
            # A try whose answer was lost may have made it.
            return answer.tries > 1 and there is not None and (there.etag, there.size, there.mark) == (etag, size, mark)
        if answer.status in (400, 409):
            raise BackendError(f"{self.shown(where)}: the store refuses the manifest: {_reason(answer)}")
        if look:
            self.refuse_other(where, self.head(where), etag, size)
        return True

    def refuse_other(self, where: ObjectName, there: Found | None, etag: str, size: int) -> None:
        """Raises `BackendError` unless what is there is a large object with this ETag and size."""
        if there is None or (there.etag, there.size, there.large) != (etag, size, True):
            found = f"{there.size} bytes with the ETag {there.etag}" if there else "nothing"
            raise BackendError(f"{self.shown(where)}: the store has {found}, {size} bytes with {etag} were meant")

    def touch(self, where: ObjectName) -> bool:
        """Makes an object as young as a new one; False if there is none."""
        answer = self._ask("POST", where.quoted, self.shown(where), good=(202, 404))
        return answer.status != 404

    def delete(self, where: ObjectName) -> bool:
        """Deletes an object, never the segments of a large one; False if there is none."""
        answer = self._ask("DELETE", where.quoted, self.shown(where), good=(204, 404))
        return answer.status != 404

    # -- containers

    def container(self, name: str) -> Message | None:
        """Returns the headers of a container; None if there is none."""
        answer = self._ask("HEAD", _container(name), f"swift://{self.cloud.name}/{name}", good=(200, 204, 404))
        return None if answer.status == 404 else answer.headers

    def make_container(self, name: str, headers: Mapping[str, str]) -> None:
        self._ask("PUT", _container(name), f"swift://{self.cloud.name}/{name}", b"", headers, (201, 202))

    def listing(self, container: str, prefix: str = "") -> Iterator[Entry]:
        """Yields the objects of a container whose names begin with `prefix`, sorted by name."""
        from urllib.parse import urlencode

        marker, said = "", f"swift://{self.cloud.name}/{container}"
        while True:
            query = urlencode({"format": "json", "limit": _PAGE, "prefix": prefix, "marker": marker})
            answer = self._ask("GET", f"{_container(container)}?{query}", said, good=(200, 204), limit=MAX_LISTING)
            page = [] if answer.status == 204 else _rows(answer.body, said)
            yield from page
            if not page:
                return
            if page[-1].name <= marker:
                raise ReadError(f"{said}: its listing does not end")
            marker = page[-1].name

    def count(self) -> None:
        """Counts a request."""
        with self._lock:
            self.requests += 1

    # -- what the store allows

    @cached_property
    def most_segments(self) -> int:
        """Segments of one manifest."""
        answer = self._request("GET", "/info", f"swift://{self.cloud.name}", b"", {}, (200, 401, 403, 404))
        stated: Any = None
        if answer.status == 200:
            try:
                stated = json.loads(answer.body)["slo"]["max_manifest_segments"]
            except (ValueError, KeyError, TypeError) as exc:
                said = f"swift://{self.cloud.name}: the store has no static large objects"
                raise BackendError(said) from exc
        # A larger manifest would be parsed for each range that is read.
        return max(2, min(MAX_SEGMENTS, stated)) if isinstance(stated, int) else MAX_SEGMENTS

    # -- requests

    def _found(self, answer: Answer, where: ObjectName) -> Found:
        size, etag = str(answer.headers.get("Content-Length") or ""), _etag(answer)
        if not re.fullmatch(r"[0-9]{1,18}", size) or not etag:
            raise ReadError(f"{self.shown(where)}: the store states no size and ETag")
        large = str(answer.headers.get("X-Static-Large-Object") or "").lower() == "true"
        return Found(etag, int(size), large, _seconds(answer, "X-Timestamp"), _date(answer), answer.headers)

    def now(self) -> float:
        """Returns the store's time, seconds since 1970, by the last answer."""
        if self._last is None:
            self._ask("HEAD", "", f"swift://{self.cloud.name}", good=(200, 204))
        assert self._last
        answer, arrived = self._last
        return _date(answer) + time.monotonic() - arrived

    def _ask(
        self,
        method: str,
        path: str,
        said: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        good: tuple[int, ...] = (200,),
        *,
        payload: bool = False,
        limit: int = _WORDS,
    ) -> Answer:
        if {".", ".."} & set(path.partition("?")[0].split("/")):
            # What is between here and the store may resolve such parts, and ask for another object.
            raise AccessError(f"{said}: has a part . or .. in its path")
        target = self.cloud.place.target.rstrip("/") + path
        return self._request(method, target, said, body, headers or {}, good, payload=payload, limit=limit)

    def _request(
        self,
        method: str,
        target: str,
        said: str,
        body: bytes,
        headers: Mapping[str, str],
        good: tuple[int, ...],
        *,
        payload: bool = False,
        limit: int = _WORDS,
    ) -> Answer:
        """Returns an answer of at most `limit` bytes. Raises an error unless its status is one of `good`."""
        why, renewed = "", False
        for tries in range(1, TRIES + 1):
            if why:
                time.sleep(PAUSE * 2 ** (tries - 2))
            self.count()
            if body:
                with self._lock:
                    name = "payload" if payload else "metadata"
                    self.sent = self.sent._replace(**{name: getattr(self.sent, name) + len(body)})
            try:
                answer = self._answer(method, target, body, headers, good, limit, tries)
            except (OSError, HTTPException) as exc:
                why = _short(exc)
                self._refuse_certificate(exc, said)
                continue
            if answer.status in good:
                self._last = answer, time.monotonic()
                if answer.cut:
                    raise AccessError(f"{said}: has more than {limit} bytes")
                return answer
            if answer.status == 401 and not renewed and self.cloud.renew():
                why, renewed = "", True
                continue
            if answer.status not in _BUSY:
                raise AccessError(f"{said}: {_doing(method)}: the store answers {_reason(answer)}")
            why = f"the store answers {_reason(answer)}"
        raise (ReadError if method in ("GET", "HEAD") else BackendError)(f"{said}: {_doing(method)}: {why}")

    def _answer(
        self,
        method: str,
        target: str,
        body: bytes,
        headers: Mapping[str, str],
        good: tuple[int, ...],
        limit: int,
        tries: int,
    ) -> Answer:
        """Returns the answer to one request, whatever its status; of a bad one not more than some words."""
        signed = {
            "Accept-Encoding": "identity",
            "User-Agent": "vmconv",
            "X-Auth-Token": self.cloud.token(),
            **headers,
        }
        connection = self.cloud.connections.take(self.cloud.place)
        whole = False
        try:
            found = connection.ask(self.cloud.place._replace(target=target), signed, limit, method, body)
            most = limit if found.status in good else _WORDS
            data = found.read(most + 1)
            if len(data) <= most and found.length and method != "HEAD":
                raise HTTPException("the answer ends too early")
            # Only after a whole answer does the connection begin with another one.
            whole = len(data) <= most and not found.will_close
            return Answer(found.status, found.reason[:80], found.headers, data[:most], len(data) > most, tries)
        finally:
            if whole:
                self.cloud.connections.put(connection)
            else:
                connection.close()

    def _refuse_certificate(self, exc: Exception, said: str) -> None:
        """Raises an error if the store's certificate does not hold: trying again is of no use."""
        import ssl

        if isinstance(exc, ssl.SSLCertVerificationError):
            hint = "cacert in clouds.yaml, or OS_CACERT, names the authority that has signed it"
            raise AccessError(f"{said}: the store's certificate is refused: {exc.verify_message}", hint=hint) from exc


def asked(question: Callable[[], Answered]) -> Future[Answered]:
    """Asks in a thread, and returns at once."""
    answer: Future[Answered] = Future()

    def ask() -> None:
        try:
            answer.set_result(question())
        except BaseException as exc:
            answer.set_exception(exc)

    # Who stops before the answer is needed does not wait for the store.
    threading.Thread(target=ask, daemon=True).start()
    return answer


MAX_SEGMENTS = 1000
"""Segments of a manifest that is made: Swift's default limit, and measured to be quicker to read than longer ones."""

_DOING = {"GET": "cannot be read", "HEAD": "cannot be looked at", "DELETE": "cannot be deleted"}


def _doing(method: str) -> str:
    return _DOING.get(method, "cannot be written")


def _container(name: str) -> str:
    from urllib.parse import quote

    return f"/{quote(name)}"


def _short(exc: Exception) -> str:
    return " ".join(str(exc).split())[:300] or type(exc).__name__


def _reason(answer: Answer) -> str:
    """Returns status and the beginning of the text of an answer."""
    text = re.sub(r"<[^>]*>", " ", answer.body[:2000].decode(errors="replace"))
    return " ".join(f"{answer.status} {answer.reason}: {' '.join(text.split())[:300]}".split()).rstrip(" :")


def _etag(answer: Answer) -> str:
    found = _ETAG.fullmatch(str(answer.headers.get("Etag") or ""))
    return found[1] if found else ""


def _seconds(answer: Answer, name: str) -> float:
    text = str(answer.headers.get(name) or "")
    return float(text) if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", text) else _date(answer)


def _date(answer: Answer) -> float:
    """Returns the time at which the store answered."""
    try:
        return parsedate_to_datetime(str(answer.headers.get("Date"))).timestamp()
    except (TypeError, ValueError) as exc:
        raise ReadError("the store states no date") from exc


def _rows(content: bytes, said: str) -> list[Entry]:
    from datetime import UTC, datetime

    try:
        rows = []
        for row in json.loads(content):
            modified = datetime.fromisoformat(row["last_modified"]).replace(tzinfo=UTC).timestamp()
            # Of a large object `hash` is the MD5 of its manifest.
            etag = str(row.get("slo_etag") or row["hash"]).strip('"')
            size = int(row["bytes"])
            if not 0 <= size <= MAX_SIZE:
                raise ValueError(f"{size} bytes")
            rows.append(Entry(str(row["name"]), size, modified, etag))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as exc:
        raise ReadError(f"{said}: its listing cannot be understood") from exc
    return rows


@cache
def client_of(cloud: str) -> Client:
    """Returns the client of a cloud's account, one for the whole process."""
    return Client(cloud_of(cloud))


def client_for(url: Url) -> Client:
    return client_of(url.host)
