"""One disk as one object of S3: parts are sent, or copied by the store, and appear together or not at all.

Nothing can be read of an upload before it is complete. So the plan is verified before anything is sent, each part when
it is made, and the object once more when it has appeared. One that is not as planned is removed again.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from hashlib import md5
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vmconv.plugin import (
    AccessError,
    Action,
    BackendError,
    ExistsError,
    File,
    HttpObject,
    ObjectBackend,
    PlanError,
    PlannedOutput,
    RemoteFile,
    S3Location,
    Survey,
    Transaction,
    VmconvError,
    counted,
    in_order,
    warn,
)
from vmconv_s3.parts import SMALLEST, Part, parts_of, rows_copied
from vmconv_s3.readback import refuse_other_content
from vmconv_s3.store import Store, StoreError

if TYPE_CHECKING:
    from concurrent.futures import Future

    from vmconv.plugin import FilePlan, Image, Output, Plan, Progress, Source
    from vmconv_s3.store import Made, Version

COPIED = "S3 has no references: no client traffic, the store copies"
_BESIDE = f"parts have at least {SMALLEST} bytes: it is sent with its neighbours"
_SMALL = f"the store copies ranges only of objects of more than {SMALLEST} bytes: it is sent"
_ELSEWHERE = "it is not in the store: it is sent"
_UNKNOWN = "the store states no ETag of its object: it is sent"
_IN_MEMORY = 128 << 20
"""Bytes of parts that are sent at once, unless one is larger."""
_LOOKS = 5
PAUSE = 1.0
"""Seconds before a list of parts is asked for again: it may lag behind."""
_MD5 = re.compile(r"[0-9a-f]{32}")


class Traffic(NamedTuple):
    """Bytes of an object by the way they come into it."""

    payload: int
    metadata: int
    zeros: int
    copied_by_store: int


class S3Backend(ObjectBackend):
    """Makes one object of a store."""

    name = "s3"
    title = "sends parts, or has the store copy them"

    def __init__(self, store: Store, *, force: bool = False) -> None:
        self.store, self.force = store, force
        self.traffic = Traffic(0, 0, 0, 0)
        """That of the last upload."""

    def staged(self, image: Image) -> Image:
        if not self.force and self.store.head() is not None:
            raise ExistsError(f"{self.store.shown}: already exists", hint="--force replaces it")
        for source in image.payload_files():
            at = _location(source)
            if at and (at.bucket, at.key) == (self.store.location.bucket, self.store.location.key):
                raise PlanError(f"{source.name}: is the source", hint="choose another name for the target")
        return image.holding(image.flat)

    def survey(self, directory: str, sources: Sequence[File]) -> Survey:
        return Survey(1, {id(source): reason_of(source) for source in sources})

    def planned(self, plan: Plan) -> Plan:
        if len(plan.files) != 1:
            return plan
        (file,) = plan.files
        parts = parts_of(file, copyable(file))
        by_store = rows_copied(file, parts)
        may = np.array([*copyable(file), False])[file.steps.source] & (file.steps.action == Action.COPY)
        copies = []
        for copy in plan.copies:
            if copy.reason != COPIED:
                copies.append(copy)
                continue
            for reason, lengths in ((COPIED, by_store), (_BESIDE, np.where(may, file.steps.length - by_store, 0))):
                rows = np.flatnonzero(lengths)
                if len(rows):
                    first = int(rows[0])
                    copies.append(
                        copy._replace(
                            reason=reason,
                            bytes=int(lengths.sum()),
                            ranges=len(rows),
                            file=file.sources[file.steps.source[first]].name,
                            offset=int(file.steps.source_offset[first]),
                        )
                    )
        return plan._replace(copies=tuple(copies), notes=(*plan.notes, *_notes(file, parts)))

    def start(self, sources: Sequence[File], *, force: bool) -> Upload:
        return Upload(self, sources)


def _location(source: Source) -> S3Location | None:
    """Returns where a source is in S3. All of `s3://` is at one endpoint: that of the environment."""
    return S3Location.of(source.url) if isinstance(source, RemoteFile) and source.url.scheme == "s3" else None


def _etag(source: Source) -> str:
    """Returns the ETag of the version that was opened; empty without one that a copy can be bound to."""
    remote = source.remote if isinstance(source, RemoteFile) else None
    etag = remote.etag if isinstance(remote, HttpObject) else ""
    return "" if etag.startswith("W/") else etag


def reason_of(source: Source) -> str:
    """Returns why payload of a source is copied, with how."""
    if not isinstance(source, RemoteFile) or source.url.scheme != "s3":
        return _ELSEWHERE
    if source.size <= SMALLEST:
        return _SMALL
    return COPIED if _etag(source) else _UNKNOWN


def copyable(file: FilePlan) -> list[bool]:
    """Returns for each source of an output whether the store can copy from it."""
    return [isinstance(source, File) and reason_of(source) == COPIED for source in file.sources]


def traffic_of(file: FilePlan, parts: Sequence[Part]) -> Traffic:
    by_store = int(rows_copied(file, parts).sum())
    copied, written = (file.steps.total(action) for action in (Action.COPY, Action.WRITE))
    return Traffic(copied - by_store, written, file.size - copied - written, by_store)


def _notes(file: FilePlan, parts: Sequence[Part]) -> list[str]:
    traffic = traffic_of(file, parts)
    sent = file.size - traffic.copied_by_store
    zeros = f", {traffic.zeros} of them zeros, because objects have no holes" if traffic.zeros else ""
    copied = sum(part.is_copied for part in parts)
    how = counted(len(parts) - copied, "part"), counted(copied, "part")
    return [f"{sent} bytes are sent in {how[0]}{zeros}; the store copies {how[1]}"]


class Upload(Transaction):
    """One object: the parts of an upload, which the store joins at the end."""

    def __init__(self, backend: S3Backend, sources: Sequence[File]) -> None:
        self.backend, self.store, self.sources = backend, backend.store, sources
        self._mark = secrets.token_hex(16)
        self._begun: Future[str] | None = None
        self._made: list[Made] = []
        self._completed = False

    def prepare(self, plan: Plan) -> None:
        (self._file,) = plan.files
        self._parts = parts_of(self._file, copyable(self._file))
        self._locations = [_location(source) for source in self._file.sources]
        self.backend.traffic = traffic_of(self._file, self._parts)

    def create(self, name: str, size: int, sources: Sequence[File]) -> Output:
        return PlannedOutput(self._file)

    # -- making

    def deliver(self, progress: Progress | None) -> None:
        # A signal must not come between the upload and its id.
        with ThreadPoolExecutor(1) as pool:
            self._begun = pool.submit(self.store.begin, self._mark)
        largest = max((part.length for part in self._parts if not part.is_copied), default=1)
        self._room = threading.BoundedSemaphore(max(1, _IN_MEMORY // largest))
        done = 0
        for part, made in zip(self._parts, in_order(self._make, enumerate(self._parts, start=1)), strict=True):
            self._made.append(made)
            done += part.length
            if progress:
                progress(done, self._file.size)
        self._refuse_other_parts()
        self._refuse_changed()

    @property
    def _id(self) -> str:
        assert self._begun is not None
        return self._begun.result()

    def _make(self, numbered: tuple[int, Part]) -> Made:
        number, part = numbered
        at = self._locations[part.source] if part.is_copied else None
        if at is None:
            with self._room:
                return self.store.send(self._id, number, self._file.table.read(part.offset, part.length))
        source = self._file.sources[part.source]
        try:
            return self.store.copy(self._id, number, at, _etag(source), part.at, part.length)
        except StoreError as exc:
            if exc.status == 412:
                raise _changed(source) from exc
            raise

    def _refuse_other_parts(self) -> None:
        """Raises `BackendError` unless the store has the parts that were made, with their sizes."""
        wanted = {
            number: (made.etag, part.length)
            for number, (part, made) in enumerate(zip(self._parts, self._made, strict=True), start=1)
        }
        for look in range(_LOOKS):
            if look:
                time.sleep(PAUSE * 2 ** (look - 1))
            found = self.store.parts(self._id)
            if found == wanted:
                return
        number = min(number for number in wanted.keys() | found.keys() if wanted.get(number) != found.get(number))
        etag, size = wanted.get(number, ("none", 0))
        other, has = found.get(number, ("none", 0))
        raise BackendError(
            f"{self.store.shown}: part {number}: the store has {has} bytes with the ETag {other[:40]}, "
            f"{size} with {etag[:40]} were made"
        )

    def _refuse_changed(self) -> None:
        """Raises `AccessError` if a source changed while parts were made of it.

        A store may look at the ETag before it copies, and then copy another version.
        """
        for file in self.sources:
            if file.changed():
                raise _changed(file)
        for source, can in zip(self._file.sources, copyable(self._file), strict=True):
            if can and isinstance(source, RemoteFile):
                _reread(source)

    # -- the end

    def commit(self) -> None:
        found = self.store.head()
        if found and not self.backend.force:
            raise BackendError(f"{self.store.shown}: appeared while it was being made")
        self.left = f"{self.store.shown} may have appeared, and was not verified"
        made = self._complete()
        self._completed = True
        try:
            self._verify(made)
        except VmconvError as exc:
            self._take_back(made, exc, replaced=found is not None)
            raise
        self.left = None

    def _complete(self) -> Version | None:
        """Makes the object appear. Returns None if it has, and the store's answer was lost."""
        try:
            return self.store.complete(self._id, [made.etag for made in self._made], new=not self.backend.force)
        except StoreError as exc:
            # Afterwards the upload is either complete or gone.
            with suppress(StoreError):
                self.store.cancel(self._id)
            found = self.store.head()
            if found and found.mark == self._mark:
                return None
            self.left = None
            if exc.status == 412 and found:
                raise BackendError(f"{self.store.shown}: appeared while it was being made") from exc
            raise

    def _verify(self, made: Version | None) -> None:
        """Raises `VmconvError` unless the object in the store is the planned one."""
        found = self.store.head()
        if found is None or found.mark != self._mark:
            raise BackendError(f"{self.store.shown}: was replaced or removed as soon as it had appeared")
        if found.size != self._file.size:
            raise BackendError(f"{self.store.shown}: the store has {found.size} bytes, {self._file.size} were planned")
        etag = self._joined_etag or (made.etag if made else found.etag)
        if found.etag != etag or (made and made.etag != etag):
            raise BackendError(f"{self.store.shown}: its ETag is {found.etag[:40]}, {etag[:40]} was expected")
        refuse_other_content(self._file, self._parts, self.store.url, etag)

    @cached_property
    def _joined_etag(self) -> str | None:
        """The ETag of an object of these parts; None if their ETags are not MD5."""
        if not all(made.is_plain and _MD5.fullmatch(made.etag) for made in self._made):
            return None
        digests = b"".join(bytes.fromhex(made.etag) for made in self._made)
        return f"{md5(digests, usedforsecurity=False).hexdigest()}-{len(self._made)}"

    def _take_back(self, made: Version | None, why: VmconvError, *, replaced: bool) -> None:
        """Removes the object if it is this upload's, and took the place of none."""
        version = made.version if made else ""
        if replaced and not version:
            self.left = f"{self.store.shown} was replaced, and the new object is not verified: {why}"
            return
        try:
            found = self.store.head()
            if found and found.mark == self._mark:
                self.store.remove(found, version)
        except VmconvError:
            return
        self.left = None

    def abort(self) -> None:
        if self._completed or self._begun is None:
            return
        try:
            upload = self._begun.result()
        except VmconvError:
            return
        try:
            self.store.cancel(upload)
        except VmconvError as exc:
            warn(f"{self.store.shown}: an unfinished upload is left in the store: {exc}")


def _changed(source: Source) -> AccessError:
    return AccessError(
        f"{source.name}: changed while it was being uploaded",
        hint="nothing was created; stop who writes to it and try again",
    )


def _reread(source: RemoteFile) -> None:
    """Raises `AccessError` unless an object still is the version that was opened."""
    byte = bytearray(1)
    try:
        source.remote.read_into(source.size - 1, memoryview(byte))
    except AccessError as exc:
        raise _changed(source) from exc
