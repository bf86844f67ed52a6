"""A sync from start to end: what changed, the plan of a new image, and its exchange with the old one.

The new image is made beside the old one and replaces it in one rename, as `convert --force` does. It shares all blocks
with the source where storage allows it. Else it shares what did not change with the old image, and only the rest is
copied from the source.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from vmconv.backends.targets import refuse_directory, refuse_kept_names
from vmconv.conversion import pipeline
from vmconv.conversion.choice import choose_backend
from vmconv.conversion.containers import Container, Target
from vmconv.conversion.execute import carry_out
from vmconv.conversion.refusals import refuse_copies, refuse_other_kind, refuse_too_large
from vmconv.conversion.verify import read_back, refuse_impossible, verify_mode
from vmconv.conversion.verify import verify as verify_result
from vmconv.errors import AccessError, PlanError, UsageError, warn
from vmconv.inplace.settling import settle
from vmconv.inspect import checking
from vmconv.interface.backend import Access, Backend, Transaction
from vmconv.io.registry import Registry, installed
from vmconv.model import references
from vmconv.model.extents import Extents, Kind, distinct
from vmconv.model.identity import fresh
from vmconv.model.image import Image
from vmconv.model.plan import Plan, Progress, Totals
from vmconv.model.planned import PlannedFile
from vmconv.model.sources import Decoded, File
from vmconv.syncing import changes as changing
from vmconv.syncing import old as olds
from vmconv.syncing import record as records
from vmconv.syncing.changes import Changes
from vmconv.syncing.old import Old
from vmconv.syncing.record import Record
from vmconv.syncing.request import NEW, SyncPlan, SyncRequest, SyncResult

if TYPE_CHECKING:
    from vmconv.conversion.request import Request
    from vmconv.interface.arguments import Verify
    from vmconv.io.directory import Directory
    from vmconv.io.opener import Opener

_BLOCK = 4096
"""Changes are widened to blocks that any filesystem can share, bytes."""


class Ready(NamedTuple):
    """A planned sync; all files are open. `image` is the source, `state` the digest of it for the record.

    `begin` returns the transaction. `files` may not change until the target has its name.
    """

    request: SyncRequest
    conversion: Request
    image: Image
    plan: SyncPlan
    containers: tuple[Container, ...]
    backend: Backend | None
    begin: Callable[[], Transaction] | None
    files: tuple[File, ...]
    old: Old | None
    state: str


@contextmanager
def prepared(request: SyncRequest, comparing: Progress | None = None) -> Iterator[Ready]:
    """Yields the planned sync: all is read and checked, nothing is changed."""
    settle(request.target)
    with pipeline.places(request.conversion(None, force=True)) as [(directory, name)]:
        if directory.status(name) is None:
            with _new(request) as ready:
                yield ready
            return
        refuse_directory(directory)
        refuse_kept_names(directory)
        with ExitStack() as stack:
            registry = installed()
            asked = request.conversion(None, force=True)
            opener = stack.enter_context(asked.opener(registry))
            image = opener.image(request.source, request.source_format, snapshot=request.snapshot)
            if image.kind != "disk":
                raise UsageError(
                    f"{image.file.name}: is a memory image, and only disks are synced", hint="convert it anew"
                )
            image.warnings += tuple(checking.warnings(image, opener))
            image.flat  # noqa: B018 opens all layers
            old = stack.enter_context(olds.opened(directory, name, request, opener.files, registry))
            refuse_other_kind(image.file.name, image.kind, old.format, registry)
            yield _Sync(request, image, opener, old, directory, name, registry, comparing).ready()


@contextmanager
def _new(request: SyncRequest) -> Iterator[Ready]:
    """Yields the first sync, the conversion to a new target."""
    if request.since is not None:
        raise UsageError(f"{request.target}: does not exist, so nothing changed since {request.since}")
    asked = request.conversion(request.target_format, force=False)
    with pipeline.prepared(asked) as found:
        size = found.image.size
        plan = SyncPlan(NEW, size, min(size, 1), 0, found.plan)
        yield Ready(
            request,
            asked,
            found.image,
            plan,
            tuple(found.containers),
            found.backend,
            found.begin,
            tuple(found.opener.files),
            None,
            records.state_of_source(found.image, request.snapshot),
        )


class _Sync:
    """The planning of one sync of an existing target."""

    def __init__(
        self,
        request: SyncRequest,
        image: Image,
        opener: Opener,
        old: Old,
        directory: Directory,
        name: str,
        registry: Registry,
        comparing: Progress | None,
    ) -> None:
        self.request = request
        self.image = image
        self.opener = opener
        self.old = old
        self.directory = directory
        self.name = name
        self.registry = registry
        self.comparing = comparing
        self.state = records.state_of_source(image, request.snapshot)
        self.asked = request.conversion(old.format.name, force=True)
        found = Target.of(old.format, old.options, directory.path, name)
        stated = old.image.facts.identity
        identity = found.identity if stated is None else stated.bytes
        self.target = found._replace(identity=identity, content=fresh())

    def ready(self) -> Ready:
        """Returns the plan. Raises `PlanError` if the disk would shrink, or the target is another's."""
        changes, table = self._changes()
        disk = self._disk(table)
        way = choose_backend(self.registry, "auto", self.directory.path, disk.payload_files())
        found = pipeline.conversion_of(self.asked, self.target, disk, way, self.registry, None)
        self._refuse_names(found.plan)
        size = self._size(found.containers)
        if size < self.old.image.size and not self.request.shrink:
            raise PlanError(
                f"{self.request.target}: has a disk of {self.old.image.size} bytes, the source has {self.image.size}",
                hint="--shrink cuts the rest off, and what is in it",
            )
        same = not changes.bytes and size == self.old.image.size
        plan = SyncPlan(changes.evidence, changes.bytes, len(changes.start), changes.compared, None)
        begin = partial(
            way.backend.begin,
            self.directory,
            force=True,
            durable=self.request.cache != "unsafe",
            access=Access(self.opener.files),
        )
        return Ready(
            self.request,
            self.asked,
            self.image,
            plan if same else plan._replace(plan=found.plan),
            found.containers,
            way.backend,
            begin,
            (*self.opener.files, *self.old.files),
            self.old,
            self.state,
        )

    # -- what changed

    def _changes(self) -> tuple[Changes, Extents]:
        """Returns what changed, and the table of the new disk."""
        record = None if self.request.compare else self._record()
        new, old = self.image.flat, self.old.image.flat
        found = self._learned(record)
        if self._shares_all():
            # Compared by address for the report only: all payload is shared with the source.
            by_address = changing.by_address(new, old, "physical addresses: other blocks are at other places")
            if record is None:
                self._refuse_other_disk(by_address)
            return by_address, new
        if found is None and self._may_share(old):
            found = changing.by_reading(new, old, self._reason(), self.comparing)
            self._refuse_other_disk(found)
        if found is None:
            return changing.everything(new.size, "nothing: the target's storage shares no blocks"), new
        found = found.widened(_BLOCK, max(new.size, old.size))
        return found, changing.merged(old, new, found.widened(_BLOCK, new.size))

    def _record(self) -> Record | None:
        """Returns the record of the last sync. Raises `PlanError` if the target was modified since."""
        record = records.read(self.old.image.file)
        if record is None or record.target == records.state_of_target(self.old.files):
            return record
        if not self.request.force:
            raise PlanError(
                f"{self.request.target}: was modified since its last sync, or is a copy of the file that was synced",
                hint="--force replaces what was written to it",
            )
        return None

    def _learned(self, record: Record | None) -> Changes | None:
        """Returns the changes since the last sync without reading payload; None if nothing tells them."""
        if self.request.since is not None:
            return self._since(self.request.since, record)
        if record is None:
            return None
        layers = list(self.image.chain())
        for number, layer in enumerate(layers):
            snapshot = self.request.snapshot if layer is self.image else None
            if records.state_of_source(layer, snapshot) != record.source:
                continue
            if layer is self.image:
                return changing.nothing("the record of the last sync: the source is unchanged")
            above = ", ".join(one.file.name for one in layers[:number])
            return changing.by_layers(self.image, layer, f"layers made since the last sync: {above}")
        return None

    def _since(self, path: str, record: Record | None) -> Changes:
        """Returns the ranges with other physical blocks than the disk of the last sync."""
        if record is None:
            raise PlanError(
                f"{self.request.target}: has no record of a sync with {path}",
                hint="omit --since: both disks are read once, and later syncs have a record",
            )
        with self.asked.opener(self.registry) as opener:
            base = opener.image(path, self.request.source_format)
            if records.state_of_source(base, None) != record.source:
                raise AccessError(
                    f"{path}: is not the disk that {self.request.target} was last synced with, or was modified since",
                    hint="omit --since: both disks are read",
                )
            found = changing.by_address(
                self.image.flat, base.flat, f"physical addresses: {path} has the disk of the last sync"
            )
            if any(file.changed() for file in opener.files):
                raise AccessError(f"{path}: changed while it was being compared")
        return found

    def _reason(self) -> str:
        return "both disks were read" if self.request.compare else "both disks were read: nothing told what changed"

    def _refuse_other_disk(self, changes: Changes) -> None:
        """Raises `PlanError` if source and target have payload, and nothing of it is known to be equal."""
        new, old = self.image.flat, self.old.image.flat
        if self.request.force or not (new.total(Kind.DATA) and old.total(Kind.DATA)):
            return
        if not _common(new, old, changes):
            raise PlanError(
                f"{self.request.target}: has nothing in common with {self.request.source}",
                hint="--force replaces it all the same",
            )

    # -- the plan

    def _shares_all(self) -> bool:
        """True if all payload can be shared with the source."""
        flat = self.image.flat
        used = [flat.sources[index] for index in distinct(flat.source[flat.kind == Kind.DATA]).tolist()]
        if any(isinstance(source, Decoded) for source in used):
            return False
        return not choose_backend(
            self.registry, "auto", self.directory.path, self.image.payload_files()
        ).survey.refusals

    def _may_share(self, old: Extents) -> bool:
        """True if the new target can share blocks with the old one."""
        files = [source for source in old.sources if isinstance(source, File)]
        return not choose_backend(self.registry, "auto", self.directory.path, files).survey.refusals

    def _disk(self, table: Extents) -> Image:
        """Returns the disk to write: the new table, with the facts of the old target."""
        return Image(
            self.image.format_name,
            self.image.file,
            table.size,
            lambda: table,
            facts=self.old.image.facts,
            losses=self.image.losses,
            warnings=(*self.image.warnings, *self.old.image.warnings),
        )

    def _refuse_names(self, plan: Plan) -> None:
        for file in plan.files:
            if file.name not in self.old.names and self.directory.has(file.name):
                raise PlanError(
                    f"{self.directory.join(file.name)}: already exists, and is no part of the target",
                    hint="move it away",
                )

    def _size(self, containers: tuple[Container, ...]) -> int:
        """Returns the size of the new target's disk, which its format may round."""
        planned = [PlannedFile(out.name or made.name, out.table) for made in containers for out in made.layout.files]
        *_, top = read_back(containers, planned, self.registry)
        return top.image.size


