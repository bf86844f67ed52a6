"""What a mount shows: a directory for each image of DIR, in it one for each variant, in that the files.

    DISK.vmdk/              named as the image
        qcow2/DISK.qcow2
        vmdk-monolithicFlat/DISK-flat.vmdk, DISK.vmdk
        ...
        vmconv-errors.txt   only, when the image cannot be read

Nothing is read before somebody looks at it, and what was looked at longest ago is forgotten when there is too much.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from vmconv.opener import Opener
from vmconv.registry import Registry
from vmconv.views import View
from vmconv_view.entry import Entry, Files
from vmconv_view.variants import Variant, variants

MAX_COST = 4_000_000
"""Rows of tables that are kept for what nobody reads: about 200 MB, or 200 files."""


class Node(NamedTuple):
    """One thing in the tree: a file with its `view`, or a directory with `names`; `status` is that of the image."""

    status: os.stat_result
    names: Callable[[], Iterable[str]] = tuple
    view: View | None = None


class Held(NamedTuple):
    """A file that somebody has open."""

    node: Node
    view: View
    entry: Entry | None

    def release(self) -> None:
        if self.entry:
            self.entry.release()


class Tree:
    """The directories and files that a mount of `directory` shows; paths are relative, "" is the root."""

    def __init__(
        self,
        registry: Registry,
        directory: str,
        *,
        allow_external: Iterable[str] = (),
        force_share: bool = False,
        backing_format: str | None = None,
    ) -> None:
        self._registry = registry
        self._directory = os.path.realpath(directory)
        self._external = tuple(allow_external)
        self._trees = (self._directory, *(os.path.realpath(tree) for tree in self._external))
        self._force_share = force_share
        self._backing_format = backing_format
        self._variants: Mapping[str, Variant] = variants(registry)
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def node(self, path: str) -> Node:
        """Returns what is at a path; raises `FileNotFoundError` where nothing is."""
        return self._find(path)[0]

    def open(self, path: str) -> Held:
        """Returns a file for reading; it stays what it is until it is released, or its source changes."""
        while True:
            node, entry = self._find(path)
            if node.view is None:
                raise IsADirectoryError(errno.EISDIR, path)
            if entry is None or entry.failure:
                return Held(node, node.view, None)
            if entry.hold():
                return Held(node, node.view, entry)

    def _find(self, path: str) -> tuple[Node, Entry | None]:
        image, _, rest = path.partition("/")
        if not image:
            return Node(os.stat(self._directory), self._images), None
        entry = self._entry(image)
        place, _, name = rest.partition("/")
        if entry.failure:
            return self._inside(entry, entry.failure, rest), entry
        if not place:
            return Node(entry.status, self._variants.keys), entry
        if place not in self._variants:
            raise FileNotFoundError(errno.ENOENT, path)
        while (files := entry.files(self._variants[place])) is None:
            entry = self._entry(image)
        self._trim()
        return self._inside(entry, files, name), entry

    def _inside(self, entry: Entry, files: Files, name: str) -> Node:
        if not name:
            return Node(entry.status, files.keys)
        if name not in files:
            raise FileNotFoundError(errno.ENOENT, name)
        return Node(entry.status, view=files[name])

    def _images(self) -> list[str]:
        """Returns the names of regular files (or links to such) whose suffix is that of a format that can be read."""
        with os.scandir(self._directory) as found:
            return sorted(one.name for one in found if self._speaks_of_an_image(one.name) and one.is_file())

    def _speaks_of_an_image(self, name: str) -> bool:
        one = self._registry.formats.get(self._registry.format_by_suffix(name) or "")
        return one is not None and one.can_read

    def _entry(self, name: str) -> Entry:
        path = os.path.join(self._directory, name)
        status = os.stat(path)
        if not (self._speaks_of_an_image(name) and stat.S_ISREG(status.st_mode)):
            raise FileNotFoundError(errno.ENOENT, name)
        with self._lock:
            entry = self._entries.get(name)
            if entry and entry.is_current(status):
                self._entries.move_to_end(name)
                return entry
        opener = Opener(
            self._registry,
            allow_external=self._external,
            force_share=self._force_share,
            backing_format=self._backing_format,
            format_option="",
        )
        made = Entry(name, status, opener, force_share=self._force_share)
        made.read(path, self._trees)
        with self._lock:
            before = self._entries.pop(name, None)
            self._entries[name] = made
        if before:
            before.retire()
        self._trim()
        return made

    def _trim(self) -> None:
        """Forgets what was looked at longest ago, as far as nobody holds it, until the rest is cheap enough."""
        with self._lock:
            entries = list(self._entries.items())
            left = sum(entry.cost() for _, entry in entries)
            dropped = []
            for name, entry in entries[:-1]:
                if left <= MAX_COST:
                    break
                if not entry.is_held:
                    left -= entry.cost()
                    dropped.append(self._entries.pop(name))
        for entry in dropped:
            entry.retire()
        if left > MAX_COST and entries:
            entries[-1][1].forget()

    def close(self) -> None:
        """Closes every image; what is still held is closed when it is released."""
        with self._lock:
            entries = list(self._entries.values())
            self._entries.clear()
        for entry in entries:
            entry.retire()
