"""Runs that are stopped: a double of the system calls that ends a run at any of them, and a model of a power cut.

A killed process leaves all that it had asked for. A power cut leaves what was synced, and of the rest any part: each
write by itself or not, each of its sectors by itself or not, each new name by itself or not.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vmconv.errors import VmconvError
from vmconv.inplace.syscalls import Syscalls
from vmconv.io.directory import Directory
from vmconv.system import linux

SECTOR = 512
_ALL_SUBSETS = 6
"""Up to this number of pending operations, all their subsets are tried."""


class Stopped(BaseException):
    """The process was killed here."""


class StoppingCalls(Syscalls):
    """Ends the run before call number `at`, counted from 0, or, with `half`, in the middle of it when it is a write."""

    def __init__(self, at: int, *, half: bool = False) -> None:
        self.at = at
        self.half = half
        self.made = 0
        self.dead = False

    def _step(self) -> None:
        if self.dead or (self.made == self.at and not self.half):
            self.dead = True
            raise Stopped
        self.made += 1

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        if self.half and not self.dead and self.made == self.at:
            super().write(descriptor, data[: len(data) // 2], offset)
            self.dead = True
        self._step()
        super().write(descriptor, data, offset)


def _counted(name: str) -> Callable[..., Any]:
    def call(self: StoppingCalls, *arguments: Any, **more: Any) -> Any:
        self._step()
        return getattr(Syscalls, name)(self, *arguments, **more)

    return call


OTHERS = (
    "create",
    "punch",
    "collapse",
    "insert",
    "truncate",
    "set_times",
    "carry",
    "set_mode",
    "sync",
    "rename",
    "unlink",
    "sync_directory",
)
for _name in OTHERS:
    setattr(StoppingCalls, _name, _counted(_name))


class TornCalls(Syscalls):
    """Ends the run in the middle of shift number `at`: what lies before `edge` of the rest is shifted, or not yet.

    A filesystem shifts extent by extent, forward from the first, or backward from the last.
    """

    def __init__(self, at: int, edge: float) -> None:
        self.at = at
        self.edge = edge
        self.made = 0

    def _tear(self, descriptor: int, offset: int) -> int:
        """Returns where the shift stops: between two blocks that have data, at a part of the way."""
        size = os.fstat(descriptor).st_size
        return offset + int((size - offset) * self.edge) // 4096 * 4096

    def collapse(self, descriptor: int, offset: int, length: int) -> None:
        super().collapse(descriptor, offset, length)
        if self.made == self.at:
            super().insert(descriptor, self._tear(descriptor, offset), length)
            raise Stopped
        self.made += 1

    def insert(self, descriptor: int, offset: int, length: int) -> None:
        if self.made == self.at:
            super().insert(descriptor, self._tear(descriptor, offset), length)
            raise Stopped
        super().insert(descriptor, offset, length)
        self.made += 1


# The model of a power cut


@dataclass
class Node:
    """A file: its bytes, and when it was changed last."""

    data: bytearray
    mtime: int

    def copy(self) -> Node:
        return Node(bytearray(self.data), self.mtime)

    def change(self, action: Action) -> None:
        """Does what a call did to the file."""
        data, offset, length = self.data, action.offset, action.length
        # Any time will do that is not the one it had.
        self.mtime = offset if action.call == "set_times" else 1
        if action.call == "truncate":
            del data[offset:]
        if action.call in ("truncate", "write"):
            data.extend(bytes(max(0, offset + length - len(data))))
        if action.call == "write":
            data[offset : offset + length] = action.data
        elif action.call == "punch":
            inside = max(0, min(length, len(data) - offset))
            data[offset : offset + inside] = bytes(inside)


class Action(NamedTuple):
    """One call, as it is replayed: what it was, of which file (by number) or name, and how."""

    call: str
    node: int = -1
    offset: int = 0
    length: int = 0
    data: bytes = b""
    old: str = ""
    new: str = ""


class RecordingCalls(Syscalls):
    """Makes every call, and keeps a log from which what storage had at any moment can be told."""

    def __init__(self, directory: Path) -> None:
        self.nodes = {
            path.stat().st_ino: Node(bytearray(path.read_bytes()), path.stat().st_mtime_ns)
            for path in directory.iterdir()
        }
        self.names = {path.name: path.stat().st_ino for path in directory.iterdir()}
        self.log: list[Action] = []

    def create(self, directory: Directory, name: str) -> int:
        descriptor = super().create(directory, name)
        self.log.append(Action("create", os.fstat(descriptor).st_ino, new=name))
        return descriptor

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        super().write(descriptor, data, offset)
        self._add("write", descriptor, offset, len(data), bytes(data))

    def punch(self, descriptor: int, offset: int, length: int) -> None:
        super().punch(descriptor, offset, length)
        self._add("punch", descriptor, offset, length)

    def collapse(self, descriptor: int, offset: int, length: int) -> None:
        super().collapse(descriptor, offset, length)
        self._add("collapse", descriptor, offset, length)

    def insert(self, descriptor: int, offset: int, length: int) -> None:
        super().insert(descriptor, offset, length)
        self._add("insert", descriptor, offset, length)

    def truncate(self, descriptor: int, size: int) -> None:
        super().truncate(descriptor, size)
        self._add("truncate", descriptor, size)

    def set_times(self, descriptor: int, mtime: int) -> None:
        super().set_times(descriptor, mtime)
        self._add("set_times", descriptor, mtime)

    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        self._add("sync", descriptor)

    def carry(self, source: int, target: int, others: Iterable[int] = ()) -> tuple[str, ...]:
        missing = super().carry(source, target, others)
        self._add("carry", target)
        return missing

    def set_mode(self, descriptor: int, mode: int) -> None:
        super().set_mode(descriptor, mode)
        self._add("set_mode", descriptor)

    def rename(self, directory: Directory, old: str, new: str, *, replace: bool) -> None:
        super().rename(directory, old, new, replace=replace)
        self.log.append(Action("rename", old=old, new=new))

    def unlink(self, directory: Directory, name: str) -> None:
        super().unlink(directory, name)
        self.log.append(Action("unlink", old=name))

    def sync_directory(self, directory: Directory) -> None:
        super().sync_directory(directory)
        self.log.append(Action("sync_directory"))

    def _add(self, call: str, descriptor: int, offset: int = 0, length: int = 0, data: bytes = b"") -> None:
        self.log.append(Action(call, os.fstat(descriptor).st_ino, offset, length, data))


@dataclass
class Storage:
    """What is durable after a number of calls, and what is pending."""

    nodes: dict[int, Node]
    names: dict[str, int]
    pending: dict[int, list[Action]] = field(default_factory=dict)
    """By file; those of the directory are under -1."""

    def add(self, action: Action) -> None:
        if action.call == "sync":
            self._settle(action.node)
        elif action.call == "sync_directory":
            self._settle(-1)
        elif action.call in ("create", "rename", "unlink"):
            if action.call == "create":
                self.nodes[action.node] = Node(bytearray(), 0)
            self.pending.setdefault(-1, []).append(action)
        else:
            self.pending.setdefault(action.node, []).append(action)

    def _settle(self, number: int) -> None:
        for action in self.pending.pop(number, []):
            self.apply(action)

    def apply(self, action: Action) -> None:
        if action.call == "create":
            self.names[action.new] = action.node
        elif action.call == "unlink":
            self.names.pop(action.old, None)
        elif action.call == "rename" and action.old in self.names:
            self.names[action.new] = self.names.pop(action.old)
        elif action.call in ("write", "punch", "truncate", "set_times"):
            self.nodes[action.node].change(action)

    def after(self, kept: list[Action]) -> Storage:
        """Returns the storage when of all that is pending only these were done."""
        there = Storage(dict(self.nodes), dict(self.names))
        for number in {action.node for action in kept} & set(there.nodes):
            there.nodes[number] = there.nodes[number].copy()
        for action in kept:
            there.apply(action)
        return there

    def cuts(self, rng: random.Random, most: int) -> Iterator[Storage]:
        """Yields what a power cut may leave: all subsets of what is pending when they are few, else some."""
        waiting = [action for actions in self.pending.values() for action in actions]
        if len(waiting) <= _ALL_SUBSETS:
            for chosen in itertools.product((False, True), repeat=len(waiting)):
                yield self.after(list(itertools.compress(waiting, chosen)))
        else:
            for _ in range(most):
                some = rng.choices((False, True), k=len(waiting))
                yield self.after(list(itertools.compress(waiting, some)))
        if any(action.call == "write" for action in waiting):
            for _ in range(most // 4):
                yield self.after([part for action in waiting for part in _torn(action, rng)])

    def make(self, directory: Path) -> None:
        """Makes real files of it."""
        for name, number in self.names.items():
            node = self.nodes[number]
            path = directory / name
            path.write_bytes(node.data)
            os.utime(path, ns=(node.mtime, node.mtime))


def _torn(action: Action, rng: random.Random) -> Iterator[Action]:
    """Yields the parts of a write that reached storage: sectors by chance, or a beginning."""
    if action.call != "write":
        if rng.random() < 0.5:
            yield action
        return
    edges = sorted({action.offset, *range(-(-action.offset // SECTOR) * SECTOR, action.offset + action.length, SECTOR)})
    beginning = rng.randrange(len(edges) + 1) if rng.random() < 0.5 else None
    for number, (low, high) in enumerate(itertools.pairwise([*edges, action.offset + action.length])):
        if number < beginning if beginning is not None else rng.random() < 0.5:
            data = action.data[low - action.offset : high - action.offset]
            yield action._replace(offset=low, length=high - low, data=data)


def storages(calls: RecordingCalls) -> Iterator[tuple[int, Storage]]:
    """Yields the storage before the first call, after it, and after each further one."""
    there = Storage({number: node.copy() for number, node in calls.nodes.items()}, dict(calls.names))
    yield 0, there
    for number, action in enumerate(calls.log, start=1):
        there.add(action)
        yield number, there


# Whole runs, at the level of the operating system

_OS_CALLS = ("link", "rename", "unlink", "mkdir", "rmdir", "pwrite", "pwritev", "write", "fsync", "ftruncate", "utime")
_LINUX_CALLS = ("clone_range", "punch_hole", "collapse_range", "insert_range", "rename_new", "set_inode_flags")


def in_child(run: Callable[[], object], reached: Callable[[int], None]) -> int:
    """Runs in a child process; `reached` is called before each call that changes storage, with its number.

    Returns the exit code: 0, 1 after an error of vmconv, or what the child exits with.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 99
    try:
        _count(reached)
        run()
        code = 0
    except VmconvError as exc:
        print(exc, exc.hint, file=sys.stderr, flush=True)
        code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _count(reached: Callable[[int], None]) -> None:
    """Makes each call that changes storage call `reached` before."""
    numbers = itertools.count()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **more: Any) -> Any:
            reached(next(numbers))
            return call(*arguments, **more)

        return wrapped

    for module, names in ((os, _OS_CALLS), (linux, _LINUX_CALLS)):
        for name in names:
            setattr(module, name, counted(getattr(module, name)))
    opened = os.open

    def opening(path: Any, flags: int, *arguments: Any, **more: Any) -> int:
        if flags & (os.O_CREAT | os.O_TMPFILE) not in (0, os.O_DIRECTORY):
            reached(next(numbers))
        return opened(path, flags, *arguments, **more)

    os.open = opening


def killed_at(number: int) -> Callable[[int], None]:
    """Ends the process before a call, as SIGKILL does."""

    def reached(call: int) -> None:
        if call == number:
            os._exit(KILLED)

    return reached


def failing_at(number: int) -> Callable[[int], None]:
    """Lets one call fail."""

    def reached(call: int) -> None:
        if call == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "storage")

    return reached


KILLED = 77
