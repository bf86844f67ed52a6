"""An object that has appeared, compared with its plan: its metadata, and samples of what the store copied.

Shares no code with what makes parts: the object is read as a source is, by ranges of the version with its ETag.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmconv.plugin import Action, HttpObject, RemoteFile, VerifyError, installed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmconv.plugin import FilePlan, Source, Url
    from vmconv_s3.parts import Part

_STEP = 4 << 20
_SAMPLE = 4096
_MOST_SAMPLES = 64
"""Parts of which samples are compared: at their first and their last bytes."""


def refuse_other_content(plan: FilePlan, parts: Sequence[Part], url: Url, etag: str) -> None:
    """Raises `VerifyError` unless the object with this ETag has the planned metadata, and samples of payload."""
    remote = installed().scheme("s3").open(url)
    try:
        if not isinstance(remote, HttpObject) or remote.etag != etag or remote.size != plan.size:
            raise VerifyError(f"{plan.name}: is another object than the one that was made")
        made = RemoteFile(url, remote)
        for offset, length, index, source_offset in plan.steps.rows(Action.WRITE):
            _compare(plan, made, offset, length, plan.sources[index], source_offset)
        copied = [part for part in parts if part.is_copied]
        for part in copied[:: -(-len(copied) // _MOST_SAMPLES) or 1]:
            for skip in (0, part.length - _SAMPLE):
                _compare(plan, made, part.offset + skip, _SAMPLE, plan.sources[part.source], part.at + skip)
    finally:
        remote.close()


def _compare(plan: FilePlan, made: RemoteFile, offset: int, length: int, source: Source, source_offset: int) -> None:
    for at in range(0, length, _STEP):
        step = min(_STEP, length - at)
        if made.read(offset + at, step) != source.read(source_offset + at, step):
            raise VerifyError(f"{plan.name}: has other bytes than planned from {offset + at:#x} on")
