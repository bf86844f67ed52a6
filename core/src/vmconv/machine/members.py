"""Disks inside a package, such as an OVA: members are ranges of the package's file, so nothing is unpacked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vmconv.errors import AccessError, ImageError
from vmconv.io.opener import Opener
from vmconv.model.image import Image
from vmconv.model.planned import PlannedFile

if TYPE_CHECKING:
    from vmconv.interface.machines import Member
    from vmconv.io.registry import Registry
    from vmconv.model.extents import Extents
    from vmconv.model.sources import File


class Members(Opener):
    """An opener of the members of a package. No name leads out of the package."""

    def __init__(self, registry: Registry, package: File, members: Sequence[Member]) -> None:
        super().__init__(registry)
        self._package = package
        self._tables = {member.name: member.table for member in members}
        self._files: dict[str, PlannedFile] = {}
        self._depth_of: dict[int, list[str]] = {}

    def member(self, name: str) -> PlannedFile:
        """Returns a member as a file; raises `AccessError` if the package has none of that name."""
        plain = name.removeprefix("./")
        if plain not in self._tables:
            raise AccessError(f"{self._package.name}: has no member {name!r}")
        if plain not in self._files:
            path = os.path.join(self._package.path, plain)
            self._files[plain] = PlannedFile(path, self._tables[plain])
        return self._files[plain]

    def disk(self, origin: File, reference: str, format_name: str | None) -> Image:
        file = self.member(reference)
        image = self._read_chain(file, format_name, [])

        def load_guest() -> Extents:
            table = self.in_package(image.flat)
            # The member's reader may have added some with the table.
            whole.warnings = tuple(dict.fromkeys((*whole.warnings, *image.warnings)))
            return table

        whole = Image(
            image.format_name,
            file,
            image.size,
            load_guest,
            facts=image.facts,
            losses=image.losses,
            warnings=image.warnings,
            details=lambda: image.details,
        )
        return whole

    def in_package(self, table: Extents) -> Extents:
        """Returns a table with each window onto a member as one onto the package's file."""
        for name, file in self._files.items():
            table = table.through(file, self._tables[name])
        return table

    def _read_chain(self, file: PlannedFile, format_name: str | None, above: list[str]) -> Image:
        if file.name in above:
            raise ImageError(f"{self._package.name}: backing file {file.name!r} is part of the chain already, a loop")
        self._depth_of[id(file)] = [*above, file.name]
        return self._read(self.registry.identify(file, format_name, option=""), file)

    def related(self, origin: File, reference: str, role: str, *, moved: bool = False) -> File:
        return self.member(reference)

    def named_parent(self, origin: File, reference: str, format_name: str | None, *, moved: bool = False) -> Image:
        return self._read_chain(self.member(reference), format_name, self._depth_of[id(origin)])

    def search(self, origin: File, suffix: str) -> Iterator[tuple[str, File]]:
        for name in self._tables:
            if name.lower().endswith(suffix) and name != origin.name:
                yield name, self.member(name)
