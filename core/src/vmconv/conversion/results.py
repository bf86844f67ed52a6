"""Opens files of a result by their final names before they have them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

from vmconv.errors import AccessError
from vmconv.interface.format import Format
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry
from vmconv.model.image import Image
from vmconv.model.layout import Reference
from vmconv.model.sources import File


class Results(Opener):
    """An opener that maps final names to files of the result, and the result's references to files of the source.

    `passphrases` are those of the result.
    """

    def __init__(
        self, registry: Registry, references: Iterable[Reference] = (), passphrases: tuple[bytes, ...] = ()
    ) -> None:
        super().__init__(registry)
        self._passphrases = passphrases
        self._results: dict[str, tuple[File, Format]] = {}
        self._sources = {reference.name: reference.file for reference in references}

    def add(self, name: str, file: File, reader: Format) -> None:
        self._results[name] = file, reader

    def passphrases(self, file: File) -> tuple[bytes, ...]:
        return self._passphrases or super().passphrases(file)

    def related(self, origin: File, reference: str, role: str, *, moved: bool = False) -> File:
        return self._sources.get(reference) or self._find(origin, reference, role)[0]

    def companion(self, origin: File, suffixes: Sequence[str], role: str) -> tuple[str, File] | None:
        own = next((name for name, (file, _) in self._results.items() if file is origin), origin.name)
        names = [os.path.splitext(own)[0] + suffix for suffix in suffixes]
        found = next((name for name in names if name in self._results), None)
        return (found, self._results[found][0]) if found else None

    def named_parent(self, origin: File, reference: str, format_name: str | None, *, moved: bool = False) -> Image:
        file, reader = self._find(origin, reference, "backing file")
        return reader.read(file, self)

    def search(self, origin: File, suffix: str) -> Iterator[tuple[str, File]]:
        yield from ((name, file) for name, (file, _) in self._results.items() if file is not origin)

    def _find(self, origin: File, reference: str, role: str) -> tuple[File, Format]:
        found = self._results.get(os.path.basename(reference))
        if found is None:
            # As if the file were missing: some readers then try another name.
            cause = FileNotFoundError(reference)
            raise AccessError(f"{origin.name}: {role} {reference!r} is not a file of the result") from cause
        return found
