"""The site of a conversion in place: the source's files, the checks on them, and their locks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from vmconv.backends.targets import locate
from vmconv.errors import AccessError, PlanError, os_errors
from vmconv.inplace import neighbours, rules
from vmconv.inplace.rules import Own
from vmconv.inplace.stay import Claim
from vmconv.io import locks, ownership
from vmconv.io.directory import Directory
from vmconv.io.opener import Opener
from vmconv.model.image import Image
from vmconv.model.plan import Plan
from vmconv.model.sources import File
from vmconv.system import linux

_UNMARKED = "no home directory for a key: after an interruption, only vmconv recover --trust restores the disk"


class Site:
    """The source image of a conversion in place, and its own files without those of lower layers.

    With `chain` the files of all layers, down to the layer in the file `base`, exclusive.
    """

    def __init__(
        self,
        image: Image,
        opener: Opener,
        source: str,
        *,
        keep_undo: bool,
        any_owner: bool,
        chain: bool,
        base: str | None,
    ) -> None:
        self.image = image
        self.opener = opener
        self.source = source
        self.keep_undo = keep_undo
        self.any_owner = any_owner
        self.chain = chain
        self.layers: list[Image] = []
        below = os.stat(base) if base else None
        for layer in image.chain():
            if below and os.path.samestat(below, os.fstat(layer.file.descriptor)):
                break
            # Reading the table opens the payload files of this layer. Those of lower layers are not open yet.
            layer.guest  # noqa: B018 opens them
            self.layers.append(layer)
            files = tuple(opener.files)
            if not chain:
                break
        self.own = tuple(Own(file, rules.own_name(file)) for file in files)

    @property
    def files(self) -> tuple[File, ...]:
        return tuple(own.file for own in self.own)

    @contextmanager
    def claimed(self, directory: str) -> Iterator[None]:
        """Locks the files, in the target's directory, during planning and execution.

        Raises `PlanError` or `AccessError` if they may not be changed in place.
        """
        self._refuse_losses()
        rules.refuse_links(self.source)
        with ExitStack() as claims:
            # From here on by descriptor, because the directory's owner might replace it.
            with os_errors("cannot be opened", PlanError):
                self.directory = claims.enter_context(Directory.at(directory))
            self._refuse_led_away()
            self._refuse()
            self.descriptors = {id(own.file): self._claim(own, claims) for own in self.own}
            yield

    def _refuse_losses(self) -> None:
        losses = [loss for layer in self.layers for loss in layer.losses]
        rules.refuse_losses(self.source, losses, keep_undo=self.keep_undo)

    def _refuse_led_away(self) -> None:
        """Raises `AccessError` if a symbolic link of another user leads to the source."""
        with os_errors("cannot be opened", PlanError):
            directory, name = locate(self.source)
        with directory:
            if not directory.holds(name, self.image.file.descriptor):
                raise AccessError(f"{self.source}: was replaced while it was being examined", hint="try again")

    def _refuse(self) -> None:
        rules.refuse_places(self.own, self.directory)
        rules.refuse_leftovers(self.directory, self.own)
        if not self.any_owner:
            named = rules.own_name(self.image.file)
            rules.refuse_other_owners(self.directory, named, [own.name for own in self.own], "--any-owner")
        rules.refuse_foreign(self.layers, self.files, self.opener.registry)
        unmarked = None if ownership.can_mark() else _UNMARKED
        self.image.warnings += tuple(text for text in (self._refuse_neighbours(), unmarked) if text)

    def _refuse_neighbours(self) -> str | None:
        """Returns a warning if not all files could be searched."""
        found = neighbours.look(self.directory, self.own, self.opener.registry)
        neighbours.refuse(found)
        return neighbours.warning(found)

    def _claim(self, own: Own, claims: ExitStack) -> int:
        """Returns a writable descriptor of a file, locked. Raises `AccessError` if another process uses it."""
        locks.refuse_users(own.file)
        with os_errors("cannot be changed", PlanError):
            descriptor = self.directory.open(own.name, os.O_RDWR)
        claims.callback(linux.close, descriptor)
        rules.refuse_exchanged(self.directory, own, descriptor)
        locks.claim(descriptor)
        return descriptor

    @property
    def owner(self) -> int | None:
        """The user ID of all files' owner; None if any owner is allowed."""
        return None if self.any_owner else os.fstat(self.image.file.descriptor).st_uid

    def refuse_plan(self, plan: Plan) -> None:
        """Raises `PlanError` if the result would refer to the removed source, or replace files of other users."""
        if plan.references:
            raise PlanError(
                "in place, the target cannot refer to the source, which no longer exists afterwards",
                hint="omit --in-place",
            )
        if not self.any_owner:
            # --force replaces existing files, and the image chooses some of the names.
            made = [file.name for file in plan.files]
            rules.refuse_other_owners(self.directory, rules.own_name(self.image.file), made, "--any-owner")


class MetadataSite(Site):
    """The file of an image whose metadata changes where it lies; it keeps its name, and the files with payload.

    With `keeps_content` the guest's disk stays as it is, so layers on top of the image stay right.
    """

    def __init__(self, image: Image, opener: Opener, source: str, *, keep_undo: bool, keeps_content: bool) -> None:
        # Neither tables nor the parent are read: both may be damaged or missing.
        self.image = image
        self.opener = opener
        self.source = source
        self.keep_undo = keep_undo
        self.any_owner = False
        self.keeps_content = keeps_content
        self.layers = [image]
        self.own = (Own(image.file, rules.own_name(image.file)),)

    @property
    def claim(self) -> Claim:
        """The claim on the file, for a transaction."""
        (own,) = self.own
        descriptor = self.descriptors[id(own.file)]
        return Claim(own, descriptor, (), self.image.format_name, self.directory, self.owner)

    def _refuse_losses(self) -> None:
        """Does nothing: the image keeps all that is not changed."""

    def _refuse_neighbours(self) -> str | None:
        return None if self.keeps_content else super()._refuse_neighbours()
