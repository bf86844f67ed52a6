"""Compares the files of a package with the digests in its manifest, which reads all of their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vmconv.errors import AccessError, counted
from vmconv.machine.findings import Finding

if TYPE_CHECKING:
    from vmconv.interface.machines import Digest
    from vmconv.machine.source import Source
    from vmconv.model.plan import Progress
    from vmconv.model.sources import File

_CHUNK = 4 << 20


def check_manifest(source: Source, progress: Progress | None = None) -> tuple[Finding, ...]:
    """Returns an error for each file of a package that has another digest than its manifest states, and a summary.

    `progress` is called with the bytes read so far and the bytes of all files.
    """
    if source.manifest is None:
        return (Finding("warning", "manifest", "there are no digests of the machine's files"),)
    found: list[Finding] = []
    files: list[tuple[Digest, File]] = []
    for digest in source.manifest.digests:
        try:
            files.append((digest, source.disks.related(source.file, digest.file, "file of the manifest")))
        except AccessError as exc:
            found.append(Finding("error", digest.file, f"the manifest lists it, and it cannot be read: {exc}"))
    total, done = sum(file.size for _, file in files), 0
    for digest, file in files:
        state = hashlib.new(digest.algorithm, usedforsecurity=False)
        for at in range(0, file.size, _CHUNK):
            state.update(file.read(at, min(_CHUNK, file.size - at)))
            if progress:
                progress(done + min(at + _CHUNK, file.size), total)
        done += file.size
        if state.hexdigest() != digest.value:
            text = f"its {digest.algorithm} is {state.hexdigest()}, the manifest has {digest.value}"
            found.append(Finding("error", digest.file, text, "the package is damaged or was changed"))
    good = len(source.manifest.digests) - len(found)
    compared = Finding("note", "manifest", f"{counted(good, 'file')} with the right digest, besides the configuration")
    return (*found, *_without_digest(source), compared)


def _without_digest(source: Source) -> Iterator[Finding]:
    listed = {each.file for each in source.manifest.digests} if source.manifest else set()
    for number, disk in enumerate(source.machine.disks):
        if disk.file is not None and disk.file not in listed:
            yield Finding("warning", f"disks[{number}]", f"the manifest has no digest of {disk.file}")
