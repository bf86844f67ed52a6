"""The tree of a mount: a directory per image, in it one per variant, in that the files.

    DISK.vmdk/              named as the image
        qcow2/DISK.qcow2
        vmdk-monolithicFlat/DISK-flat.vmdk, DISK.vmdk
        ...
        partitions/p1.ext4, p2.swap
        vmconv-errors.txt   alone, if the image cannot be read

An image is read on the first access to its directory. A file is planned on the first access to its attributes, not when
it is listed. The least recently used images are dropped if all cost too much.
Each user's requests are answered from images opened with that user's rights.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from itertools import filterfalse
from typing import NamedTuple

from vmconv.api import Registry, View, settle
from vmconv.plugin import BackendError, FormatKind, Opener, is_url
from vmconv_view.entry import ERRORS, Entry, Files
from vmconv_view.images import DirectoryImages, Images, UrlImage
from vmconv_view.jobs import Jobs
from vmconv_view.rights import OWN, Rights
from vmconv_view.variants import Partitions, Shown, shown

MAX_COST = 4_000_000
"""Rows of tables cached for images that are not open: about 200 MB, or 200 files."""


class Node(NamedTuple):
    """A node of the tree: a file with its `view`, or a directory with `names`.

    `status` is that of the image; `mode` has the permissions common to all files of the image. The nodes named in a
    directory are files if it `has_files`, else directories.
    """

    status: os.stat_result
    mode: int
    names: Callable[[], Iterable[str]] = tuple
    view: View | None = None
    has_files: bool = False
    is_writable: bool = False


class Held(NamedTuple):
    """An open file of the mount."""

    node: Node
    view: View
    entry: Entry | None

    def release(self) -> None:
        if self.entry:
            self.entry.release()


class Tree:
    """The directories and files of a mount of a directory, or of a URL; paths are relative, "" is the root.

    `only` is the name of the one image of a directory that is shown; by default all are. `format_name` is the format of
    one image, if the user has named it. `formats` are the names of the formats or variants that are shown; by default
    all are. `secrets` and `parents` are for the user who mounts.
    """

    def __init__(
        self,
        registry: Registry,
        source: str,
        *,
        allow_external: Iterable[str] = (),
        force_share: bool = False,
        backing_format: str | None = None,
        secrets: Iterable[str] = (),
        parents: Iterable[str] = (),
        only: str | None = None,
        format_name: str | None = None,
        formats: Collection[str] = (),
    ) -> None:
        self._registry = registry
        self._external = tuple(allow_external)
        self._images: Images = (
            UrlImage(source)
            if is_url(source)
            else DirectoryImages(registry, source, filterfalse(is_url, self._external), only)
        )
        self._format_name = format_name
        self._format_option = "-f" if only is not None or is_url(source) else ""
        self._force_share = force_share
        self._backing_format = backing_format
        # The process leaves its directory when it goes into the background.
        self._secrets = tuple(name if name == "-" else os.path.abspath(name) for name in secrets)
        self._parents = tuple(map(os.path.abspath, parents))
        kinds: tuple[FormatKind, ...] = ("disk", "memory")
        self._variants: Mapping[str, Mapping[str, Shown]] = {kind: shown(registry, kind, formats) for kind in kinds}
        self._entries: OrderedDict[tuple[Rights, str], Entry] = OrderedDict()
        self._jobs = Jobs()
        self._lock = threading.Lock()

    def read_now(self) -> None:
        """Reads each image. Raises the error of the first that cannot be read."""
        for name in self._images.names(OWN):
            if error := self._read(name, self._images.status(name, OWN), OWN).error:
                raise error

    def node(self, path: str, rights: Rights = OWN) -> Node:
        """Returns the node at a path. Raises `FileNotFoundError` or `PermissionError`."""
        image, _, rest = path.partition("/")
        if not image:
            status = self._images.root(rights)
            return Node(status, status.st_mode, lambda: self._images.names(rights))
        if not rest:
            status = self._images.status(image, rights)
            return Node(status, status.st_mode, lambda: self._inside(image, rights))
        place, _, name = rest.partition("/")
        if not name:
            entry = self._entry(image, rights)
            variant = self._variants[entry.kind].get(place)
            if not entry.failure and variant and not isinstance(variant, Partitions):
                return Node(entry.status, entry.mode, partial(entry.names, variant), has_files=True)
        return self._find(image, rest, rights)[0]

    def open(self, path: str, rights: Rights = OWN) -> Held:
        """Opens a file for reading; its content is stable until `release`, or until its source changes."""
        image, _, rest = path.partition("/")
        while rest:
            node, entry = self._find(image, rest, rights)
            if node.view is None:
                break
            if entry.failure:
                return Held(node, node.view, None)
            if entry.hold():
                return Held(node, node.view, entry)
        raise IsADirectoryError(errno.EISDIR, path)

    def _inside(self, name: str, rights: Rights) -> Iterable[str]:
        """Returns the names in the directory of an image."""
        entry = self._entry(name, rights)
        return (entry.failure or self._variants[entry.kind]).keys()

    def _find(self, image: str, rest: str, rights: Rights) -> tuple[Node, Entry]:
        place, _, name = rest.partition("/")
        while True:
            entry = self._entry(image, rights)
            if entry.failure:
                return _node_in(entry, entry.failure, rest), entry
            variant = self._variants[entry.kind].get(place)
            if variant is None:
                raise FileNotFoundError(errno.ENOENT, rest)
            files = entry.planned(variant)
            if files is None:
                files = self._jobs.result((entry, place), rights, f"{image} as {place}", partial(entry.plan, variant))
            if files is not None:
                self._trim()
                if name not in files and ERRORS in files and name in entry.expected(variant):
                    raise BackendError(f"{image}/{place}/{name}: cannot be made", hint=f"{ERRORS} beside it says why")
                return _node_in(entry, files, name), entry

    def _entry(self, name: str, rights: Rights) -> Entry:
        """Returns the current image, read with these rights."""
        status = self._images.status(name, rights)
        with self._lock:
            entry = self._entries.get((rights, name))
            if entry:
                self._entries.move_to_end((rights, name))
        # Not under the lock: storage that hangs must not block other images.
        if entry and entry.is_current(status):
            return entry
        return self._jobs.result((rights, name), rights, name, lambda: self._read(name, status, rights))

    def _read(self, name: str, status: os.stat_result, rights: Rights) -> Entry:
        opener = Opener(
            self._registry,
            allow_external=self._external,
            force_share=self._force_share,
            backing_format=self._backing_format,
            format_option=self._format_option,
            # What the mounting user may decrypt is not for others.
            secrets=self._secrets if rights is OWN else (),
            parents=self._parents if rights is OWN else (),
            acting=None if rights is OWN else rights.acting,
            # Another user's access must not trigger recovery of an interrupted conversion.
            settle=settle if rights is OWN else None,
            remote=rights is OWN,
        )
        made = Entry(name, status, opener, rights, force_share=self._force_share)
        made.read(self._images, self._format_name)
        with self._lock:
            before = self._entries.pop((rights, name), None)
            self._entries[rights, name] = made
        if before:
            before.retire()
        self._trim()
        return made

    def _trim(self) -> None:
        """Drops the least recently used images that are not held, until the rest is below `MAX_COST`."""
        with self._lock:
            entries = list(self._entries.items())
            left = sum(entry.cost() for _, entry in entries)
            dropped = []
            for key, entry in entries[:-1]:
                if left <= MAX_COST:
                    break
                if not entry.is_held:
                    left -= entry.cost()
                    dropped.append(self._entries.pop(key))
        for entry in dropped:
            entry.retire()
        if left > MAX_COST and entries:
            entries[-1][1].forget()

    def close(self) -> None:
        """Closes every image; held ones are closed on release."""
        with self._lock:
            entries = list(self._entries.values())
            self._entries.clear()
        for entry in entries:
            entry.retire()


def _node_in(entry: Entry, files: Files, name: str) -> Node:
    """Returns the node of a file in a directory of files, or of the directory itself for an empty name."""
    if not name:
        return Node(entry.status, entry.mode, files.keys, has_files=True)
    if name not in files:
        raise FileNotFoundError(errno.ENOENT, name)
    return Node(entry.status, entry.mode, view=files[name])
