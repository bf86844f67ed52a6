"""What is wrong with an image: with its structure, which its format knows, and with the files that it refers to."""

from __future__ import annotations

from collections.abc import Iterator

from vmconv.errors import AccessError, ImageError
from vmconv.formats import CheckReport
from vmconv.image import Image
from vmconv.opener import Opener
from vmconv.references import Dependency, Finding, compared


def check_image(image: Image, opener: Opener) -> CheckReport | None:
    """Returns what was found; None when the format has no structure to check and the image refers to no file.

    Raises `AccessError` where the rules forbid to look at a file that the image refers to.
    """
    report = opener.registry.format(image.format_name).check(image)
    findings = [_look_at(dependency, image, opener) for dependency in image.dependencies]
    if report is None and not findings:
        return None
    found = report or CheckReport(image_end=image.file.size)
    problems = tuple(_text(finding, finding.problem) for finding in findings if finding.problem)
    return found._replace(
        corruptions=found.corruptions + problems,
        corruption_count=found.corruption_count + len(problems),
        doubts=found.doubts + tuple(_text(finding, finding.doubt) for finding in findings if finding.doubt),
    )


def _look_at(dependency: Dependency, image: Image, opener: Opener) -> Finding:
    try:
        file = opener.related(image.file, dependency.name, dependency.role)
    except AccessError as exc:
        if isinstance(exc.__cause__, FileNotFoundError):
            return Finding(dependency, "is missing")
        raise
    try:
        return compared(dependency, file)
    finally:
        opener.release(file)


def remarks(image: Image, opener: Opener) -> Iterator[str]:
    """Yields what there is to say of the files that `image` is made of, and which of them may not be looked at."""
    for dependency in image.dependencies:
        try:
            finding = _look_at(dependency, image, opener)
        except (AccessError, ImageError) as exc:
            yield str(exc)
        else:
            if said := finding.problem or finding.doubt:
                yield f"{image.file.name}: {_text(finding, said)}"


def warnings(image: Image, opener: Opener) -> Iterator[str]:
    """Yields the remarks on `image` and on the layers below it, where they have recorded what files were."""
    for layer in image.chain():
        if any(dependency.fingerprint for dependency in layer.dependencies):
            yield from remarks(layer, opener)


def _text(finding: Finding, said: str) -> str:
    return f"{finding.dependency.role} {finding.dependency.name} {said}"
