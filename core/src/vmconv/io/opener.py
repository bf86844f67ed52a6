"""Opens all files: those that the user names, and those that images name if the rules allow it.

An untrusted image may name any file of this machine as its parent. So a file that an image names must be in or below
the directory of the file that the user named, or in a tree that the user allowed. The check is on the opened file, with
symbolic links resolved.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from vmconv.errors import AccessError, ImageError, PluginError, VmconvError, os_errors, warn
from vmconv.interface.backend import Access
from vmconv.interface.scheme import STANDARD_INPUT, is_url, parse_url, without_secrets
from vmconv.io import locks
from vmconv.io.known import KNOWN
from vmconv.io.parents import GivenParents
from vmconv.io.secrets import Secrets
from vmconv.model import paths
from vmconv.model.sources import File, inside

if TYPE_CHECKING:
    from vmconv.interface.format import Format
    from vmconv.interface.scheme import Url
    from vmconv.io.registry import Registry
    from vmconv.io.remote import RemoteFile
    from vmconv.model.image import Image

MAX_CHAIN_DEPTH = 200
"""Layers of one chain; libvirt has the same limit."""

MAX_SEARCHED = 1000
"""Files that are opened to find a parent by identity."""

MAX_SEARCH_SECONDS = 10.0
"""Seconds of that search. A stranger's file may take long to read."""

_SHOWN = 3
_OWNER_ONLY = 0o600

# The file is gone, not readable for this user, or not openable at all, so it cannot be the parent.
_NO_CANDIDATE = frozenset(
    {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.ENOTDIR, errno.ESTALE}
)

_DESCRIPTOR = re.compile(r"/dev/fd/[0-9]{1,9}")
"""What a shell makes of `<(PROGRAM)`."""

_PARENT = "backing file"

_DOWNLOAD = "download the whole chain, and convert it there"

_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_FILE = "file:"
"""QEMU's protocol prefix of plain files."""


