"""Disks as static large objects: payload is referred to where it lies, and only metadata is new.

What a publication makes before its objects appear is named by its content, in vmconv's own container. The manifest
that will be the object is first a candidate there: it is read back, and verified, as any reader will read it.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from vmconv.plugin import (
    AccessError,
    BackendError,
    ExistsError,
    File,
    ObjectBackend,
    Output,
    PlanError,
    RemoteFile,
    Survey,
    Transaction,
    VmconvError,
    in_order,
)
from vmconv_swift.client import asked
from vmconv_swift.manifest import MAX_DEPTH, Segment, body_of, etag_of
from vmconv_swift.names import OWN_SUFFIX, ObjectName, own_container
from vmconv_swift.payload import PREFIX, LeafFile, Piece, StoreFile, staged
from vmconv_swift.readback import refuse_other_content
from vmconv_swift.records import GRACE, Record, is_payload, make_own, record_name, refuse_stranger
from vmconv_swift.remote import SwiftObject, problems_of
from vmconv_swift.segments import SMALL_GAP, Packer, Rows, placed
from vmconv_swift.zeros import ZEROS, etag_of_zeros

if TYPE_CHECKING:
    from concurrent.futures import Future

    from vmconv.plugin import FilePlan, Image, Plan, ShareSteps, Source, Url
    from vmconv_swift.client import Client
    from vmconv_swift.manifest import Leaf

_FRESH = 3600
"""Seconds after which something that is used again is touched, so that nobody removes it meanwhile."""
_FEW = 4
"""Objects that are looked at one by one."""
_LISTED = 10000
"""Rows of a listing that are read at least, if it has so many."""
_UPLOADS = threading.BoundedSemaphore(2)
"""Pieces that are sent at once: each is in memory."""
_MOST_ZEROS = 16
"""Segments of zeros that a manifest has itself; more are in a manifest of their own."""


class Target(NamedTuple):
    """An object to make, and its URL."""

    where: ObjectName
    url: Url


class SwiftBackend(ObjectBackend):
    """Publishes one disk as objects of one container.

    `adopt` refers to payload in containers that are not vmconv's own. `ready` is called with the ETag of each object
    right before it appears.
    """

    name = "swift"
    title = "refers to ranges of objects"

    def __init__(
        self,
        client: Client,
        targets: Sequence[Target],
        *,
        adopt: bool = False,
        force: bool = False,
        ready: Callable[[str], None] = lambda _etag: None,
    ) -> None:
        self.client, self.adopt, self.force, self.ready = client, adopt, force, ready
        self.targets = {target.where.name.rpartition("/")[2]: target for target in targets}
        containers = {target.where.container for target in targets}
        if len(self.targets) < len(targets):
            raise PlanError("two targets have one name", hint="publish them one after the other")
        if len(containers) > 1:
            raise PlanError(f"the targets are in {len(containers)} containers", hint="publish into one after the other")
        (self.container,) = containers
        if self.container.endswith(OWN_SUFFIX):
            raise PlanError(f"{self.container}: a container of this name is vmconv's own", hint="name another one")
        self.own = own_container(self.container)
        self.exists = False
        questions: list[Callable[[], object]] = [self._refuse_missing, self._look_at_own]
        if not self.force:
            questions += [partial(self._refuse_existing, target) for target in self.targets.values()]
        # The store takes its time for each, in which the source is opened; the last is needed later.
        self._answers = [asked(question) for question in (*questions, lambda: self.client.most_segments)]

    def staged(self, image: Image) -> Image:
        for answer in self._answers:
            answer.result()
        table, _ = staged(image.flat, self.client, self.own, self._may_refer)
        mine = {target.where for target in self.targets.values()}
        for source in table.sources:
            if isinstance(source, LeafFile) and source.where in mine:
                raise PlanError(f"{source.name}: is part of the source", hint="choose another name for the target")
        return image.holding(table)

    def _refuse_missing(self) -> None:
        if self.client.container(self.container) is None:
            raise AccessError(f"swift://{self.client.cloud.name}/{self.container}: there is no such container")

    def _look_at_own(self) -> None:
        self.exists = refuse_stranger(self.client, self.own)

    def _refuse_existing(self, target: Target) -> None:
        if self.client.head(target.where):
            raise ExistsError(f"{target.url.shown}: already exists", hint="--force replaces it")

    def _may_refer(self, leaf: Leaf) -> bool:
        if leaf.where.container == self.own:
            return self.exists and is_payload(leaf.where.name)
        return self.adopt

    def survey(self, directory: str, sources: Sequence[File]) -> Survey:
        refusals = {}
        for source in sources:
            if isinstance(source, Piece) and not source.there:
                refusals[id(source)] = (
                    f"it is in {source.foreign}, which is not vmconv's own container (--adopt refers to it there)"
                    if source.foreign and source.foreign != self.own
                    else f"it is not in {self.own} yet"
                )
            elif not isinstance(source, StoreFile):
                refusals[id(source)] = f"it is no object of {self.own}"
        return Survey(1, refusals)

    def start(self, sources: Sequence[File], *, force: bool) -> Transaction:
        return Publication(self)


def _now() -> float:
    """Returns seconds of a clock that also counts while the machine sleeps, where there is one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Publication(Transaction):
    """The objects of one disk."""

    def __init__(self, backend: SwiftBackend) -> None:
        self.backend, self.client, self.own = backend, backend.client, backend.own
        self.id = f"{int(time.time()):x}-{secrets.token_hex(16)}"
        self.outputs: list[SwiftOutput] = []
        self.uses: dict[str, None] = {}
        """Names in vmconv's own container that the publication needs."""
        self._plans: dict[str, FilePlan] = {}
        self._lock = threading.RLock()
        self._sent: dict[str, threading.Lock] = {}
        self._there: set[str] = set()
        self._recorded = 0.0
        self._records: dict[str, tuple[Record, float]] = {}
        """What was written last for each object, and when."""
        self._committed = False
        self._maybe_visible: dict[str, SwiftOutput] = {}
        self._made: set[str] = set()
        """Objects of which the store has said that they were made."""
        self._leaves: dict[Leaf, None] = {}

    # -- before anything is made

    def prepare(self, plan: Plan) -> None:
        self._plans = {file.name: file for file in plan.files}
        used = {id(source): source for file in plan.files for source in file.table.sources}
        mine = [source for source in used.values() if isinstance(source, (Piece, LeafFile))]
        for source in mine:
            if source.where.container == self.own:
                self.uses[source.where.name] = None
        if not self.backend.exists:
            make_own(self.client, self.backend.container)
        self.record()
        self.left = (
            f"what was sent is kept in {self.own} for the next publication; vmconv unpublish --unused removes it later"
        )
        # Only what is in the record may be relied on.
        kept = [source for source in mine if isinstance(source, LeafFile) or source.there]
        young = self._young({source.where for source in kept})
        for _ in in_order(self._keep, (source for source in kept if source.where not in young[source.etag])):
            pass

    def _young(self, wanted: set[ObjectName]) -> Mapping[str, set[ObjectName]]:
        """Returns payload that is so young that nobody removes it, by ETag: many in one request.

        A listing may lack what is new, or have what was removed a moment ago. The store looks at all segments of a
        manifest when it is made.
        """
        found: dict[str, set[ObjectName]] = defaultdict(set)
        if len(wanted) > _FEW:
            oldest = self.client.now() - _FRESH / 2
            left = set(wanted)
            for entry in islice(self.client.listing(self.own, PREFIX), _LISTED + 2 * len(wanted)):
                where = ObjectName(self.own, entry.name)
                left.discard(where)
                if entry.modified > oldest:
                    found[entry.etag].add(where)
                if not left:
                    break
        return found

    def record(self) -> None:
        """Writes the record of each object, with all that it needs so far."""
        for name in self.backend.targets:
            self.record_one(name)
        self._recorded = _now()

    def record_one(self, name: str) -> None:
        """Writes the record of one object, unless it has been written a moment ago as it is now."""
        where = self.backend.targets[name].where
        etag = next((output.etag for output in self.outputs if output.name == name), None)
        with self._lock:
            record = Record(where.path, etag or None, tuple(self.uses))
        written, when = self._records.get(name, (None, 0.0))
        if written != record or _now() - when > _FRESH / 2:
            self.client.put(record_name(self.own, where, self.id), record.body())
            self._records[name] = record, _now()

    def _keep(self, source: Piece | LeafFile) -> None:
        """Makes sure that an object which exists stays. Raises `BackendError` if it has gone."""
        if not self.refresh(source.where, source.etag, source.size):
            raise BackendError(
                f"{self.client.shown(source.where)}: was removed, or has changed, since the conversion was planned",
                hint="try again",
            )

    def refresh(self, where: ObjectName, etag: str, size: int) -> bool:
        """Returns whether an object is as it should be; makes it young if it is vmconv's own, and old."""
        found = self.client.head(where)
        if found is None or (found.etag, found.size) != (etag, size):
            return False
        if where.container != self.own:
            # Another's object is left as it is.
            if found.expires:
                raise AccessError(f"{self.client.shown(where)}: expires", hint="without --adopt it is copied")
            return True
        # A touch also takes away the time at which an object expires.
        return (found.now - found.modified < _FRESH and not found.expires) or self.client.touch(where)

    # -- making

    def create(self, name: str, size: int, sources: Sequence[File]) -> Output:
        output = SwiftOutput(self, self._plans[name], self.backend.targets[name])
        self.outputs.append(output)
        return output

    def send(self, piece: Piece) -> None:
        """Sends a piece unless this publication has done so; called from several threads."""
        with self._lock:
            own = self._sent.setdefault(piece.where.name, threading.Lock())
        with own:
            if piece.where.name in self._there:
                return
            with _UPLOADS:
                # The store compares: computing it again would take as long as sending.
                self.client.put(piece.where, piece.read(0, piece.size), etag=piece.etag, payload=True)
            self._there.add(piece.where.name)
        with self._lock:
            if _now() - self._recorded > _FRESH:
                self.record()

    def keep(self, prefix: str, body: bytes, *, payload: bool = False) -> Segment:
        """Makes an object named by its content, and returns a segment of all of it."""
        where = ObjectName(self.own, f"{prefix}/{sha256(body).hexdigest()}")
        with self._lock:
            self.uses[where.name] = None
        etag = self.client.put(where, body, payload=payload)
        return Segment(where, etag, len(body), 0, len(body))

    def keep_manifest(self, segments: Sequence[Segment]) -> Segment:
        """Makes a manifest that other manifests refer to, and returns a segment of all of it."""
        body, etag, size = body_of(segments), etag_of(segments), sum(segment.length for segment in segments)
        where = ObjectName(self.own, f"manifests/{sha256(body).hexdigest()}")
        with self._lock:
            self.uses[where.name] = None
        self.client.put_manifest(where, body, etag, size)
        return Segment(where, etag, size, 0, size, large=True)

    def zeros(self, length: int) -> list[Segment]:
        """Returns segments of zeros."""
        unit = self._unit_of_zeros()
        segments: list[Segment] = []
        most = self.client.most_segments
        while length > _MOST_ZEROS * ZEROS:
            count = min(most, -(-length // ZEROS))
            many = self._many_zeros(unit, count)
            step = min(length, many.size)
            segments.append(many._replace(length=step))
            length -= step
        while length > 0:
            step = min(length, ZEROS)
            segments.append(unit._replace(length=step))
            length -= step
        return segments

    def _unit_of_zeros(self) -> Segment:
        name = f"zeros/{ZEROS}"
        if name not in self._there:
            where = ObjectName(self.own, name)
            self.uses[name] = None
            if not self.refresh(where, etag_of_zeros(), ZEROS):
                self.client.put(where, bytes(ZEROS))
            self._there.add(name)
        return Segment(ObjectName(self.own, name), etag_of_zeros(), ZEROS, 0, ZEROS)

    def _many_zeros(self, unit: Segment, count: int) -> Segment:
        segments = [unit] * count
        where = ObjectName(self.own, f"manifests/{sha256(body_of(segments)).hexdigest()}")
        size = count * ZEROS
        if where.name in self._there or self.refresh(where, etag_of(segments), size):
            self.uses[where.name] = None
            found = Segment(where, etag_of(segments), size, 0, size, large=True)
        else:
            found = self.keep_manifest(segments)
        self._there.add(where.name)
        return found

    # -- the end

    def commit(self) -> None:
        self._refuse_stale()
        self.record()
        new = not self.backend.force
        for output in self.outputs:
            self.backend.ready(output.etag)
        try:
            for output in self.outputs:
                self._maybe_visible[output.name] = output
                where, etag, size = output.target.where, output.etag, output.size
                if not self.client.put_manifest(where, output.body, etag, size, new=new, mark=self.id):
                    del self._maybe_visible[output.name]
                    raise BackendError(f"{output.target.url.shown}: appeared while it was being made")
                self._made.add(output.name)
        except VmconvError:
            self._take_back(new=new)
            raise
        self._committed = True
        self.left = None
        # Whoever has just unpublished an object of this name and content has taken the record for that object's.
        for output in self.outputs:
            if self.client.head(record_name(self.own, output.target.where, self.id)) is None:
                self._records.clear()
                self.record()
        for output in self.outputs:
            # Garbage that stays is collected later.
            with suppress(VmconvError):
                self.client.delete(output.candidate)

    def _take_back(self, *, new: bool) -> None:
        """Removes what may have appeared.

        What cannot be removed, has replaced something, or may appear later, keeps its record.
        """
        for output in list(self._maybe_visible.values()):
            with suppress(VmconvError):
                found = self.client.head(output.target.where)
                mine = found is not None and found.mark == self.id
                if mine and new:
                    self.client.delete(output.target.where)
                # A request without an answer may be under way still.
                if output.name in self._made and (not mine or new):
                    del self._maybe_visible[output.name]

    def _refuse_stale(self) -> None:
        """Raises `BackendError` if segments have gone, after a pause in which they could be taken for unused."""
        if _now() - self._recorded < GRACE / 4:
            return
        problem = next(problems_of(self.client, self._leaves), None)
        if problem:
            raise BackendError(f"the publication was interrupted for too long: {problem}", hint="try again")

    def used(self, leaves: Iterable[Leaf]) -> None:
        self._leaves.update(dict.fromkeys(leaves))

    def abort(self) -> None:
        for output in self.outputs:
            output.close()
        if self._committed:
            return
        for output in self.outputs:
            with suppress(VmconvError):
                self.client.delete(output.candidate)
        for name, target in self.backend.targets.items():
            if name not in self._maybe_visible:
                with suppress(VmconvError):
                    self.client.delete(record_name(self.own, target.where, self.id))


class SwiftOutput(Output):
    """One object: its segments are collected, and its manifest is made at the end."""

    def __init__(self, publication: Publication, plan: FilePlan, target: Target) -> None:
        self.publication, self.plan, self.target = publication, plan, target
        self.name, self.size = plan.name, plan.size
        number = len(publication.outputs)
        self.candidate = ObjectName(publication.own, f"candidates/{publication.id}-{number}")
        self.body, self.etag = b"", ""
        self._file: File | None = None
        self._recorded: Future[None] | None = None
        self._rows = Rows()
        self._metadata = Packer(partial(publication.keep, "metadata"), self._rows)
        self._payload = Packer(partial(publication.keep, "encoded", payload=True), self._rows)

    def share(self, steps: ShareSteps) -> None:
        columns = (steps.offset, steps.length, steps.source, steps.source_offset)
        for offset, length, source, at in zip(*(column.tolist() for column in columns), strict=True):
            self._refer(offset, length, steps.sources[source], at)
        self.on_shared(int(steps.length.sum()))

    def _refer(self, offset: int, length: int, source: Source, at: int) -> None:
        if not isinstance(source, (Piece, LeafFile)):
            raise BackendError(f"{source.name}: is no object that can be referred to")
        self._rows.add(offset, Segment(source.where, source.etag, source.size, at, length))

    def write(self, offset: int, data: bytes) -> None:
        self._metadata.add(offset, data)

    def copy(self, source: Source, source_offset: int, offset: int, length: int) -> None:
        if isinstance(source, Piece):
            self.publication.send(source)
            self._refer(offset, length, source, source_offset)
        else:
            self._payload.add(offset, source.read(source_offset, length))

    def finish(self) -> File:
        gaps = list(self.plan.gaps())
        for offset, length in gaps:
            if length <= SMALL_GAP:
                self._metadata.add(offset, bytes(length))
        self._metadata.flush()
        self._payload.flush()
        for offset, length in gaps:
            at = offset
            for segment in self.publication.zeros(length) if length > SMALL_GAP else ():
                self._rows.add(at, segment)
                at += segment.length
        segments = self._tree(placed(self._rows, self.size))
        self.body, self.etag = body_of(segments), etag_of(segments)
        self.publication.uses[self.candidate.name] = None
        self._recorded = asked(partial(self.publication.record_one, self.name))
        self.publication.client.put_manifest(self.candidate, self.body, self.etag, self.size, look=False)
        made = SwiftObject(self.publication.client, self.candidate)
        self.publication.client.refuse_other(self.candidate, made.found, self.etag, self.size)
        self._file = file = RemoteFile(self.target.url, made)
        refuse_other_content(self.plan, made, file)
        self.publication.used(window.leaf for window in made.windows if window.leaf)
        self._recorded.result()
        return file

    def close(self) -> None:
        if self._recorded:
            # What is removed afterwards must not be written later.
            self._recorded.exception()
        if self._file:
            self._file.close()

    def _tree(self, segments: list[Segment]) -> list[Segment]:
        """Returns the segments of the top manifest; those that are too many for it are in others."""
        most = self.publication.client.most_segments
        for _ in range(MAX_DEPTH - 2):
            if len(segments) <= most:
                return segments
            parts = [segments[at : at + most] for at in range(0, len(segments), most)]
            segments = list(in_order(self.publication.keep_manifest, parts))
        raise BackendError(f"{self.target.url.shown}: {len(segments)} manifests are too many")
