"""Opens images for commands, with the access options of the command line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from vmconv.errors import UsageError, VmconvError
from vmconv.inplace.settling import settle
from vmconv.interface.arguments import ImagePair, Reading
from vmconv.io.opener import Opener
from vmconv.io.parents import GivenParents
from vmconv.io.registry import installed
from vmconv.io.secrets import Secrets
from vmconv.model.image import Image

if TYPE_CHECKING:
    from vmconv.io.registry import Registry


@contextmanager
def opened(asked: Reading, *, content_decides: bool = False) -> Iterator[tuple[Image, Opener]]:
    """Yields one image and the opener that holds its files; see `Opener.image` for `content_decides`."""
    path = in_snapshot(asked.path, asked.from_snapshot)
    parents = GivenParents(asked.parents)
    with _opener(asked, Secrets(asked.secrets), parents) as opener:
        image = opener.image(path, asked.format_name, content_decides=content_decides)
        parents.refuse_unused()
        yield image, opener


def in_snapshot(path: str, wanted: str | None) -> str:
    """Returns the path of a file in the wanted snapshot of its filesystem, or `path` if none is wanted."""
    if wanted is None:
        return path
    from vmconv.io.snapshots import in_snapshot as found_in

    return found_in(path, wanted).path


@contextmanager
def both(asked: ImagePair) -> Iterator[tuple[Image, Image]]:
    """Yields two images."""
    # One opener each: a file that one image may refer to is off limits to the other.
    # A pipe can be read only once.
    secrets, parents = Secrets(asked.secrets), GivenParents(asked.parents)
    with _opener(asked, secrets, parents) as left, _opener(asked, secrets, parents, "-F") as right:
        one, other = left.image(asked.left, asked.left_format), right.image(asked.right, asked.right_format)
        parents.refuse_unused()
        if one.kind != other.kind:
            raise UsageError(f"{one.file.name} is of kind {one.kind}, {other.file.name} of kind {other.kind}")
        yield one, other


def _opener(asked: Reading | ImagePair, secrets: Secrets, parents: GivenParents, format_option: str = "-f") -> Opener:
    from tempfile import gettempdir

    from vmconv.io.spooling import PipeSpool

    return Opener(
        installed(),
        allow_external=asked.allow_external,
        force_share=asked.force_share,
        backing_format=asked.backing_format,
        format_option=format_option,
        settle=settle,
        secrets=secrets,
        parents=parents,
        remote=True,
        spool=PipeSpool(gettempdir()),
    )


def described(image: Image, opener: Opener) -> dict[str, Any]:
    """Returns the description of an image, with the name of a `child` if one is found beside it."""
    from vmconv.inspect.description import describe

    facts = describe(image, opener)
    if child := child_beside(image, opener.registry):
        facts["child"] = child
    return facts


def child_beside(image: Image, registry: Registry) -> str | None:
    """Returns the name of an image of the same directory that refers to this one; None if a short search finds none.

    Opens nothing outside of the directory, whatever its images name.
    """
    from vmconv.backends.targets import open_directory
    from vmconv.inplace import neighbours
    from vmconv.inplace.rules import Own

    folder, name = os.path.split(os.path.realpath(image.file.path))
    # Not all directories can be listed, and not all files are in one.
    with suppress(VmconvError, OSError), open_directory(folder) as directory:
        found = neighbours.child_of(directory, [Own(image.file, name)], registry)
        return found[0] if found else None
    return None
