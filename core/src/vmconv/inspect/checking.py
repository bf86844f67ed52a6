"""Checks an image: its structure, by its format, and the files that it refers to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from vmconv.errors import AccessError, ImageError, ReadError, SecretError, UsageError, VmconvError
from vmconv.interface.format import CheckReport
from vmconv.io.opener import Opener
from vmconv.model.image import Image, RangesCrc
from vmconv.model.references import Dependency, Finding, compared

if TYPE_CHECKING:
    from vmconv.io.remote import RemoteFile

_MISSING = "is missing"
_ENCRYPTED = "is encrypted, and without a passphrase (--secret) only its structure can be checked"
_PIECE = 4 << 20
"""Bytes that are read at once for a hash."""


def check_image(image: Image, opener: Opener, *, payload: bool = False) -> CheckReport | None:
    """Returns the report; None if the format has no structure to check and the image refers to no file.

    Covers all that reading the image needs: its own files and the layers below. The tables of lower layers are read as
    in a conversion; their structure is not checked. With `payload`, all of the disk is read and compared with the
    hashes that the image stores. Raises `UsageError` if it stores none.
    """
    if payload and not (image.digests or image.crcs):
        raise UsageError(f"{image.file.name}: {image.format_name} stores no hash of the disk to compare with")
    problems = _problems_of_objects(opener)
    try:
        report = opener.registry.format(image.format_name).check(image)
    except ReadError:
        # What is missing where the object lies is why it cannot be read.
        if not problems:
            raise
        report = None
    alone = report is None and not image.dependencies and image.parent_reference is None
    if alone and problems is None and _refusal(image) is None:
        return None
    found = report or CheckReport(image_end=image.file.size)
    if problems:
        found = found._replace(
            corruptions=(*found.corruptions, *problems), corruption_count=found.corruption_count + len(problems)
        )
    found = _with_layers(_readable(_with_files(found, image, opener), image), image)
    return _with_payload(found, image) if payload and not found.errors else found


def _problems_of_objects(opener: Opener) -> list[str] | None:
    """Returns what is wrong with files that are not local, where they lie; None if there is nothing to look at."""
    remote = [cast("RemoteFile", file) for file in opener.files if file.is_remote]
    looked = [(file, problems) for file in remote if (problems := file.remote.problems()) is not None]
    return [f"{file.name}: {problem}" for file, problems in looked for problem in problems] if looked else None


def _with_payload(found: CheckReport, image: Image) -> CheckReport:
    """Returns the report with payload that cannot be decoded, and hashes that differ from those of the disk."""
    import hashlib

    # MD5 is what acquisitions store. It is compared, not trusted.
    sums = {name: hashlib.new(name, usedforsecurity=False) for name in image.digests}
    problems: list[str] = []
    try:
        for at in range(0, image.size if sums else 0, _PIECE):
            piece = image.flat.read(at, min(_PIECE, image.size - at))
            for each in sums.values():
                each.update(piece)
        problems += filter(None, (_crc_problem(image, one) for one in image.crcs))
    except ImageError as exc:
        problems.append(str(exc))
    else:
        problems += [
            f"{name} of the disk is {each.hexdigest()}, the image says {image.digests[name]}"
            for name, each in sums.items()
            if each.hexdigest() != image.digests[name]
        ]
    return found._replace(
        corruptions=(*found.corruptions, *problems), corruption_count=found.corruption_count + len(problems)
    )


def _crc_problem(image: Image, stored: RangesCrc) -> str | None:
    import zlib

    crc = 0
    for start, length in stored.ranges:
        for at in range(start, start + length, _PIECE):
            crc = zlib.crc32(image.flat.read(at, min(_PIECE, start + length - at)), crc)
    if stored.crc in (None, crc):
        return None
    return f"CRC-32 of {stored.name} is {crc:08x}, the image says {stored.crc:08x}"


def _with_files(found: CheckReport, image: Image, opener: Opener) -> CheckReport:
    """Returns the report with problems of the image's other files."""
    problems, doubts, errors = [], [], []
    for dependency in image.dependencies:
        try:
            finding = _look_at(dependency, image, opener)
        except VmconvError as exc:
            errors.append(str(exc))
            continue
        problems += [_text(finding, finding.problem)] if finding.problem else []
        doubts += [_text(finding, finding.doubt)] if finding.doubt else []
    return found._replace(
        corruptions=(*found.corruptions, *problems),
        corruption_count=found.corruption_count + len(problems),
        doubts=(*found.doubts, *doubts),
        errors=(*found.errors, *errors),
    )


def _readable(found: CheckReport, image: Image) -> CheckReport:
    """Returns the report, with the reader's refusal as a corruption if the check found nothing."""
    if found.corruption_count or found.errors:
        return found
    refusal = _refusal(image)
    if refusal is None:
        return found
    if isinstance(refusal, SecretError):
        return found._replace(doubts=(*found.doubts, f"{image.file.name}: {_ENCRYPTED}"))
    if isinstance(refusal, AccessError | ReadError):
        return found._replace(errors=(str(refusal),))
    return found._replace(corruptions=(str(refusal),), corruption_count=1)


def _with_layers(found: CheckReport, image: Image) -> CheckReport:
    """Returns the report with errors of reading lower layers."""
    if f"backing file {image.parent_reference} {_MISSING}" in found.corruptions:
        return found
    errors: list[str] = []
    try:
        for layer in image.chain():
            refusal = None if layer is image else _refusal(layer)
            if refusal is not None and not isinstance(refusal, SecretError):
                errors.append(str(refusal))
    except VmconvError as exc:
        errors.append(str(exc))
    return found._replace(errors=(*found.errors, *errors))


def _refusal(image: Image) -> VmconvError | None:
    """Returns the error of reading a layer's tables, None on success."""
    try:
        image.guest  # noqa: B018
    except VmconvError as exc:
        return exc
    return None


def _look_at(dependency: Dependency, image: Image, opener: Opener) -> Finding:
    try:
        moved = dependency.role == "extent" and not dependency.fingerprint
        file = opener.related(image.file, dependency.name, dependency.role, moved=moved)
    except AccessError as exc:
        if isinstance(exc.__cause__, FileNotFoundError):
            return Finding(dependency, _MISSING)
        raise
    try:
        return compared(dependency, file)
    finally:
        opener.release(file)


def remarks(image: Image, opener: Opener) -> Iterator[str]:
    """Yields problems and doubts of the image's files, and the files that may not be opened."""
    for dependency in image.dependencies:
        try:
            finding = _look_at(dependency, image, opener)
        except (AccessError, ImageError) as exc:
            yield str(exc)
        else:
            if said := finding.problem or finding.doubt:
                yield f"{image.file.name}: {_text(finding, said)}"


def warnings(image: Image, opener: Opener) -> Iterator[str]:
    """Yields the remarks on `image` and its lower layers, for layers with records of their files."""
    for layer in image.chain():
        if any(dependency.fingerprint for dependency in layer.dependencies):
            yield from remarks(layer, opener)


def _text(finding: Finding, said: str) -> str:
    return f"{finding.dependency.role} {finding.dependency.name} {said}"