def _common(new: Extents, old: Extents, changes: Changes) -> int:
    """Returns the bytes of payload that both disks have, and that are known to be equal."""
    kept = changing.merged(Extents.filled(new.size), new.window(0, new.size), changes.widened(1, new.size))
    same = new.total(Kind.DATA) - kept.total(Kind.DATA)
    return min(same, old.total(Kind.DATA))


def run(
    request: SyncRequest,
    *,
    verify: bool | Verify = True,
    announce: Callable[[SyncPlan], None] | None = None,
    progress: Progress | None = None,
    verifying: Progress | None = None,
    comparing: Progress | None = None,
) -> SyncResult:
    """Brings the target up to date; see `vmconv.api.sync`."""
    began = time.perf_counter()
    done: list[SyncResult] = []
    mode = verify_mode(verify)
    try:
        with prepared(request, comparing) as ready:
            if ready.plan.plan is not None:
                refuse_copies(request.target, request.zero_copy, ready.plan.plan)
                refuse_too_large(ready.plan.plan)
                refuse_impossible(mode, _against_source(ready), installed(), ready.conversion)
            if announce:
                announce(ready.plan)

            def note() -> None:
                done.append(_result(ready, time.perf_counter() - began))

            if ready.plan.plan is None:
                _confirm(ready)
                note()
            else:
                _replace(ready, ready.plan.plan, mode, progress, verifying, note)
    except BaseException as exc:
        if not isinstance(exc, Exception):
            vars(exc)["results"] = tuple(done)
        raise
    return done[0]


