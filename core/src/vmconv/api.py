"""What the command line does, from Python: one function for each command, with typed results, for files by path.

Keyword arguments that all of them share: `allow_external`, trees of files that images may refer to besides their own
directory; `force_share`, to read what another process writes. All raise `VmconvError`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vmconv import conversion
from vmconv.checking import check_image
from vmconv.commit import Progress
from vmconv.comparison import Comparison, compare_images
from vmconv.containers import new_name
from vmconv.conversion import Request, Result
from vmconv.description import describe
from vmconv.errors import UsageError
from vmconv.formats import CheckReport
from vmconv.mapping import MapRow, map_rows
from vmconv.opener import Opener
from vmconv.planner import Plan
from vmconv.proof import Proof, prove_images
from vmconv.registry import installed

if TYPE_CHECKING:
    from vmconv.inplace.recovery import Recovery


def convert(
    source: str,
    target: str,
    *,
    verify: bool = True,
    announce: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Converts the disk in the file `source` into the new file `target` and returns what was done.

    `options` are the other fields of `Request`. `announce` is called with the plan before anything is written,
    `progress` with bytes done and to do. The target appears complete or not at all; the source is never changed, but
    that `in_place` it becomes the target.
    """
    request = Request(source, target, **options)
    return conversion.run(request, verify=verify, announce=announce, progress=progress)[0]


def fanout(
    source: str,
    formats: Iterable[str],
    *,
    directory: str = ".",
    options: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    verify: bool = True,
    announce: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
    **others: Any,
) -> tuple[Result, ...]:
    """Makes an image of the disk in the file `source` in each of the formats, and returns what was done for each.

    They are named after the source, in `directory`; all appear, or none does. `options` are those of the writers, by
    format; `others` the other fields of `Request`. All share the blocks of the source, so that any can be deleted
    without the others noticing.
    """
    registry = installed()
    wanted = [registry.format(name) for name in formats]
    given = {registry.format(name).name: values for name, values in options.items()}
    if not wanted:
        raise UsageError("fan-out to no format")
    for name in given.keys() - {one.name for one in wanted}:
        raise UsageError(f"options for {name}, which is not made")
    requests = [
        Request(
            source,
            os.path.normpath(os.path.join(directory, new_name(os.path.basename(source), one, registry))),
            target_format=one.name,
            options=given.get(one.name, {}),
            **others,
        )
        for one in wanted
    ]
    return conversion.run(*requests, verify=verify, announce=announce, progress=progress)


def stream(
    source: str,
    descriptor: int,
    target_format: str,
    *,
    verify: bool = True,
    announce: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Writes what `convert` would make to an open descriptor, such as a pipe's, and returns what was done.

    The size is in the plan that `announce` is called with. Raises `BrokenPipeError` when the reader has gone.
    """
    from vmconv import streaming

    request = Request(source, streaming.TARGET, target_format=target_format, **options)
    return streaming.run(request, descriptor, verify=verify, announce=announce, progress=progress)


def recover(path: str) -> Recovery:
    """Takes back, or finishes, the conversion in place that was interrupted and that `path` was part of."""
    from vmconv.inplace import recovery

    return recovery.recover(path)


def undo(path: str) -> str:
    """Turns the target of a conversion in place back into its source, and returns the path of that.

    Needs what `keep_undo` kept, and that nobody has written to the target since.
    """
    from vmconv.inplace import undo as module

    return module.undo(path)


def plan(source: str, target: str, **options: Any) -> Plan:
    """Returns what `convert` would do with the same arguments; touches nothing."""
    with conversion.prepared(Request(source, target, **options)) as ready:
        return ready.plan


def _opener(allow_external: Iterable[str], force_share: bool, backing_format: str | None) -> Opener:
    return Opener(installed(), allow_external=allow_external, force_share=force_share, backing_format=backing_format)


def info(
    path: str,
    *,
    format_name: str | None = None,
    backing_format: str | None = None,
    allow_external: Iterable[str] = (),
    force_share: bool = False,
) -> dict[str, Any]:
    """Returns the description of an image, with the keys of `qemu-img info --output=json`; reads its header only."""
    with _opener(allow_external, force_share, backing_format) as opener:
        return describe(opener.image(path, format_name, content_decides=True), opener)


def map_disk(
    path: str,
    *,
    format_name: str | None = None,
    backing_format: str | None = None,
    allow_external: Iterable[str] = (),
    force_share: bool = False,
) -> list[MapRow]:
    """Returns where each range of the guest's disk lies, all layers of a chain taken together."""
    with _opener(allow_external, force_share, backing_format) as opener:
        return list(map_rows(opener.image(path, format_name)))


def check(
    path: str,
    *,
    format_name: str | None = None,
    backing_format: str | None = None,
    allow_external: Iterable[str] = (),
    force_share: bool = False,
) -> CheckReport | None:
    """Returns what is wrong with an image and the files it refers to; None when its format has nothing to check."""
    with _opener(allow_external, force_share, backing_format) as opener:
        return check_image(opener.image(path, format_name), opener)


def compare(
    left: str,
    right: str,
    *,
    left_format: str | None = None,
    right_format: str | None = None,
    backing_format: str | None = None,
    strict: bool = False,
    allow_external: Iterable[str] = (),
    force_share: bool = False,
) -> Comparison:
    """Returns whether a guest sees the same bytes in both; true when it does. Reads only what is not shared."""
    # An own opener for each: what one image may refer to is not what the other may.
    with (
        _opener(allow_external, force_share, backing_format) as one,
        _opener(allow_external, force_share, backing_format) as other,
    ):
        return compare_images(one.image(left, left_format), other.image(right, right_format), strict=strict)


def prove(
    left: str,
    right: str,
    *,
    left_format: str | None = None,
    right_format: str | None = None,
    backing_format: str | None = None,
    allow_external: Iterable[str] = (),
    force_share: bool = False,
) -> Proof:
    """Returns the proof, by physical addresses, that two images share their payload; true when all of it is shared."""
    with (
        _opener(allow_external, force_share, backing_format) as one,
        _opener(allow_external, force_share, backing_format) as other,
    ):
        return prove_images(one.image(left, left_format), other.image(right, right_format))