class Opener:
    """Opens files read-only and keeps them open until `close`; a context manager.

    `allow_external` are directories (or files) that images may refer to, besides their own directory. `force_share`
    reads files that QEMU has open for writing; their content may be inconsistent. `backing_format` is the format of
    backing files for images that do not state it. `format_option` is the command line option for the image's format,
    for hints; empty if there is none. `acting` surrounds path lookups only: a mount opens files with the permissions of
    the calling user. `settle` is called with the path of each file before it is opened, to recover an interrupted
    conversion. Without it an opener changes nothing. `decompress` returns the content of the compressed file that the
    user named. `secrets` are files with passphrases of encrypted images, see `vmconv.io.secrets`. A `confined` opener
    opens only files in `allow_external`: also the file that the user named has to lie there, wherever directories are
    renamed or replaced by links meanwhile. `remote` allows the user to name URLs; images name one only with a
    directory of URLs in `allow_external`. `parents` are files that the user names as parents of layers
    whose parent is not where they say, from the top down; None for a caller that takes none. `spool` returns the
    content of standard input, or of a pipe that is open, as a file.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        allow_external: Iterable[str] = (),
        force_share: bool = False,
        backing_format: str | None = None,
        format_option: str = "-f",
        acting: Callable[[], AbstractContextManager[object]] | None = None,
        settle: Callable[[str], None] | None = None,
        decompress: Callable[[File], File] | None = None,
        confined: bool = False,
        secrets: Secrets | Iterable[str] | None = None,
        remote: bool = False,
        spool: Callable[[str], File] | None = None,
        parents: GivenParents | Iterable[str] | None = None,
    ) -> None:
        self.registry = registry
        self.files: list[File] = []
        trees = list(allow_external)
        self._trees = [os.path.realpath(tree) for tree in trees if not is_url(tree)]
        self._remote_trees = [parse_url(tree) for tree in trees if is_url(tree)]
        self._remote = remote and not confined
        self._spool = None if confined else spool
        self._force_share = force_share
        self._acting = acting or nullcontext
        self._settle = settle
        self._decompress = decompress
        self._confined = confined
        self._secrets = secrets if isinstance(secrets, Secrets) else Secrets(secrets)
        self.given = parents if isinstance(parents, GivenParents) else GivenParents(parents)
        # Fails early for an unknown format, even if no image needs it.
        self._backing_format = None if backing_format is None else registry.format(backing_format).name
        self._format_option = format_option
        self._displaced: set[tuple[int, int]] = set()
        # For each opened layer, by id of its file, the identities of it and of all layers above, to detect loops.
        self._depth: dict[int, list[tuple[int, int]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        while self.files:
            self.files.pop().close()
        self._secrets.close()

    def passphrases(self, file: File) -> tuple[bytes, ...]:
        """Returns the passphrases to try for an encrypted image. Raises `SecretError` if the user gave none."""
        return self._secrets.for_image(file.name)

    def access(self, mode: int | None = None) -> Access:
        """Returns the permissions of files that are made of what was opened; `mode` is the user's.

        Who cannot read the passphrase of an encrypted image cannot read what was made of it.
        """
        if mode is None and self._secrets.typed:
            mode = _OWNER_ONLY
        return Access((*self.files, *self._secrets.files()), mode)

    def image(
        self, path: str, format_name: str | None = None, *, snapshot: str | None = None, content_decides: bool = False
    ) -> Image:
        """Returns the image in the file or bundle that the user named; see `Registry.identify` for its format.

        `content_decides` accepts content and suffix of different formats, with a warning.
        """
        if self._spool and self._is_pipe(path):
            self._secrets.refuse_source(path)
        file = self.referring(self._meant(path))
        if self._decompress:
            # The compressed file stays open: it must not change, and its rights are those of the new image.
            file = self._decompress(file)
            self.files.append(file)
        self._depth[id(file)] = [_identity(file)]
        warnings: tuple[str, ...] = ()
        if content_decides and format_name is None:
            found, warnings = self.registry.recognise(file, option=self._format_option)
        else:
            found = self.registry.identify(file, format_name, option=self._format_option)
        image = self._read(found, file, snapshot)
        image.warnings += warnings
        if self.given:
            # Opens the chain: each layer needs its parent, and says so before anything is done with it.
            for _ in image.chain():
                pass
        return image

    def _meant(self, path: str) -> str:
        """Returns the path to open for the user's path: the descriptor of a bundle, or the path itself."""
        if is_url(path) or self._is_pipe(path):
            return path
        with self._acting():
            if path == STANDARD_INPUT and not os.path.lexists(path):
                raise AccessError(
                    "standard input is no file that can be used here: reading a disk needs random access",
                    hint="write it to a file first; vmconv convert takes it as it is",
                )
            if not os.path.isdir(path):
                return path
            for known in KNOWN:
                if known.bundle and os.path.isfile(os.path.join(path, known.bundle)):
                    return os.path.join(path, known.bundle)
            found = [] if self._confined else list(islice(self._disks_below(path), _SHOWN))
        raise AccessError(
            f"{path}: is neither a regular file nor a block device",
            hint="name a disk in this directory" + (f": {', '.join(found)}" if found else ""),
        )

    def _disks_below(self, directory: str) -> Iterator[str]:
        """Yields possible disks, by suffix, in a directory and its subdirectories, such as a bundle of a machine."""
        for below, directories, names in islice(os.walk(directory), MAX_SEARCHED):
            for name in sorted(directories) + sorted(names):
                if self.registry.format_by_suffix(name, "disk") is not None:
                    yield os.path.join(below, name)
            # Limits os.walk to one level.
            if below != directory:
                directories.clear()

    def file(self, path: str) -> File:
        """Returns a file that the user named, of any content."""
        if is_url(path):
            return self._at_url(path)
        if self._spool and self._is_pipe(path):
            file = self._spool(path)
            self.files.append(file)
            if not self._force_share:
                locks.share(file)
            return file
        return self._open(path)

    def referring(self, path: str) -> File:
        """Returns a file that the user named. It may refer to files in and below its own directory."""
        file = self.file(path)
        if not (self._confined or file.is_remote or self._is_pipe(path)) and not any(
            inside(os.path.realpath(file.path), tree) for tree in self._trees
        ):
            self._trees.append(os.path.dirname(os.path.realpath(file.path)))
        return file

    def _is_pipe(self, path: str) -> bool:
        """Returns whether the user named standard input, or a pipe that is open, and it can be spooled."""
        if self._spool is None:
            return False
        # Not a pipe with another name: opening it may wait for ever.
        return path == STANDARD_INPUT or (_DESCRIPTOR.fullmatch(path) is not None and _is_fifo(path))

    def _at_url(self, text: str) -> File:
        """Returns the object at a URL that the user named."""
        if not self._remote:
            raise AccessError(
                f"{without_secrets(text)}: only a local file can be read here",
                hint="vmconv convert makes a file of what is at a URL",
            )
        return self._fetched(parse_url(text))

    def _fetched(self, url: Url) -> File:
        from vmconv.io.remote import RemoteFile

        scheme = self.registry.scheme(url.scheme)
        file = RemoteFile(url, scheme.open(url))
        self.files.append(file)
        return file

    def _beside(self, origin: RemoteFile, reference: str, role: str) -> File:
        """Returns what an image at a URL names, if it is in the same directory and the user allowed that directory."""
        said = f"{origin.name}: {role} {reference!r}"
        name = reference.removeprefix("./")
        if "/" in name or name in (".", "..") or _PROTOCOL.match(reference):
            raise AccessError(f"{said} is not a name in the directory of {origin.path}", hint=_DOWNLOAD)
        directory = origin.url.beside("")
        if directory not in [tree.beside("") for tree in self._remote_trees]:
            raise AccessError(
                f"{said} is at a URL that you did not name",
                hint=f"if you trust the image, --allow-external {directory.shown}",
            )
        file = self._fetched(origin.url.beside(name))
        if file.path == origin.path:
            raise ImageError(f"{said} is the image itself, a loop")
        return file

    def disk(self, origin: File, reference: str, format_name: str | None) -> Image:
        """Returns the disk image that the configuration `origin` names; `format_name` is the format that it states."""
        file = self.related(origin, reference, "disk", moved=True)
        self._depth[id(file)] = [_identity(file)]
        return self._read(_of_disk(self.registry.identify(file, format_name, option=""), file), file)

    def related(self, origin: File, reference: str, role: str, *, moved: bool = False) -> File:
        """Returns the file that `origin` names as its `role`; raises `AccessError` if the rules forbid it.

        A path of another system is searched by its base name beside the image. With `moved`, so is each absolute path
        that does not exist, for callers that verify the file's identity.
        """
        if "\0" in reference or not reference:
            raise ImageError(f"{origin.name}: {role} {reference!r} is not a file name")
        if origin.is_remote:
            return self._beside(cast("RemoteFile", origin), reference, role)
        path = self._located(origin, reference, role, moved=moved)
        with self._acting():
            real = os.path.realpath(path)
        self._allow(origin, real, reference, role)
        file = self._open(path, f"{origin.name}: {role} {reference!r}")
        # Checked again on the opened file: a symbolic link may have changed since the first check.
        self._allow(origin, file.real_path(), reference, role)
        if _identity(file) == _identity(origin):
            raise ImageError(f"{origin.name}: {role} {reference!r} is the image itself, a loop")
        return file

    def companion(self, origin: File, suffixes: Sequence[str], role: str) -> tuple[str, File] | None:
        """Returns name and file of the part of an image that has its name and another suffix; None without one.

        `suffixes` are lower case, with the dot; upper case is found too. Raises `AccessError` if several files fit.
        """
        if origin.is_remote:
            hint = "download all files of it, or name another image"
            raise AccessError(f"{origin.name}: what its {role} is called beside it is unknown at a URL", hint=hint)
        folder, own = os.path.split(origin.path)
        stem = os.path.splitext(own)[0]
        names = [stem + spelled for suffix in suffixes for spelled in (suffix, suffix.upper())]
        with self._acting():
            found = [name for name in names if os.path.lexists(os.path.join(folder, name))]
            others = [name for name in found if not _same(os.path.join(folder, name), os.path.join(folder, found[0]))]
        if others:
            raise AccessError(
                f"{origin.name}: both {found[0]} and {others[0]} may be its {role}",
                hint=f"name the right one as the source instead of {origin.name}, or move the other one away",
            )
        if not found:
            return None
        # A colon could be taken for that of a protocol.
        return found[0], self.related(origin, f"./{found[0]}" if ":" in found[0] else found[0], role)

    def _located(self, origin: File, reference: str, role: str, *, moved: bool) -> str:
        """Returns the path of a reference: as QEMU resolves it, or its base name beside the image."""
        own = os.path.dirname(os.path.realpath(origin.path))
        path = os.path.join(own, reference)
        elsewhere, base = paths.is_foreign(reference), paths.base_of(reference)
        looked = elsewhere or os.path.isabs(reference)
        # No imports while acting for another user, who may not be able to read Python's own files.
        with self._acting():
            # Backslashes are rare in names here, so they may be of a relative Windows path.
            found = self._as_named(origin, reference, role) or (
                self._as_named(origin, reference.replace("\\", "/"), role) if "\\" in reference else None
            )
            if found:
                _refuse_protocol_of_files(origin, reference, role)
                return found
            near = paths.beside(own, base, os.fstat(origin.descriptor)) if looked else None
        if near and (elsewhere or moved):
            if not moved:
                warn(f"{origin.name}: {role} {reference!r} does not exist: using {base} beside the image")
            return near
        if _PROTOCOL.match(reference) and not paths.on_windows(reference):
            raise AccessError(
                f"{origin.name}: {role} {reference!r} is not a plain file name",
                hint="protocols and json: names are never followed",
            )
        if near or elsewhere:
            what = f"{origin.name}: {role} {reference!r} does not exist"
            hint = f"if it is {base} beside the image, name that in the image (vmconv rebase -u)"
            if role == _PARENT:
                way = f"--parent {near}; " if self.given.are_taken else ""
                hint = f"if it is {base} beside the image, {way}vmconv rebase -u stores that name"
            raise AccessError(what, hint=hint if near else f"put {base} beside the image") from FileNotFoundError(path)
        return path

    def _as_named(self, origin: File, reference: str, role: str) -> str | None:
        """Returns the path of a reference taken literally; None if it does not exist.

        QEMU resolves a relative name from the directory of the symbolic link to the image, others from the directory of
        the image itself. Raises `AccessError` if the two are different files.
        """
        path = os.path.join(os.path.dirname(os.path.realpath(origin.path)), reference)
        by_link = os.path.join(os.path.dirname(origin.path), reference)
        there, by_link_too = os.path.lexists(path), os.path.lexists(by_link)
        if there and by_link_too and not _same(path, by_link):
            raise AccessError(
                f"{origin.name}: {role} {reference!r} is one file beside the link {origin.path} and another beside "
                f"the image",
                hint=f"use the image's own path: {os.path.realpath(origin.path)}",
            )
        return path if there else by_link if by_link_too else None

    def parent(self, origin: File, reference: str, format_name: str | None, *, moved: bool = False) -> Image:
        """Returns the image that `origin` names as its parent; raises `ImageError` for loops and chains over the limit.

        If it does not exist, it is the next one of the user's parents, with a warning. `format_name` is the format that
        `origin` states, or None. `moved` is for callers that verify the parent's identity, see `related`.
        """
        found = not self.given or origin.is_remote or self._exists(origin, reference)
        candidates = [] if found else self.given.candidates(origin)
        if not candidates:
            return self.named_parent(origin, reference, format_name, moved=moved)
        self.given.take(origin, candidates[0])
        self._displaced.add(_identity(origin))
        image = self._given_parent(origin, candidates[0], format_name)
        if not moved:
            warn(
                f"{origin.name}: backing file {reference!r} does not exist: using {candidates[0]}, a disk of "
                f"{image.size} bytes; no identity tells whether it is the right one"
            )
        return image

    def parent_by_identity(
        self,
        origin: File,
        references: Sequence[str],
        format_name: str,
        refusal: Callable[[Image], ImageError | None],
        search: Callable[[], str | None],
        *,
        stated: bool = True,
    ) -> Image:
        """Returns the parent of an image that knows it by an identity; `refusal` returns the error for another disk.

        It is the first that can be opened of those that `references` name. If that is another disk, or none can be
        opened, it is one of the user's parents. If none can be opened, it may also be the file that `search` returns,
        with a warning if the image itself has `stated` the names.
        """
        there, refused = self._first_named(origin, references, format_name, refusal)
        given, unfit = (None, None) if there else self._one_of_given(origin, format_name, refusal)
        if there or given:
            return cast("Image", there or given)
        if isinstance(refused, ImageError):
            raise unfit or refused
        try:
            found = search()
        except ImageError as exc:
            if refused is None or isinstance(refused.__cause__, FileNotFoundError):
                raise unfit or exc from exc
            found = None
        if found is None:
            raise unfit or refused or ImageError(f"{origin.name}: names no parent")
        image = self.named_parent(origin, found, format_name)
        if error := refusal(image):
            raise unfit or error
        if stated:
            self._displaced.add(_identity(origin))
            warn(f"{origin.name}: parent {references[0]!r} is not there: using {found}, which has its identity")
        return image

    def _first_named(
        self,
        origin: File,
        references: Sequence[str],
        format_name: str,
        refusal: Callable[[Image], ImageError | None],
    ) -> tuple[Image | None, ImageError | AccessError | None]:
        """Returns the first image that can be opened, or its refusal, or the error of the first that cannot."""
        refused: AccessError | None = None
        for reference in references:
            try:
                image = self.named_parent(origin, reference, format_name, moved=True)
            except AccessError as exc:
                refused = refused or exc
                continue
            error = refusal(image)
            return (image, None) if error is None else (None, error)
        return None, refused

    def _one_of_given(
        self, origin: File, format_name: str, refusal: Callable[[Image], ImageError | None]
    ) -> tuple[Image | None, ImageError | None]:
        """Returns the one of the user's parents that has no refusal, and the first refusal."""
        unfit: ImageError | None = None
        for path in self.given.candidates(origin):
            image = self._given_parent(origin, path, format_name)
            if (error := refusal(image)) is None:
                self.given.take(origin, path)
                self._displaced.add(_identity(origin))
                return image, None
            unfit = unfit or error
        return None, unfit

    def alike(
        self,
        origin: File,
        format_name: str,
        suffixes: Sequence[str],
        refusal: Callable[[Image], ImageError | None],
    ) -> str | None:
        """Returns the only file that `search` yields and `refusal` has no error for, or None.

        Raises `ImageError` if there are two, or if looking at the files takes too long.
        """
        one = self.registry.format(format_name)
        found: list[str] = []
        end = time.monotonic() + MAX_SEARCH_SECONDS
        for suffix in suffixes:
            for path, file in self.search(origin, suffix):
                if time.monotonic() > end:
                    raise ImageError(
                        f"{origin.name}: the search for its parent has ended after {MAX_SEARCH_SECONDS:g} seconds",
                        hint="--parent names it" if self.given.are_taken else "vmconv rebase -u stores its name",
                    )
                try:
                    fits = refusal(self._read(one, file)) is None
                except VmconvError:
                    continue
                if fits:
                    found.append(path)
        if len(found) > 1:
            raise ImageError(
                f"{origin.name}: {found[0]} and {found[1]} both have the identity of its parent",
                hint="--parent names the right one" if self.given.are_taken else "move the other one away",
            )
        return found[0] if found else None

    def named_parent(self, origin: File, reference: str, format_name: str | None, *, moved: bool = False) -> Image:
        """Returns what `parent` does, and no file with another name."""
        try:
            file = self.related(origin, reference, _PARENT, moved=moved)
        except AccessError as exc:
            if isinstance(exc.__cause__, FileNotFoundError):
                way = "--parent FILE names it where it is now, " if self.given.are_taken else ""
                exc.hint = exc.hint or f"{way}vmconv rebase -u stores its new name"
            raise
        return self._as_parent(origin, file, repr(reference), format_name)

    def is_displaced(self, layer: File) -> bool:
        """Returns whether the parent of a layer is not where it says, so that others do not find it."""
        return _identity(layer) in self._displaced

    def _given_parent(self, origin: File, path: str, format_name: str | None) -> Image:
        return self._as_parent(origin, self.referring(self._meant(path)), path, format_name)

    def _as_parent(self, origin: File, file: File, named: str, format_name: str | None) -> Image:
        above = self._depth[id(origin)]
        if _identity(file) in above:
            raise ImageError(f"{origin.name}: backing file {named} is already part of the chain, a loop")
        if len(above) >= MAX_CHAIN_DEPTH:
            raise ImageError(f"{origin.name}: chain of more than {MAX_CHAIN_DEPTH} layers")
        self._depth[id(file)] = [*above, _identity(file)]
        stated = format_name or self._backing_format
        return self._read(_of_disk(self.registry.identify(file, stated, option="--backing-format"), file), file)

    def _exists(self, origin: File, reference: str) -> bool:
        """Returns whether a file has the name that an image states, whatever the rules say of it."""
        folders = os.path.dirname(os.path.realpath(origin.path)), os.path.dirname(origin.path)
        with self._acting():
            return any(os.path.lexists(os.path.join(folder, reference)) for folder in folders)

    def _read(self, found: Format, file: File, snapshot: str | None = None) -> Image:
        from vmconv.model.image import Image

        image: Any = found.read(file, self, snapshot=snapshot)
        if not isinstance(image, Image):
            said = f"its reader returns {type(image).__name__}, which is not an Image"
            raise PluginError(said, format_name=found.name)
        if image.kind != found.kind:
            said = f"its reader returns an image of kind {image.kind}, the format is of kind {found.kind}"
            raise PluginError(said, format_name=found.name)
        return image

    def search(self, origin: File, suffix: str) -> Iterator[tuple[str, File]]:
        """Yields `(reference, file)` of candidates for a parent that is known by identity.

        Candidates are files with the suffix in the origin's directory and in the allowed directories, not below them;
        at most `MAX_SEARCHED`. Each is closed before the next.
        """
        for path in islice([] if origin.is_remote else self._candidates(origin, suffix), MAX_SEARCHED):
            try:
                with self._acting():
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as exc:
                if exc.errno not in _NO_CANDIDATE:
                    raise AccessError(f"{path}: cannot be opened: {exc.strerror}") from exc
                continue
            file = File(path, descriptor)
            try:
                if self._may_be_looked_at(file, origin):
                    yield path, file
            finally:
                file.close()

    def _may_be_looked_at(self, file: File, origin: File) -> bool:
        real = file.real_path()
        regular = stat.S_ISREG(os.fstat(file.descriptor).st_mode)
        return regular and _identity(file) != _identity(origin) and any(inside(real, tree) for tree in self._trees)

    def _candidates(self, origin: File, suffix: str) -> Iterator[str]:
        own = os.path.dirname(os.path.realpath(origin.path))
        for directory in dict.fromkeys([own, *filter(os.path.isdir, self._trees)]):
            with os_errors("cannot be listed", AccessError), self._acting():
                names = sorted(os.listdir(directory))
            yield from (os.path.join(directory, name) for name in names if name.lower().endswith(suffix))

    def release(self, file: File) -> None:
        """Closes a file before the opener."""
        self.files = [other for other in self.files if other is not file]
        file.close()

    def _allow(self, origin: File, real: str, reference: str, role: str) -> None:
        if any(inside(real, tree) for tree in self._trees):
            return
        raise AccessError(
            f"{origin.name}: {role} {reference!r} lies outside the image's directory, at {real}",
            hint=f"if you trust the image, --allow-external {os.path.dirname(real)}",
        )

    def _open(self, path: str, said: str | None = None) -> File:
        if self._settle:
            self._settle(path)
        doing = "cannot be opened" if said is None else f"cannot be opened as {said}"
        with os_errors(doing, AccessError), self._acting():
            # Without O_NONBLOCK, opening a FIFO would wait for its writer. Regular files ignore it.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            with os_errors(doing, AccessError, where=path):
                mode = os.fstat(descriptor).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise AccessError(f"{path}: is neither a regular file nor a block device")
            file = File(path, descriptor)
            self._refuse_outside(file)
        except BaseException:
            os.close(descriptor)
            raise
        self.files.append(file)
        if not self._force_share:
            locks.share(file)
        return file

    def _refuse_outside(self, file: File) -> None:
        """Raises `AccessError` for an open file outside of the directories of a confined opener."""
        if self._confined and not any(inside(real := file.real_path(), tree) for tree in self._trees):
            raise AccessError(f"{file.path}: lies outside of the allowed directories, at {real}")


def _of_disk(found: Format, file: File) -> Format:
    """Returns a format of disks; raises `ImageError` for one of memory."""
    if found.kind != "disk":
        raise ImageError(
            f"{file.name}: is a memory image ({found.name}), and a disk was expected",
            hint="name the disk of the machine, not its memory",
        )
    return found


def _is_fifo(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:
        return False


def _same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def _identity(file: File) -> tuple[int, int]:
    return file.stamp.device, file.stamp.inode


def _refuse_protocol_of_files(origin: File, reference: str, role: str) -> None:
    """Raises `AccessError` for a file whose name begins with "file:", because QEMU removes that prefix."""
    if reference.startswith(_FILE):
        to_qemu = reference.removeprefix(_FILE)
        raise AccessError(
            f"{origin.name}: {role} {reference!r} is a file of that name, but QEMU opens {to_qemu!r}",
            hint=f"name it ./{reference} in the image (qemu-img rebase -u)",
        )
