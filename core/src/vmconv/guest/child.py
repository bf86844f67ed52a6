"""The child: gives up all rights, reads the guest's filesystems by bytes from its parent, and answers with facts.

python -m vmconv.guest.child < SOCKET
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, TypeVar

from vmconv.guest import linux, windows
from vmconv.guest.contents import content_of
from vmconv.guest.facts import MAX_ITEMS, Facts, Problem, System, cut
from vmconv.guest.filesystems import LIBRARIES, Filesystem
from vmconv.guest.lvm import LogicalVolume, logical_volumes, open_group
from vmconv.guest.protocol import ANSWER, LENGTH, REQUEST, Task, Volume
from vmconv.guest.sandbox import confine
from vmconv.guest.volumes import Parent, Read, reader

_NEEDED_LATER = ("lz4.block", "zstandard", "encodings.idna", "encodings.utf_16_le", "encodings.latin_1")
"""Modules that would otherwise be imported when files can no longer be opened."""


_Result = TypeVar("_Result")


def main() -> None:
    """Runs the child. Whatever it raises ends it, and the parent says so."""
    for name in (*LIBRARIES.values(), windows.REGISTRY, *_NEEDED_LATER):
        _try_import(name)
    confine()
    parent = Parent(0)
    (length,) = LENGTH.unpack(parent.receive(LENGTH.size))
    volumes, drivers, services = json.loads(parent.receive(length))
    task = Task(tuple(Volume(*each) for each in volumes), tuple(drivers), tuple(services))
    answer = json.dumps(dataclasses.asdict(_Look(parent, task).run())).encode()
    parent.send(REQUEST.pack(ANSWER, 0, 0, len(answer)) + answer)
    os._exit(0)


def _try_import(name: str) -> bool:
    try:
        import_module(name)
    except ImportError:
        return False
    return True


class _Look:
    """One look at all volumes; what cannot be read becomes a problem."""

    def __init__(self, parent: Parent, task: Task) -> None:
        self._parent, self._task = parent, task
        self.problems: list[Problem] = []
        self.systems: list[System] = []

    def run(self) -> Facts:
        filesystems = list(self._filesystems())
        roots = [each for each in filesystems if self._try(each.where, linux.is_root, each)]
        boots = [each for each in filesystems if each not in roots and self._try(each.where, linux.is_boot, each)]
        for root in roots:
            found = self._try(root.where, linux.examine, root, boots, self._task.drivers)
            self.systems += [found] if found else []
        for each in filesystems:
            if self._try(each.where, windows.is_windows, each):
                found = self._try(each.where, windows.examine, each, self._task.services)
                self.systems += [found] if found else []
        return Facts(tuple(self.systems[:MAX_ITEMS]), tuple(self.problems[:MAX_ITEMS]))

    def _filesystems(self) -> Iterator[Filesystem]:
        for volume in self._task.volumes:
            where = f"{volume.where} ({volume.content})"
            if not _try_import(LIBRARIES[volume.content]):
                self.problems.append(Problem(where, "no library is installed for its filesystem"))
                continue
            read = reader(self._parent, volume.disk, volume.start, volume.length)
            if volume.content == "lvm":
                # The handle has to stay as long as its volumes.
                group = self._try(where, open_group, read, volume.length)
                for each in self._try(where, logical_volumes, group) or () if group is not None else ():
                    yield from self._in_volume(f"{volume.where}: {each.name}", each)
            else:
                yield from self._opened(where, volume.content, read, volume.length)

    def _in_volume(self, where: str, volume: LogicalVolume) -> Iterator[Filesystem]:
        content = self._try(where, content_of, volume, 0)
        if content in LIBRARIES and content != "lvm" and _try_import(LIBRARIES[content]):
            yield from self._opened(f"{where} ({content})", content, volume.read, volume.size)
        elif content is not None:
            self.problems.append(Problem(where, f"no library can read its content ({content})"))

    def _opened(self, where: str, content: str, read: Read, size: int) -> Iterator[Filesystem]:
        found = self._try(where, Filesystem, content, read, size, where)
        if found is not None:
            yield found

    def _try(self, where: str, what: Callable[..., _Result], *given: Any) -> _Result | None:
        """Returns what a function returns; None if it fails."""
        try:
            return what(*given)
        # The libraries raise OSError for what is damaged, and anything for what they do not expect.
        except Exception as exc:
            said = " ".join(str(exc).split()) or type(exc).__name__
            refused = "too much would have to be read"
            text = refused if self._parent.has_refused else cut(f"its filesystem cannot be read: {said}")
            self.problems.append(Problem(where, text))
        return None


if __name__ == "__main__":
    main()
