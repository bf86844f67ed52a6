"""The Python API: one function for each command of the command line, with typed results.

Paths are strings, bytes or path objects. Arguments are checked first, strictly: "no" is not a bool, and a string is not
a list of strings. All functions raise `VmconvError`, and `UsageError` for an invalid request.

Keywords of several functions:

`allow_external`: directory trees that images may refer to, besides their own directory.
`force_share`: read files that another process has open for writing.
`verify`: how the result is compared with the source before it appears under its name. True means "metadata", False
nothing. "sample" and "bytes" read payload and call `verifying(bytes read, bytes to read)`, first with 0 bytes read.
`announce`: called with the plan before any write. `progress`: called with `(bytes done, bytes to do)`.
`created`: called with the name and the descriptor of each output that is a new file, before it has that name.

`from_snapshot`: read the source as it was in a snapshot of its filesystem: "newest", or its name, number or date.

`offset`, `length`: take bytes `[offset, offset + length)` of the source as the disk, by default up to its end.

`decompress`: read a file compressed by gzip, xz, Zstandard, bzip2 or ZIP, of at most `decompress_limit` bytes.

The other keywords of conversions are the fields of `Request`. The remaining names serve our own plugins `view` and
`fleet`, and are not stable.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from vmconv.errors import BackendError, UsageError, did_you_mean

if TYPE_CHECKING:
    from vmconv.conversion.containers import new_name
    from vmconv.conversion.editing import Edited
    from vmconv.conversion.measuring import Measure
    from vmconv.conversion.pipeline import prepared
    from vmconv.conversion.refusals import refuse_copies
    from vmconv.conversion.repairing import Repaired
    from vmconv.conversion.request import Request, Result
    from vmconv.conversion.views import views
    from vmconv.inplace.recovery import Recovery
    from vmconv.inplace.settling import settle
    from vmconv.inspect import checking, strips
    from vmconv.inspect.comparison import Comparison
    from vmconv.inspect.mapping import MapRow
    from vmconv.inspect.proof import Proof
    from vmconv.interface.arguments import Cache, OptionValue, Preallocation, StrPath, Verify, ZeroCopy
    from vmconv.interface.backend import Created
    from vmconv.interface.format import CheckReport
    from vmconv.io import locks
    from vmconv.io.registry import Registry, installed, installed_machines
    from vmconv.machine.boot.volumes import volumes
    from vmconv.machine.model import Machine
    from vmconv.machine.request import MachinePlan, MachineResult, Uuid
    from vmconv.machine.source import machine_format_of
    from vmconv.model.plan import Plan, Progress
    from vmconv.model.sources import inside, stamp_of
    from vmconv.model.view import View
    from vmconv.syncing.commit import CommitResult
    from vmconv.syncing.rebase import RebaseResult
    from vmconv.syncing.request import SyncPlan, SyncResult
    from vmconv.system.juicefs import volume_of
    from vmconv.system.linux import generation, mount_of

_HOMES = {
    "Cache": "interface.arguments",
    "CheckReport": "interface.format",
    "CommitResult": "syncing.commit",
    "Comparison": "inspect.comparison",
    "Edited": "conversion.editing",
    "Machine": "machine.model",
    "MachinePlan": "machine.request",
    "MachineResult": "machine.request",
    "MapRow": "inspect.mapping",
    "Measure": "conversion.measuring",
    "OptionValue": "interface.arguments",
    "Plan": "model.plan",
    "Proof": "inspect.proof",
    "RebaseResult": "syncing.rebase",
    "Recovery": "inplace.recovery",
    "Registry": "io.registry",
    "Repaired": "conversion.repairing",
    "Request": "conversion.request",
    "Result": "conversion.request",
    "StrPath": "interface.arguments",
    "SyncPlan": "syncing.request",
    "SyncResult": "syncing.request",
    "View": "model.view",
    "ZeroCopy": "interface.arguments",
    "checking": "inspect.checking",
    "strips": "inspect.strips",
    "generation": "system.linux",
    "inside": "model.sources",
    "installed": "io.registry",
    "installed_machines": "io.registry",
    "locks": "io.locks",
    "machine_format_of": "machine.source",
    "mount_of": "system.linux",
    "new_name": "conversion.containers",
    "prepared": "conversion.pipeline",
    "refuse_copies": "conversion.refusals",
    "settle": "inplace.settling",
    "stamp_of": "model.sources",
    "views": "conversion.views",
    "volume_of": "system.juicefs",
    "volumes": "machine.boot.volumes",
}

__all__ = [
    "Cache",
    "CheckReport",
    "CommitResult",
    "Comparison",
    "Edited",
    "Machine",
    "MachinePlan",
    "MachineResult",
    "MapRow",
    "Measure",
    "OptionValue",
    "Plan",
    "Proof",
    "RebaseResult",
    "Recovery",
    "Registry",
    "Repaired",
    "Request",
    "Result",
    "StrPath",
    "SyncPlan",
    "SyncResult",
    "View",
    "ZeroCopy",
    "bitmap",
    "check",
    "checking",
    "commit",
    "compare",
    "convert",
    "create",
    "did_you_mean",
    "fanout",
    "generation",
    "info",
    "inside",
    "installed",
    "installed_machines",
    "locks",
    "machine_convert",
    "machine_format_of",
    "machine_info",
    "machine_plan",
    "map_disk",
    "measure",
    "mount_of",
    "new_name",
    "plan",
    "prepared",
    "prove",
    "rebase",
    "recover",
    "refuse_copies",
    "repair",
    "resize",
    "settle",
    "snapshot",
    "stamp_of",
    "stream",
    "strips",
    "sync",
    "sync_plan",
    "undo",
    "views",
    "volume_of",
    "volumes",
]


# Names that are modules, not attributes of one.
_MODULES = {"checking", "locks", "strips"}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"vmconv.{home}")
    return module if name in _MODULES else getattr(module, name)


_Arguments = ParamSpec("_Arguments")
_Returned = TypeVar("_Returned")
_EMPTY: Mapping[str, Any] = MappingProxyType({})


def _named(function: Callable[_Arguments, _Returned]) -> Callable[_Arguments, _Returned]:
    """Turns an unknown keyword into a `UsageError` that suggests the nearest name."""
    code = function.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]

    @wraps(function)
    def call(*args: _Arguments.args, **given: _Arguments.kwargs) -> _Returned:
        from vmconv.interface.arguments import refuse_unknown

        refuse_unknown(names, given)
        return function(*args, **given)

    return call


@_named
def convert(
    source: StrPath,
    target: StrPath,
    *,
    source_format: str | None = None,
    target_format: str | None = None,
    options: Mapping[str, OptionValue] = _EMPTY,
    snapshot: str | None = None,
    chain: bool = False,
    backing_file: StrPath | None = None,
    backing_format: str | None = None,
    backend: str = "auto",
    zero_copy: ZeroCopy = "auto",
    cache: Cache = "writeback",
    rate: int | None = None,
    force: bool = False,
    in_place: bool = False,
    keep_undo: bool = False,
    any_owner: bool = False,
    force_share: bool = False,
    allow_external: Iterable[StrPath] = (),
    source_backing_format: str | None = None,
    mode: int | None = None,
    from_snapshot: str | None = None,
    decompress: bool = False,
    decompress_limit: int | None = None,
    offset: int = 0,
    length: int | None = None,
    compress: bool = False,
    bitmaps: bool = False,
    skip_broken_bitmaps: bool = False,
    more_sources: Iterable[StrPath] = (),
    sparse: int | None = None,
    secrets: Iterable[StrPath] = (),
    target_secret: StrPath | None = None,
    parents: Iterable[StrPath] = (),
    confined: bool = False,
    no_create: bool = False,
    target_is_zero: bool = False,
    verify: bool | Verify = True,
    announce: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
    verifying: Progress | None = None,
    created: Created | None = None,
) -> Result:
    """Converts the disk image `source` into the new file `target` and returns the result.

    The target appears complete or not at all. The source is not modified unless `in_place`, which turns it into the
    target. `confined` reads and makes no file outside of `allow_external`, whatever other users rename meanwhile.
    With `no_create` the target exists, and gets another content: a block device, or an image that keeps its format,
    options and size.
    """
    # locals() has exactly the arguments here, as no other variable exists yet. So below, too.
    return _converted(locals())


@_named
def create(
    target: StrPath,
    size: int | None = None,
    *,
    target_format: str | None = None,
    options: Mapping[str, OptionValue] = _EMPTY,
    backing_file: StrPath | None = None,
    backing_format: str | None = None,
    mode: int | None = None,
    force: bool = False,
    force_share: bool = False,
    allow_external: Iterable[StrPath] = (),
    source_backing_format: str | None = None,
    cache: Cache = "writeback",
    created: Created | None = None,
) -> Result:
    """Makes the image `target` of an empty disk of `size` bytes and returns the result.

    With `backing_file`, stored as given and relative to the target's directory, it is an empty layer on that image, by
    default of its size.
    """
    given = locals()
    if size is None and backing_file is None:
        raise UsageError("a new disk needs a size", hint="or a backing file, whose size it gets")
    del given["size"]
    return _converted({**given, "source": target, "blank": size or 0})


@_named
def fanout(
    source: StrPath,
    formats: Iterable[str],
    *,
    directory: StrPath = ".",
    options: Mapping[str, Mapping[str, OptionValue]] = _EMPTY,
    source_format: str | None = None,
    snapshot: str | None = None,
    chain: bool = False,
    backing_file: StrPath | None = None,
    backing_format: str | None = None,
    backend: str = "auto",
    zero_copy: ZeroCopy = "auto",
    cache: Cache = "writeback",
    rate: int | None = None,
    force: bool = False,
    in_place: bool = False,
    keep_undo: bool = False,
    any_owner: bool = False,
    force_share: bool = False,
    allow_external: Iterable[StrPath] = (),
    source_backing_format: str | None = None,
    mode: int | None = None,
    from_snapshot: str | None = None,
    decompress: bool = False,
    decompress_limit: int | None = None,
    offset: int = 0,
    length: int | None = None,
    compress: bool = False,
    bitmaps: bool = False,
    skip_broken_bitmaps: bool = False,
    more_sources: Iterable[StrPath] = (),
    sparse: int | None = None,
    secrets: Iterable[StrPath] = (),
    parents: Iterable[StrPath] = (),
    confined: bool = False,
    verify: bool | Verify = True,
    announce: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
    verifying: Progress | None = None,
    created: Created | None = None,
) -> tuple[Result, ...]:
    """Converts the disk image `source` into each of the formats, and returns a result for each.

    The targets are named after the source, in `directory`, and appear all or none. `options` are writer options by
    format. All targets share the blocks of the source, so deleting one does not affect the others.
    """
    given = locals()
    from vmconv.conversion import pipeline
    from vmconv.conversion.fanout import requests
    from vmconv.conversion.request import Request
    from vmconv.interface.arguments import FanoutTargets, RunOptions, checked

    how = checked(RunOptions, **{name: given.pop(name) for name in RunOptions._fields})
    fan = checked(FanoutTargets, **{name: given.pop(name) for name in FanoutTargets._fields})
    common = checked(Request, target=fan.directory, **given)
    with _errors():
        return pipeline.run(*requests(common.located(), *fan), **how._asdict())


@_named
def stream(
    source: StrPath,
    descriptor: int,
    target_format: str,
    *,
    source_format: str | None = None,
    options: Mapping[str, OptionValue] = _EMPTY,
    snapshot: str | None = None,
    chain: bool = False,
    backing_file: StrPath | None = None,
    backing_format: str | None = None,
    backend: str = "auto",
    zero_copy: ZeroCopy = "auto",
    cache: Cache = "writeback",
    rate: int | None = None,
    force: bool = False,
    in_place: bool = False,
    keep_undo: bool = False,
    any_owner: bool = False,
    force_share: bool = False,
    allow_external: Iterable[StrPath] = (),
    source_backing_format: str | None = None,
    mode: int | None = None,
    from_snapshot: str | None = None,
    decompress: bool = False,
    decompress_limit: int | None = None,
    offset: int = 0,
    length: int | None = None,
    compress: bool = False,
    bitmaps: bool = False,
    skip_broken_bitmaps: bool = False,
    more_sources: Iterable[StrPath] = (),
    sparse: int | None = None,
    secrets: Iterable[StrPath] = (),
    parents: Iterable[StrPath] = (),
    verify: bool | Verify = True,
    announce: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
    verifying: Progress | None = None,
) -> Result:
    """Writes the target of `convert` to an open descriptor, such as a pipe's, and returns the result.

    The plan given to `announce` has the size. Raises `BrokenPipeError` if the reader has closed the pipe.
    """
    given = locals()
    from vmconv.interface.arguments import Descriptor, checked

    _refuse_unwritable(checked(Descriptor, descriptor=descriptor).descriptor)
    return _converted({**given, "target": "-"})


@_named
def plan(
    source: StrPath,
    target: StrPath,
    *,
    source_format: str | None = None,
    target_format: str | None = None,
    options: Mapping[str, OptionValue] = _EMPTY,
    snapshot: str | None = None,
    chain: bool = False,
    backing_file: StrPath | None = None,
    backing_format: str | None = None,
    backend: str = "auto",
    zero_copy: ZeroCopy = "auto",
    cache: Cache = "writeback",
    rate: int | None = None,
    force: bool = False,
    in_place: bool = False,
    keep_undo: bool = False,
    any_owner: bool = False,
    force_share: bool = False,
    allow_external: Iterable[StrPath] = (),
    source_backing_format: str | None = None,
    mode: int | None = None,
    from_snapshot: str | None = None,
    decompress: bool = False,
    decompress_limit: int | None = None,
    offset: int = 0,
    length: int | None = None,
    compress: bool = False,
    bitmaps: bool = False,
    skip_broken_bitmaps: bool = False,
    more_sources: Iterable[StrPath] = (),
    sparse: int | None = None,
    secrets: Iterable[StrPath] = (),
    target_secret: StrPath | None = None,
    parents: Iterable[StrPath] = (),
    confined: bool = False,
    no_create: bool = False,
    target_is_zero: bool = False,
) -> Plan:
    """Returns the plan of `convert` with the same arguments; writes nothing."""
    given = locals()
    from vmconv.conversion.pipeline import prepared
    from vmconv.conversion.request import Request
    from vmconv.interface.arguments import checked

    request = checked(Request, **given)
    with _errors(), prepared(request.located()) as ready:
        return ready.plan


@_named
def sync(
    source: StrPath,
    target: StrPath,
    *,
    source_format: str | None = None,
    target_format: str | None = None,
    options: Mapping[str, OptionValue] = _EMPTY,
    snapshot: str | None = None,
    since: StrPath | None = None,
    bitmap: str | None = None,
    compare: bool = False,
    shrink: bool = False,
    record: bool = True,
    force: bool = False,
    zero_copy: ZeroCopy = "auto",
    cache: Cache = "writeback",
    force_share: bool = False,
    allow_external: Iterable[StrPath] = (),
    source_backing_format: str | None = None,
    parents: Iterable[StrPath] = (),
    verify: bool | Verify = True,
    announce: Callable[[SyncPlan], None] | None = None,
    progress: Progress | None = None,
    verifying: Progress | None = None,
    comparing: Progress | None = None,
) -> SyncResult:
    """Brings `target`, an image that was made of `source` earlier, up to date with it, and returns the result.

    The target keeps its format, options and ids; a missing one is made. It stays as it was until the new one is
    complete. `announce` gets the plan. `comparing(bytes read, bytes to read)` is called, first with 0 bytes read, if
    both disks have to be read to find what changed.
    """
    given = locals()
    from vmconv.interface.arguments import SyncOptions, checked
    from vmconv.syncing import pipeline
    from vmconv.syncing.request import SyncRequest

    how = checked(SyncOptions, **{name: given.pop(name) for name in SyncOptions._fields})
    request = checked(SyncRequest, **given)
    with _errors():
        return pipeline.run(request, **how._asdict())


@_named
def sync_plan(
    source: StrPath,
    target: StrPath,
    *,
    source_format: str | None = None,
    target_format: str | None = None,
    options: Mapping[str, OptionValue] = _EMPTY,
    snapshot: str | None = None,
    since: StrPath | None = None,
    bitmap: str | None = None,
    compare: bool = False,
    shrink: bool = False,
    record: bool = True,
    force: bool = False,
    zero_copy: ZeroCopy = "auto",
    cache: Cache = "writeback",
    force_share: bool = False,
    allow_external: Iterable[StrPath] = (),
    source_backing_format: str | None = None,
    parents: Iterable[StrPath] = (),
) -> SyncPlan:
    """Returns what `sync` would do with the same arguments; writes nothing."""
    given = locals()
    from vmconv.interface.arguments import checked
    from vmconv.syncing import pipeline
    from vmconv.syncing.request import SyncRequest

    request = checked(SyncRequest, **given)
    with _errors():
        return pipeline.plan(request)


def _converted(given: dict[str, Any]) -> Result:
    """Checks the arguments of one conversion and runs it."""
    from vmconv.conversion import pipeline
    from vmconv.conversion.request import Request
    from vmconv.interface.arguments import RunOptions, checked

    how = checked(RunOptions, **{name: given.pop(name) for name in RunOptions._fields if name in given})
    request = checked(Request, **given)
    with _errors():
        return pipeline.run(request.located(), **how._asdict())[0]


@_named
def machine_info(
    source: StrPath,
    *,
    source_format: str | None = None,
    allow_external: Iterable[StrPath] = (),
    force_share: bool = False,
    from_snapshot: str | None = None,
    confined: bool = False,
) -> Machine:
    """Returns what the configuration `source` states of its machine. Disks are named, not opened."""
    given = locals()
    from vmconv.inspect.images import in_snapshot
    from vmconv.interface.arguments import Reading, checked
    from vmconv.machine.source import opened

    confined = given.pop("confined")
    asked = checked(Reading, path=given.pop("source"), format_name=given.pop("source_format"), **given)
    with (
        _errors(),
        opened(
            in_snapshot(asked.path, asked.from_snapshot),
            asked.format_name,
            allow_external=tuple(asked.allow_external),
            force_share=asked.force_share,
            confined=confined,
        ) as source_machine,
    ):
        return source_machine.machine


@_named
def machine_plan(
    source: StrPath,
    target: StrPath,
    *,
    source_format: str | None = None,
    target_format: str | None = None,
    options: Mapping[str, OptionValue] = _EMPTY,
    disk_format: str | None = None,
    disk_options: Mapping[str, OptionValue] = _EMPTY,
    uuid: Uuid = "guest",
    new_identity: bool = False,
    chain: bool = False,
    in_place: bool = False,
    keep_undo: bool = False,
    strict: bool = False,
    keep: Iterable[str] = (),
    backend: str = "auto",
    zero_copy: ZeroCopy = "auto",
    cache: Cache = "writeback",
    force: bool = False,
    force_share: bool = False,
    allow_external: Iterable[StrPath] = (),
    mode: int | None = None,
    from_snapshot: str | None = None,
    confined: bool = False,
) -> MachinePlan:
    """Returns what `machine_convert` would do with these arguments: carried, changed and lost settings, and disks."""
    given = locals()
    from vmconv.interface.arguments import checked
    from vmconv.machine import pipeline
    from vmconv.machine.request import MachineRequest

    request = checked(MachineRequest, **given)
    with _errors():
        return pipeline.plan(request.located())


@_named
def machine_convert(
    source: StrPath,
    target: StrPath,
    *,
    source_format: str | None = None,
    target_format: str | None = None,
    options: Mapping[str, OptionValue] = _EMPTY,
    disk_format: str | None = None,
    disk_options: Mapping[str, OptionValue] = _EMPTY,
    uuid: Uuid = "guest",
    new_identity: bool = False,
    chain: bool = False,
    in_place: bool = False,
    keep_undo: bool = False,
    strict: bool = False,
    keep: Iterable[str] = (),
    backend: str = "auto",
    zero_copy: ZeroCopy = "auto",
    cache: Cache = "writeback",
    force: bool = False,
    force_share: bool = False,
    allow_external: Iterable[StrPath] = (),
    mode: int | None = None,
    from_snapshot: str | None = None,
    confined: bool = False,
    verify: bool | Verify = True,
    announce: Callable[[MachinePlan], None] | None = None,
    progress: Progress | None = None,
    verifying: Progress | None = None,
    created: Created | None = None,
) -> MachineResult:
    """Converts the machine of the configuration `source`: configuration, firmware variables and disks.

    `target` is the new configuration, or with `target_format` the directory to make the machine in. All files of the
    machine appear, the configuration last, or none does.
    """
    given = locals()
    from vmconv.interface.arguments import RunOptions, checked
    from vmconv.machine import pipeline
    from vmconv.machine.request import MachineRequest

    how = checked(RunOptions, **{name: given.pop(name) for name in RunOptions._fields})
    request = checked(MachineRequest, **given)
    with _errors():
        return pipeline.run(request.located(), **how._asdict())


def _refuse_unwritable(descriptor: int) -> None:
    import fcntl

    try:
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    except (OSError, OverflowError, ValueError) as exc:
        raise UsageError(f"argument descriptor: {descriptor} is not open") from exc
    if mode == os.O_RDONLY:
        raise UsageError(f"argument descriptor: {descriptor} is not open for writing")


@_named
def recover(path: StrPath, *, trust: bool = False) -> Recovery:
    """Rolls back or completes the interrupted conversion of the file `path`.

    That is a conversion in place, or one of several files that was interrupted while it renamed them. A journal in
    place must be of this user and of this directory; `trust` accepts any.
    """
    from vmconv.inplace.group import recover as recover_path
    from vmconv.interface.arguments import RestoreOptions, checked

    journal = checked(RestoreOptions, path=path, trust=trust)
    with _errors():
        return recover_path(journal.path, trust=journal.trust)


@_named
def resize(
    path: StrPath,
    size: int,
    *,
    relative: bool = False,
    source_format: str | None = None,
    shrink: bool = False,
    keep_undo: bool = False,
    any_owner: bool = False,
    allow_external: Iterable[StrPath] = (),
    source_backing_format: str | None = None,
    preallocation: Preallocation = "off",
    announce: Callable[[Plan], None] | None = None,
) -> Result:
    """Gives the disk in `path` a size of `size` bytes, or with `relative` one that differs by `size`.

    Payload stays where it lies, and the image keeps its options and ids. A smaller disk needs `shrink`: what lies
    behind its end is lost. `preallocation` allocates the space that a raw disk grows by.
    """
    given = locals()
    del given["announce"]
    from vmconv.conversion.resizing import resize as resized
    from vmconv.interface.arguments import Resizing, checked

    asked = checked(Resizing, **given)
    with _errors():
        return resized(asked, announce)


@_named
def bitmap(
    path: StrPath,
    name: str,
    changes: Iterable[str],
    *,
    granularity: int = 0,
    source_format: str | None = None,
    keep_undo: bool = False,
    allow_external: Iterable[StrPath] = (),
    merge_from: StrPath | None = None,
    merge_format: str | None = None,
) -> Edited:
    """Changes a persistent bitmap of the image in `path`. `info` lists them.

    `changes` are "add", "remove", "clear", "enable", "disable" or "merge:SOURCE", made in this order as one edit. An
    added bitmap has a bit for each `granularity` bytes, 0 for the format's choice. SOURCE is a bitmap of the image
    `merge_from`, of the format `merge_format`, or of the image itself.
    """
    given = locals()
    from vmconv.conversion.bitmaps import change_bitmaps
    from vmconv.interface.arguments import Bitmapping, checked

    asked = checked(Bitmapping, **given)
    with _errors():
        return change_bitmaps(asked)


@_named
def repair(
    path: StrPath,
    what: Literal["leaks", "all"] = "all",
    *,
    source_format: str | None = None,
    keep_undo: bool = False,
    allow_external: Iterable[StrPath] = (),
) -> Repaired | None:
    """Repairs the structure of the image in `path`: leaks, or all that follows from the rest of the image.

    Returns the checks before and afterwards; None if the format has no structure to check. The guest's content stays.
    """
    given = locals()
    from vmconv.conversion.repairing import repair as repaired
    from vmconv.interface.arguments import Repairing, checked

    asked = checked(Repairing, **given)
    with _errors():
        return repaired(asked)


@_named
def snapshot(
    path: StrPath,
    verb: Literal["create", "delete", "apply"],
    name: str,
    *,
    source_format: str | None = None,
    keep_undo: bool = False,
    allow_external: Iterable[StrPath] = (),
) -> Edited:
    """Takes an internal snapshot of the image in `path`, deletes it, or makes the disk what it was in it.

    A name or an id names an existing snapshot. `info` lists them.
    """
    given = locals()
    from vmconv.conversion.snapshots import change_snapshots
    from vmconv.interface.arguments import Snapshotting, checked

    asked = checked(Snapshotting, **given)
    with _errors():
        return change_snapshots(asked)


@_named
def commit(
    path: StrPath,
    *,
    base: StrPath | None = None,
    keep_top: bool = False,
    source_format: str | None = None,
    force: bool = False,
    allow_external: Iterable[StrPath] = (),
    source_backing_format: str | None = None,
    announce: Callable[[Plan], None] | None = None,
) -> CommitResult:
    """Brings the content of the layer `path` into its parent, or into the deeper layer `base`, and empties it.

    `keep_top` leaves it as it is, as with a deeper layer. `force` allows other layers on the base, which become wrong.
    """
    given = locals()
    del given["announce"]
    from vmconv.interface.arguments import Committing, checked
    from vmconv.syncing.commit import commit as committed

    asked = checked(Committing, **given)
    with _errors():
        return committed(asked, announce)


@_named
def rebase(
    path: StrPath,
    backing_file: str,
    *,
    backing_format: str | None = None,
    unsafe: bool = False,
    source_format: str | None = None,
    keep_undo: bool = False,
    allow_external: Iterable[StrPath] = (),
    parents: Iterable[StrPath] = (),
    announce: Callable[[Plan], None] | None = None,
) -> Edited | RebaseResult:
    """Gives the layer in `path` another parent, or none for an empty name.

    The guest's disk stays as it is: where the parents differ, the old content becomes the layer's own. With `unsafe`
    only the stored name and format change, and the parent is not opened: the caller knows that it has the content of
    the old one.
    """
    given = locals()
    del given["announce"]
    from vmconv.interface.arguments import Rebasing, checked

    asked = checked(Rebasing, **given)
    if asked.parents and asked.unsafe:
        raise UsageError("--parent: with -u no parent is opened", hint="-b names the one that is there now")
    if asked.keep_undo and not asked.unsafe:
        raise UsageError("--keep-undo is for -u", hint="without it, the old file is whole until the new one is")
    with _errors():
        if asked.unsafe:
            from vmconv.conversion.rebasing import rebase_unsafely

            return rebase_unsafely(asked)
        from vmconv.syncing.rebase import rebase as rebased

        return rebased(asked, announce)


@_named
def undo(path: StrPath, *, trust: bool = False) -> str:
    """Turns the target of a conversion in place back into its source, and returns the source's path.

    Needs the undo file of `keep_undo`, and a target that was not written since. The undo file must be of this user and
    of this directory; `trust` accepts any.
    """
    from vmconv.inplace.undo import undo as undo_path
    from vmconv.interface.arguments import RestoreOptions, checked

    kept = checked(RestoreOptions, path=path, trust=trust)
    with _errors():
        return undo_path(kept.path, trust=kept.trust)


@_named
def info(
    path: StrPath,
    *,
    format_name: str | None = None,
    backing_format: str | None = None,
    allow_external: Iterable[StrPath] = (),
    force_share: bool = False,
    secrets: Iterable[StrPath] = (),
    parents: Iterable[StrPath] = (),
    from_snapshot: str | None = None,
) -> dict[str, Any]:
    """Returns the description of an image with the keys of `qemu-img info --output=json`; reads only its header."""
    given = locals()
    from vmconv.inspect.images import described, opened
    from vmconv.interface.arguments import Reading, checked

    asked = checked(Reading, **given)
    with _errors(), opened(asked, content_decides=True) as (image, opener):
        return described(image, opener)


@_named
def map_disk(
    path: StrPath,
    *,
    format_name: str | None = None,
    backing_format: str | None = None,
    allow_external: Iterable[StrPath] = (),
    force_share: bool = False,
    secrets: Iterable[StrPath] = (),
    parents: Iterable[StrPath] = (),
    start_offset: int = 0,
    max_length: int | None = None,
    from_snapshot: str | None = None,
) -> list[MapRow]:
    """Returns where each range of the guest's disk lies, with all layers of the chain merged.

    `start_offset` and `max_length` cut the map to bytes `[start_offset, start_offset + max_length)` of the disk.
    """
    given = locals()
    from vmconv.inspect.images import opened
    from vmconv.inspect.mapping import map_rows
    from vmconv.interface.arguments import MapOptions, Reading, checked

    part = checked(MapOptions, **{name: given.pop(name) for name in MapOptions._fields})
    asked = checked(Reading, **given)
    with _errors(), opened(asked) as (image, _):
        return list(map_rows(image, part.start_offset, part.max_length))


@_named
def measure(
    target_format: str,
    source: StrPath | None = None,
    *,
    size: int | None = None,
    options: Mapping[str, OptionValue] = _EMPTY,
    source_format: str | None = None,
    snapshot: str | None = None,
    force_share: bool = False,
    allow_external: Iterable[StrPath] = (),
    source_backing_format: str | None = None,
    secrets: Iterable[StrPath] = (),
    parents: Iterable[StrPath] = (),
) -> Measure:
    """Returns how large an image of the disk in `source`, or of an empty disk of `size` bytes, will be in a format."""
    given = locals()
    from vmconv.conversion.measuring import measure as measured
    from vmconv.interface.arguments import Measuring, checked

    asked = checked(Measuring, **given)
    with _errors():
        return measured(asked)


@_named
def check(
    path: StrPath,
    *,
    format_name: str | None = None,
    backing_format: str | None = None,
    allow_external: Iterable[StrPath] = (),
    force_share: bool = False,
    secrets: Iterable[StrPath] = (),
    parents: Iterable[StrPath] = (),
    payload: bool = False,
    from_snapshot: str | None = None,
) -> CheckReport | None:
    """Returns the defects of an image and of the files it refers to; None if the format has no structure to check.

    `payload`: also read all of the disk and compare it with the hashes that the image stores.
    """
    given = locals()
    from vmconv.inspect.checking import check_image
    from vmconv.inspect.images import opened
    from vmconv.interface.arguments import CheckOptions, Reading, checked

    how = checked(CheckOptions, payload=given.pop("payload"))
    asked = checked(Reading, **given)
    with _errors(), opened(asked) as (image, opener):
        return check_image(image, opener, payload=how.payload)


@_named
def compare(
    left: StrPath,
    right: StrPath,
    *,
    left_format: str | None = None,
    right_format: str | None = None,
    backing_format: str | None = None,
    allow_external: Iterable[StrPath] = (),
    force_share: bool = False,
    secrets: Iterable[StrPath] = (),
    parents: Iterable[StrPath] = (),
    strict: bool = False,
) -> Comparison:
    """Returns the comparison of two disks as guests read them, true if equal. Reads only ranges that are not shared."""
    given = locals()
    from vmconv.inspect.comparison import compare_images
    from vmconv.inspect.images import both
    from vmconv.interface.arguments import ImagePair, checked

    pair = checked(ImagePair, **given)
    with _errors(), both(pair) as (one, other):
        return compare_images(one, other, strict=pair.strict)


@_named
def prove(
    left: StrPath,
    right: StrPath,
    *,
    left_format: str | None = None,
    right_format: str | None = None,
    backing_format: str | None = None,
    allow_external: Iterable[StrPath] = (),
    force_share: bool = False,
    secrets: Iterable[StrPath] = (),
    parents: Iterable[StrPath] = (),
) -> Proof:
    """Returns the proof, by physical addresses, that two images share payload; true if they share all of it."""
    given = locals()
    from vmconv.inspect.images import both
    from vmconv.inspect.proof import prove_images
    from vmconv.interface.arguments import ImagePair, checked

    with _errors(), both(checked(ImagePair, **given)) as (one, other):
        return prove_images(one, other)


@contextmanager
def _errors() -> Iterator[None]:
    """Turns errors of the system and of plugins into `VmconvError`; `BrokenPipeError` passes."""
    from vmconv.io.faults import plugin_faults

    try:
        with plugin_faults():
            yield
    # The reader of a pipe may stop at any time; that is no failure of storage.
    except BrokenPipeError:
        raise
    except OSError as exc:
        name = f"{os.fsdecode(exc.filename)}: " if isinstance(exc.filename, str | bytes) else ""
        raise BackendError(f"{name}{exc.strerror or exc}") from exc
