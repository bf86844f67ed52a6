"""The disks of one machine, changed in place together with small files that appear beside them: all, or none.

    journal durable -> each disk by itself, with its undo file -> small files written, durable -> COMMIT, durable
    -> small files named, durable -> undo files removed -> journal removed

Before the commit, disks that are done are turned back by their undo files. After it, the group is completed, from the
journal alone. Both may be interrupted and repeated: by this run, by `vmconv recover`, and by any command that opens one
of the files and does not find it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from vmconv.backends.files import FileTransaction
from vmconv.backends.targets import clean, open_directory
from vmconv.errors import BackendError, ImageError, PlanError, VmconvError, os_errors, warn
from vmconv.inplace import codec, recovery
from vmconv.inplace import journal as journals
from vmconv.inplace.journalled import Journalled
from vmconv.inplace.names import GROUP, JOURNAL, UNDO, beside
from vmconv.inplace.recovery import Recovery, StrangerError
from vmconv.inplace.syscalls import Syscalls
from vmconv.inplace.undo import undo
from vmconv.interface.backend import Access
from vmconv.io import ownership
from vmconv.io.directory import Directory
from vmconv.system import linux, signals

if TYPE_CHECKING:
    from vmconv.interface.backend import Created
    from vmconv.model.sources import File

MAGIC = b"vmconv: a machine is being converted in place; vmconv recover\n".ljust(64, b"\0")


class Small(NamedTuple):
    """A small file to make."""

    name: str
    content: bytes


class Group(NamedTuple):
    """Files of one directory: `disks` are the old and the new name of each, `files` the small ones in their order.

    `mode` are the permissions of the small files. Unless `keep_undo`, the undo files are removed at the end.
    """

    disks: tuple[tuple[str, str], ...]
    files: tuple[Small, ...]
    mode: int
    keep_undo: bool

    @property
    def names(self) -> set[str]:
        """Names by which recovery finds this group."""
        return {name for disk in self.disks for name in disk} | {file.name for file in self.files}

    @property
    def entry(self) -> str:
        """The name of the journal."""
        return beside(self.files[-1].name, GROUP)

    def encoded(self) -> bytes:
        """Returns the body of the journal."""
        values = {
            "disks": self.disks,
            "files": [(file.name, len(file.content)) for file in self.files],
            "mode": self.mode,
            "keep_undo": self.keep_undo,
        }
        return codec.encode(values, ()) + b"".join(file.content for file in self.files)


def parse(body: bytes, path: str) -> Group:
    """Returns the group of a journal's body. Raises `ImageError` if a name leaves the directory or a field is wrong."""
    fields, tables = codec.decode(path, memoryview(body), journals.BODY_OFFSET)
    disks = tuple(_pair(fields, each) for each in fields.items("disks"))
    sizes = [_pair_of_size(fields, each) for each in fields.items("files")]
    fields.apart("files", [name for name, _ in sizes])
    mode, keep_undo = fields.number("mode", 0o777), fields.flag("keep_undo")
    fields.end()
    rest = bytes(tables.body[tables.at :])
    if not sizes or sum(size for _, size in sizes) != len(rest):
        raise ImageError(f"{path}: files at {fields.offset:#x}: have not the {len(rest)} bytes behind the fields")
    files, at = [], 0
    for name, size in sizes:
        files.append(Small(name, rest[at : at + size]))
        at += size
    return Group(disks, tuple(files), mode, keep_undo)


def _pair(fields: codec.Fields, value: Any) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 2:
        fields.refuse("disks", value, "an old and a new name")
    return fields.checked_name("disks", value[0], ()), fields.checked_name("disks", value[1], ())


def _pair_of_size(fields: codec.Fields, value: Any) -> tuple[str, int]:
    if not isinstance(value, list) or len(value) != 2:
        fields.refuse("files", value, "a name and a size")
    return fields.checked_name("files", value[0], ()), fields.checked_number("files", value[1], codec.MAX_BODY)


