"""The target as it is before a sync: read, checked, and locked against other users."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from vmconv.backends.targets import claim_for_replacement
from vmconv.errors import AccessError, PlanError, UsageError
from vmconv.inplace import neighbours, rules
from vmconv.inplace.neighbours import Neighbours
from vmconv.inplace.rules import Own
from vmconv.inplace.settling import settle
from vmconv.io.opener import Opener
from vmconv.io.parents import GivenParents
from vmconv.model.options import parse_options
from vmconv.model.sources import File

if TYPE_CHECKING:
    from vmconv.interface.format import Format
    from vmconv.io.directory import Directory
    from vmconv.io.registry import Registry
    from vmconv.model.image import Image
    from vmconv.syncing.request import SyncRequest


class Old(NamedTuple):
    """An image that will be replaced: its files are `own`, and `options` make another like it."""

    image: Image
    format: Format
    options: Any
    own: tuple[Own, ...]

    @property
    def files(self) -> list[File]:
        return [own.file for own in self.own]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(own.name for own in self.own)


@contextmanager
def opened(
    directory: Directory,
    name: str,
    request: SyncRequest,
    sources: Sequence[File],
    registry: Registry,
    *,
    is_layer: bool = False,
    but: Collection[str] = (),
    judge: Callable[[Neighbours], None] = neighbours.refuse,
) -> Iterator[Old]:
    """Yields the target `name` of a directory, locked; only `is_layer` allows one with a parent.

    `judge` gets the images of the directory that refer to it, except `but`.

    Raises `PlanError` or `AccessError` if it may not be replaced: it is in use, a layer, a part of the source, or
    another image refers to it.
    """
    _refuse_source(directory, name, sources)
    with ExitStack() as claims:
        claims.enter_context(claim_for_replacement(directory, name))
        # The claim is ours, and would look like another user's.
        opener = claims.enter_context(
            Opener(
                registry,
                force_share=True,
                format_option="-O",
                settle=settle,
                allow_external=request.allow_external if is_layer else (),
                backing_format=request.source_backing_format if is_layer else None,
            )
        )
        image = opener.image(directory.join(name), request.target_format)
        if not directory.holds(name, image.file.descriptor):
            raise AccessError(f"{directory.join(name)}: was replaced while it was being examined", hint="try again")
        if image.parent_reference is not None and not is_layer:
            raise PlanError(
                f"{request.target}: is a layer on top of {image.parent_reference}, and only whole disks are synced",
                hint="convert to a new file, without -B",
            )
        found = registry.format(image.format_name)
        options = found.options_of(image)
        _refuse_other_options(request, found, options)
        image.guest  # noqa: B018 opens the files with payload
        # Some readers open a file more than once.
        files = {file.stamp[:2]: file for file in reversed(opener.files)}
        own = tuple(Own(file, rules.own_name(file)) for file in reversed(files.values()))
        for each in own:
            if not directory.holds(each.name, each.file.descriptor):
                raise PlanError(f"{each.file.path}: is a part of the target, and not in its directory")
            if each.file is not image.file:
                _refuse_source(directory, each.name, sources)
                claims.enter_context(claim_for_replacement(directory, each.name))
        _refuse_losses(request, image)
        seen = neighbours.look(directory, own, registry, but)
        judge(seen)
        image.warnings += tuple(text for text in (neighbours.warning(seen),) if text)
        image.warnings += tuple(_saved_states(directory, name, registry))
        if is_layer:
            _open_parents(image, opener, request.parents)
        yield Old(image, found, options, own)


def _open_parents(image: Image, opener: Opener, parents: Sequence[str] | None) -> None:
    """Opens the layers below, with parents that the user names; earlier, they would be taken for parts of the image."""
    opener.given = GivenParents(parents)
    if parents:
        for _ in image.chain():
            pass
        opener.given.refuse_unused()


def _saved_states(directory: Directory, name: str, registry: Registry) -> Iterator[str]:
    """Yields a warning for each memory image of the target's name: perhaps the state of a machine that was suspended.

    Resumed on a disk that has changed, its guest would write what it knows of the old one.
    """
    stem = registry.stem(name).casefold()
    for other in directory.names():
        if registry.format_by_suffix(other, "memory") and registry.stem(other).casefold() == stem:
            path = directory.join(other)
            yield f"{path}: if it is a saved state of this machine, do not resume it on the synced disk"


def _refuse_source(directory: Directory, name: str, sources: Sequence[File]) -> None:
    there = directory.status(name)
    if there and any((file.stamp.device, file.stamp.inode) == (there.st_dev, there.st_ino) for file in sources):
        raise PlanError(f"{directory.join(name)}: is part of the source", hint="name another target")


def _refuse_other_options(request: SyncRequest, found: Format, options: Any) -> None:
    """Raises `UsageError` if the user names other options than the target has: they stay."""
    wanted = parse_options(found.options(), request.options, found.name)
    for name in request.options:
        if getattr(wanted, name) != getattr(options, name):
            raise UsageError(
                f"{request.target}: its {name} is {getattr(options, name)}, and a sync keeps it",
                hint="convert it again: vmconv convert --force",
            )


def _refuse_losses(request: SyncRequest, image: Image) -> None:
    # Only a rebase has its target as source, and no --force.
    forcible = request.source != request.target
    if image.losses and not request.force:
        raise PlanError(
            f"{request.target}: would lose {'; '.join(image.losses)}",
            hint="remove them, or give them up with --force" if forcible else "remove them first",
        )
    if os.fstat(image.file.descriptor).st_nlink > 1 and not request.force:
        raise PlanError(
            f"{request.target}: has other names (hard links), which would keep the old disk",
            hint="--force replaces this name only" if forcible else "remove them first",
        )
