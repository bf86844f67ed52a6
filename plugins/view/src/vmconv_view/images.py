"""What a mount shows: the images of a directory, one of them, or the image at a URL."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterable
from typing import Protocol

from vmconv.api import Registry, inside
from vmconv.plugin import AccessError, Image, parse_url
from vmconv_view.rights import Rights


class Images(Protocol):
    """Images by name, and what is known of them before they are read. A user's rights decide what the user finds."""

    def root(self, rights: Rights) -> os.stat_result:
        """Returns the status of the directory that has them."""

    def names(self, rights: Rights) -> list[str]:
        """Returns the names of all."""

    def status(self, name: str, rights: Rights) -> os.stat_result:
        """Returns the status of one. Raises `FileNotFoundError` or `PermissionError`."""

    def path(self, name: str) -> str:
        """Returns what an `Opener` opens."""

    def refuse_outside(self, image: Image) -> None:
        """Raises `AccessError` if the image that was opened is not one that may be shown."""


class DirectoryImages:
    """The images of a directory; `only` names the one that is shown, by default all are.

    `external` are other directories that links may lead to.
    """

    def __init__(self, registry: Registry, directory: str, external: Iterable[str] = (), only: str | None = None):
        self._registry = registry
        self._only = only
        self._directory = os.path.realpath(directory)
        self._trees = (self._directory, *map(os.path.realpath, external))

    def root(self, rights: Rights) -> os.stat_result:
        with rights.acting():
            return os.stat(self._directory)

    def names(self, rights: Rights) -> list[str]:
        """Returns the names of regular files, or links to such, with the suffix of a readable format.

        Leaves out links that cannot be followed (loops, missing rights).
        """
        rights.refuse_directory(self._directory)
        with rights.acting(), os.scandir(self._directory) as found:
            everything = list(found)
        images = [one for one in everything if self._is_shown(one.name)]
        with rights.acting():
            return sorted(one.name for one in images if _is_file(one))

    def _is_shown(self, name: str) -> bool:
        return self._has_image_suffix(name) if self._only is None else name == self._only

    def _has_image_suffix(self, name: str) -> bool:
        one = self._registry.all_formats.get(self._registry.format_by_suffix(name) or "")
        return one is not None and one.can_read

    def status(self, name: str, rights: Rights) -> os.stat_result:
        rights.refuse_directory(self._directory)
        with rights.acting():
            status = os.stat(self.path(name))
        if not (self._is_shown(name) and stat.S_ISREG(status.st_mode)):
            raise FileNotFoundError(errno.ENOENT, name)
        return status

    def path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def refuse_outside(self, image: Image) -> None:
        real = image.file.real_path()
        if not any(inside(real, tree) for tree in self._trees):
            raise AccessError(
                f"{image.file.name}: lies outside the directory, at {real}",
                hint=f"if you trust the link, --allow-external {os.path.dirname(real)}",
            )


class UrlImage:
    """The image at a URL, for the user who mounts: nobody knows what others may read there."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.name = parse_url(url).name
        self._since = time.time_ns()

    def root(self, rights: Rights) -> os.stat_result:
        return self._status(stat.S_IFDIR | 0o500)

    def names(self, rights: Rights) -> list[str]:
        return [self.name]

    def status(self, name: str, rights: Rights) -> os.stat_result:
        if name != self.name:
            raise FileNotFoundError(errno.ENOENT, name)
        return self._status(stat.S_IFREG | 0o400)

    def path(self, name: str) -> str:
        return self._url

    def refuse_outside(self, image: Image) -> None:
        # The user has named it.
        return

    def _status(self, mode: int) -> os.stat_result:
        ten = (mode, 0, 0, 1, os.geteuid(), os.getegid(), 0, *(self._since // 10**9,) * 3)
        return os.stat_result(ten, {"st_mtime_ns": self._since, "st_ctime_ns": self._since})


def _is_file(one: os.DirEntry[str]) -> bool:
    try:
        return one.is_file()
    except OSError:
        return False
