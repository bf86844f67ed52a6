"""What the command line does, from Python: one function for each command, with typed results, for files by path.

Paths are strings, bytes or path objects. What is given is checked first, strictly: "no" is no bool, and a string is no
list of strings. Keywords that all share: `allow_external`, trees of files that images may refer to besides their own
directory; `force_share`, to read what another process writes. All raise `VmconvError`: what makes no sense is a
`UsageError`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Unpack

from vmconv import conversion
from vmconv.arguments import (
    Believed,
    CompareOptions,
    ConvertOptions,
    Descriptor,
    Fan,
    FanoutOptions,
    ImageOptions,
    Making,
    OptionValue,
    Pair,
    PairOptions,
    Reading,
    StreamOptions,
    StrPath,
    Verify,
    checked,
)
from vmconv.checking import check_image
from vmconv.commit import Progress
from vmconv.comparison import Comparison, compare_images
from vmconv.conversion import Request, Result
from vmconv.description import describe
from vmconv.errors import BackendError, UsageError
from vmconv.faults import plugin_faults
from vmconv.formats import CheckReport
from vmconv.image import Image
from vmconv.mapping import MapRow, map_rows
from vmconv.opener import Opener
from vmconv.planner import Plan
from vmconv.proof import Proof, prove_images
from vmconv.registry import installed

if TYPE_CHECKING:
    from vmconv.inplace.recovery import Recovery


def convert(
    source: StrPath,
    target: StrPath,
    *,
    verify: bool | Verify = True,
    announce: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
    verifying: Progress | None = None,
    **options: Unpack[ConvertOptions],
) -> Result:
    """Converts the disk in the file `source` into the new file `target` and returns what was done.

    `options` are the other fields of `Request`. `announce` is called with the plan before anything is written,
    `progress` with bytes done and to do. `verify` says how the result is compared with the source before it gets its
    name: True is "metadata", False not at all; "sample" and "bytes" read payload and call `verifying` with the bytes
    read and to read, first with none. The target appears complete or not at all; the source is not modified unless
    `in_place`, which turns it into the target.
    """
    how = checked(Making, verify=verify, announce=announce, progress=progress, verifying=verifying)
    request = checked(Request, source=source, target=target, **options)
    with _errors():
        return conversion.run(request, **how._asdict())[0]


def fanout(
    source: StrPath,
    formats: Iterable[str],
    *,
    directory: StrPath = ".",
    options: Mapping[str, Mapping[str, OptionValue]] = MappingProxyType({}),
    verify: bool | Verify = True,
    announce: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
    verifying: Progress | None = None,
    **others: Unpack[FanoutOptions],
) -> tuple[Result, ...]:
    """Makes an image of the disk in the file `source` in each of the formats, and returns what was done for each.

    They are named after the source, in `directory`; all appear, or none does. `options` are those of the writers, by
    format; `others` the other fields of `Request`. All share the blocks of the source, so that any can be deleted
    without the others noticing.
    """
    from vmconv import fanning

    how = checked(Making, verify=verify, announce=announce, progress=progress, verifying=verifying)
    fan = checked(Fan, formats=formats, directory=directory, options=options)
    common = checked(Request, source=source, target=fan.directory, **others)
    with _errors():
        return conversion.run(*fanning.requests(common, *fan), **how._asdict())


def stream(
    source: StrPath,
    descriptor: int,
    target_format: str,
    *,
    verify: bool | Verify = True,
    announce: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
    verifying: Progress | None = None,
    **options: Unpack[StreamOptions],
) -> Result:
    """Writes what `convert` would make to an open descriptor, such as a pipe's, and returns what was done.

    The size is in the plan that `announce` is called with. Raises `BrokenPipeError` when the reader has gone.
    """
    from vmconv import streaming

    how = checked(Making, verify=verify, announce=announce, progress=progress, verifying=verifying)
    to = checked(Descriptor, descriptor=descriptor).descriptor
    _refuse_unwritable(to)
    request = checked(Request, source=source, target=streaming.TARGET, target_format=target_format, **options)
    with _errors():
        return streaming.run(request, to, **how._asdict())


def _refuse_unwritable(descriptor: int) -> None:
    import fcntl

    try:
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    except (OSError, OverflowError, ValueError) as exc:
        raise UsageError(f"argument descriptor: {descriptor} is not open") from exc
    if mode == os.O_RDONLY:
        raise UsageError(f"argument descriptor: {descriptor} is not open for writing")


def recover(path: StrPath, *, trust: bool = False) -> Recovery:
    """Takes back, or finishes, the conversion that was interrupted and that `path` was part of.

    That is one in place, or one that made several files and had begun to give them their names. The journal of one in
    place must be this user's, made in this directory; `trust` follows anybody's.
    """
    from vmconv.inplace import recovery
    from vmconv.targets import finished

    journal = checked(Believed, path=path, trust=trust)
    with _errors():
        if finished(journal.path, trust=journal.trust):
            return recovery.Recovery(journal.path, True)
        return recovery.recover(journal.path, trust=journal.trust)


def undo(path: StrPath, *, trust: bool = False) -> str:
    """Turns the target of a conversion in place back into its source, and returns the path of that.

    Needs what `keep_undo` kept, and that nobody has written to the target since. That must be this user's, made in this
    directory; `trust` follows anybody's.
    """
    from vmconv.inplace import undo as module

    kept = checked(Believed, path=path, trust=trust)
    with _errors():
        return module.undo(kept.path, trust=kept.trust)


def plan(source: StrPath, target: StrPath, **options: Unpack[ConvertOptions]) -> Plan:
    """Returns what `convert` would do with the same arguments; touches nothing."""
    request = checked(Request, source=source, target=target, **options)
    with _errors(), conversion.prepared(request) as ready:
        return ready.plan


def info(path: StrPath, **options: Unpack[ImageOptions]) -> dict[str, Any]:
    """Returns the description of an image, with the keys of `qemu-img info --output=json`; reads its header only."""
    with _image(path, options, content_decides=True) as (image, opener):
        return describe(image, opener)


def map_disk(path: StrPath, **options: Unpack[ImageOptions]) -> list[MapRow]:
    """Returns where each range of the guest's disk lies, all layers of a chain taken together."""
    with _image(path, options) as (image, _):
        return list(map_rows(image))