class Changing(Journalled):
    """A group that is being changed in a directory."""

    def __init__(self, directory: Directory, group: Group, calls: Syscalls, *, trust: bool = False) -> None:
        super().__init__(directory, calls, group.entry)
        self.group = group
        self.trust = trust

    @property
    def target(self) -> str:
        """The path of the file that is named last."""
        return self.directory.join(self.group.files[-1].name)

    def begin(self) -> None:
        """Syncs the journal. No disk may be changed before."""
        body = self.group.encoded()
        # A journal that cannot be read back must fail now, not during recovery.
        parse(body, self.target)
        encoded = journals.sealed(body, lambda digest: ownership.mark(self.directory, digest), MAGIC)
        path = self.directory.join(self.entry)
        with signals.held(), os_errors("cannot be made", where=path):
            if self.directory.has(self.entry):
                hint = f"if a conversion was interrupted: vmconv recover {self.target}; else move it away"
                raise PlanError(f"{path}: is in the way of a conversion in place", hint=hint)
            self._start(encoded, self.target)

    @contextmanager
    def written(self, created: Created | None = None) -> Iterator[tuple[FileTransaction, list[File]]]:
        """Yields the finished small files that do not exist yet, without their names, and what names them."""
        access = Access((), self.group.mode)
        transaction = FileTransaction(self.directory, force=False, durable=True, access=access)
        try:
            files = []
            for small in self.group.files:
                output = transaction.create(small.name, len(small.content), ())
                output.write(0, small.content)
                if created:
                    created(small.name, output.descriptor)
                files.append(output.finish())
            yield transaction, files
        finally:
            with signals.held():
                transaction.abort()

    def finish(self, transaction: FileTransaction) -> None:
        """Commits the group and completes it; `transaction` names the small files."""
        with signals.held():
            for file in self.group.files:
                if self.directory.has(file.name):
                    raise PlanError(f"{self.directory.join(file.name)}: was created during the conversion")
            self._commit(self.target)
            try:
                transaction.commit()
                self.complete()
            except (OSError, VmconvError) as exc:
                raise BackendError(
                    f"{self.target}: the machine's disks are converted, and its files are not complete: {exc}",
                    hint=f"vmconv recover {self.target} completes them",
                ) from exc

    def complete(self) -> None:
        """Completes a committed group; may be repeated."""
        # A set of names that was committed and not completed.
        clean(self.directory, [file.name for file in self.group.files])
        name, content = self.group.files[-1]
        if not self.directory.has(name):
            for file in self.group.files:
                if self.directory.has(file.name):
                    raise self._strange(file.name)
            with self.written() as (transaction, _):
                transaction.commit()
        elif self._content(name, len(content)) != content:
            raise self._strange(name)
        if not self.group.keep_undo:
            for _, target in self.group.disks:
                if self.directory.has(beside(target, UNDO)):
                    self.calls.unlink(self.directory, beside(target, UNDO))
            self.calls.sync_directory(self.directory)
        self._remove_journal()

    def _strange(self, name: str) -> BackendError:
        return BackendError(
            f"{self.directory.join(name)}: is not the file of the conversion in place, which is committed",
            hint=f"move it away, then vmconv recover {self.target}",
        )

    def _content(self, name: str, length: int) -> bytes:
        descriptor = self.directory.open(name)
        try:
            return linux.read_at(descriptor, length + 1, 0)
        finally:
            linux.close(descriptor)

    def roll_back(self) -> None:
        """Turns all disks back, the last one first; may be repeated."""
        for source, target in reversed(self.group.disks):
            for name in dict.fromkeys((target, source)):
                recovery.recover_disk(self.directory, name, self.calls, trust=self.trust)
            if self.directory.has(beside(target, UNDO)):
                undo(self.directory.join(target), trust=self.trust, calls=self.calls)
        clean(self.directory, [file.name for file in self.group.files])
        self._remove_journal()

    def _not_rolled_back(self, exc: OSError | VmconvError) -> BackendError:
        return BackendError(
            f"{self.target}: the machine's disks cannot all be turned back: {exc}",
            hint=f"vmconv recover {self.target}",
        )


