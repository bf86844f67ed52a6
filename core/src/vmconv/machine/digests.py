"""Compares payload of a package with the digests in it, which reads all of its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vmconv.errors import AccessError, ImageError, counted
from vmconv.machine.findings import Finding

if TYPE_CHECKING:
    from vmconv.interface.machines import Digest
    from vmconv.machine.source import Source
    from vmconv.model.plan import Progress
    from vmconv.model.sources import File

_CHUNK = 4 << 20


_DAMAGED = "the package is damaged or was changed"


def check_payload(source: Source, progress: Progress | None = None) -> tuple[Finding, ...]:
    """Returns an error for each part of a package that has another digest than the package states, and a summary."""
    report = source.format.check_payload(source.file, progress)
    if report is None:
        return check_manifest(source, progress)
    if not report.allocated_clusters and not report.corruption_count:
        return (Finding("warning", "checksums", "there are none of the disks"),)
    found = [Finding("error", "checksums", text, _DAMAGED) for text in report.corruptions]
    if report.corruption_count > len(found):
        found.append(Finding("error", "checksums", f"{report.corruption_count} in all are wrong or missing"))
    good = report.allocated_clusters
    return (*found, Finding("note", "checksums", f"{counted(good, 'piece')} with the right checksum"))


def refuse_damaged(source: Source, progress: Progress | None, *, sample: bool) -> None:
    """Raises `ImageError` if payload of a package, or of a sample of its parts, has another checksum than it states."""
    report = source.format.check_payload(source.file, progress, sample=sample)
    if report is not None and report.corruptions:
        more = report.corruption_count - 1
        problem = report.corruptions[0] + (f", and {more} more" if more else "")
        raise ImageError(f"{source.file.name}: {problem}", hint="--verify=metadata converts it as it is")


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
            found.append(Finding("error", digest.file, text, _DAMAGED))
    good = len(source.manifest.digests) - len(found)
    compared = Finding("note", "manifest", f"{counted(good, 'file')} with the right digest, besides the configuration")
    return (*found, *_without_digest(source), compared)


def _without_digest(source: Source) -> Iterator[Finding]:
    listed = {each.file for each in source.manifest.digests} if source.manifest else set()
    for number, disk in enumerate(source.machine.disks):
        if disk.file is not None and disk.file not in listed:
            yield Finding("warning", f"disks[{number}]", f"the manifest has no digest of {disk.file}")