def check(path: StrPath, **options: Unpack[ImageOptions]) -> CheckReport | None:
    """Returns what is wrong with an image and the files it refers to; None when its format has nothing to check."""
    with _image(path, options) as (image, opener):
        return check_image(image, opener)


def compare(left: StrPath, right: StrPath, **options: Unpack[CompareOptions]) -> Comparison:
    """Returns whether a guest sees the same bytes in both; true when it does. Reads only what is not shared."""
    pair = checked(Pair, left=left, right=right, **options)
    with _both(pair) as (one, other):
        return compare_images(one, other, strict=pair.strict)


def prove(left: StrPath, right: StrPath, **options: Unpack[PairOptions]) -> Proof:
    """Returns the proof, by physical addresses, that two images share their payload; true when all of it is shared."""
    with _both(checked(Pair, left=left, right=right, **options)) as (one, other):
        return prove_images(one, other)


@contextmanager
def _image(path: StrPath, options: ImageOptions, *, content_decides: bool = False) -> Iterator[tuple[Image, Opener]]:
    asked = checked(Reading, path=path, **options)
    with _errors(), _opener(asked) as opener:
        yield opener.image(asked.path, asked.format_name, content_decides=content_decides), opener


@contextmanager
def _both(asked: Pair) -> Iterator[tuple[Image, Image]]:
    # An own opener for each: what one image may refer to is not what the other may.
    with _errors(), _opener(asked) as one, _opener(asked, "-F") as other:
        yield one.image(asked.left, asked.left_format), other.image(asked.right, asked.right_format)


def _opener(asked: Reading | Pair, format_option: str = "-f") -> Opener:
    return Opener(
        installed(),
        allow_external=asked.allow_external,
        force_share=asked.force_share,
        backing_format=asked.backing_format,
        format_option=format_option,
    )


@contextmanager
def _errors() -> Iterator[None]:
    """Lets out errors of vmconv only, and that the reader of a pipe has gone."""
    try:
        with plugin_faults():
            yield
    except BrokenPipeError:
        raise
    except OSError as exc:
        name = f"{os.fsdecode(exc.filename)}: " if isinstance(exc.filename, str | bytes) else ""
        raise BackendError(f"{name}{exc.strerror or exc}") from exc