def plan(request: SyncRequest, comparing: Progress | None = None) -> SyncPlan:
    """Returns what `run` would do; changes nothing."""
    with prepared(request, comparing) as ready:
        if ready.plan.plan is not None:
            refuse_copies(request.target, request.zero_copy, ready.plan.plan)
        return ready.plan


def _replace(
    ready: Ready,
    planned: Plan,
    mode: Verify | None,
    progress: Progress | None,
    verifying: Progress | None,
    done: Callable[[], None],
) -> None:
    """Makes the new target, and gives it the name of the old one."""
    registry = installed()

    def check(files: list[File]) -> None:
        if mode:
            verify_result(ready.containers, files, registry, "metadata")
            if mode != "metadata":
                verify_result(_against_source(ready), files, registry, mode, verifying)
        _record(ready, files)

    assert ready.begin
    carry_out(
        planned,
        ready.begin(),
        ready.files,
        ready.request.target,
        verify=check,
        progress=progress,
        created=None,
        done=done,
    )


def _against_source(ready: Ready) -> list[Container]:
    """Returns the containers with the source as what they are compared with, not the table that was written."""
    return [made._replace(source=ready.image) for made in ready.containers]


def _record(ready: Ready, files: list[File]) -> None:
    """Writes the record of a target; warns if that cannot be done."""
    if not ready.request.record:
        return
    # Else a write within the same tick of the clock would leave source and target as recorded.
    references.settle([*ready.files, *files])
    if why := records.write(files, ready.state):
        warn(f"{ready.request.target}: no record of this sync can be kept: {why}")


def _confirm(ready: Ready) -> None:
    """Writes the record of a target that is up to date."""
    for file in ready.files:
        if file.changed():
            raise AccessError(f"{file.name}: changed while it was being compared", hint="try again")
    if ready.old:
        files = [*(file for file in ready.old.files if file is not ready.old.image.file), ready.old.image.file]
        _record(ready, files)


def _result(ready: Ready, seconds: float) -> SyncResult:
    found, made = ready.plan, ready.containers[-1]
    planned = found.plan
    return SyncResult(
        ready.request.source,
        ready.request.target,
        ready.image.format_name,
        made.format.name,
        ready.backend.name if planned and ready.backend else "none",
        found.evidence,
        found.changed,
        found.ranges,
        found.compared,
        planned.totals if planned else Totals(0, 0, 0, 0),
        planned.copies if planned else (),
        planned.losses if planned else (),
        tuple(dict.fromkeys(text for one in ready.containers for text in one.source.warnings)),
        seconds,
    )