# -- after a run that was stopped


def recover(path: str, *, trust: bool = False) -> Recovery:
    """Completes or turns back the interrupted change of a machine's disks, or of a single disk, with this file.

    `path` may be any of its files, old or new, or its journal. With `trust` follows any user's journal.
    """
    return _recover(path, trust=trust) or recovery.recover(path, trust=trust)


def _recover(path: str, *, trust: bool) -> Recovery | None:
    folder, name = os.path.split(os.path.abspath(path))
    with os_errors("cannot be recovered", where=path), open_directory(folder) as directory:
        entry = _find(directory, {name}, trust=trust)
        return None if entry is None else _follow(directory, entry, Syscalls(), trust=trust)


def recover_if_own(path: str) -> Recovery | None:
    """Completes or rolls back the interrupted change of a machine's disks; returns None without one.

    Raises `AccessError` if the run is alive. A journal that may be another user's is ignored with a warning.
    """
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        return None
    try:
        return _recover(path, trust=False)
    except StrangerError as exc:
        warn(f"{exc}; it is ignored")
        return None


def refuse_interrupted(directory: Directory, names: Collection[str]) -> None:
    """Completes or turns back the interrupted groups with one of these names, before another one begins.

    Raises `PlanError` if one has been completed: its files are new ones now.
    """
    while (entry := _find(directory, names, trust=False)) is not None:
        done = _follow(directory, entry, Syscalls(), trust=False)
        if done.forward:
            raise PlanError(f"{done.path}: its interrupted conversion has been completed")
        warn(f"{directory.join(entry.removesuffix(GROUP))}: its interrupted conversion in place has been rolled back")


def _find(directory: Directory, names: Collection[str], *, trust: bool) -> str | None:
    """Returns the journal that knows one of the names, which may be its own."""
    for entry in (*names, *(beside(name, GROUP) for name in names)):
        if entry.endswith(GROUP) and directory.has(entry):
            return entry
    for entry in directory.listed():
        if entry.endswith(GROUP):
            # One that cannot be followed must not block all others.
            with suppress(VmconvError, OSError):
                descriptor = recovery.open_journal(directory, entry, trust=trust)
                try:
                    found = _read(directory, descriptor, entry, trust=trust)
                finally:
                    linux.close(descriptor)
                if found is not None and not {*found[0].names, *_beside(found[0])}.isdisjoint(names):
                    return entry
    return None


def _beside(group: Group) -> Iterator[str]:
    """Yields the names of the disks' own journals."""
    for disk in group.disks:
        yield from (beside(name, JOURNAL) for name in disk)


def _read(directory: Directory, descriptor: int, entry: str, *, trust: bool) -> tuple[Group, bool] | None:
    """Returns the group of a journal, and whether it is committed; None if the journal is torn.

    Raises `StrangerError`, before parsing the body, if it may be forged.
    """
    path = directory.join(entry)
    head = journals.read_head(descriptor, path, MAGIC)
    if head is None:
        return None
    if not trust:
        recovery.refuse_stranger(path, ownership.forged(directory, head.digest, head.mark))
    there = journals.read_body(descriptor, head)
    if there is None:
        return None
    group = parse(there[0], path)
    if group.entry != entry:
        raise ImageError(f"{path}: files at {journals.BODY_OFFSET:#x}: have another journal, {group.entry}")
    return group, there[1]


def _follow(directory: Directory, entry: str, calls: Syscalls, *, trust: bool) -> Recovery:
    with recovery.locked(directory, entry, trust=trust) as record:
        found = _read(directory, record, entry, trust=trust)
        if found is None:
            # It was never durable, so no disk was changed.
            calls.unlink(directory, entry)
            calls.sync_directory(directory)
            return Recovery(directory.join(entry.removesuffix(GROUP)), False)
        group, committed = found
        changing = Changing(directory, group, calls, trust=trust)
        if committed:
            changing.complete()
            return Recovery(changing.target, True)
        changing.roll_back()
        return Recovery(directory.join(next((old for old, _ in group.disks), group.files[-1].name)), False)
