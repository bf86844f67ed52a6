"""Conversions whose targets are objects of a store: what a plugin calls, with a backend of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from vmconv.conversion.request import Request

if TYPE_CHECKING:
    from vmconv.conversion.pipeline import Prepared
    from vmconv.conversion.request import Result
    from vmconv.interface.arguments import Reading, Verify, ZeroCopy
    from vmconv.interface.backend import ObjectBackend
    from vmconv.model.plan import Plan, Progress


class ObjectTarget(NamedTuple):
    """An object to make: its URL, its format (default: by the suffix), and its options."""

    url: str
    format_name: str | None = None
    options: Mapping[str, Any] = MappingProxyType({})


def _requests(
    storage: ObjectBackend, source: Reading, targets: Sequence[ObjectTarget], zero_copy: ZeroCopy, *, force: bool
) -> list[Request]:
    return [
        Request(
            source.path,
            target.url,
            source_format=source.format_name,
            target_format=target.format_name,
            options=target.options,
            zero_copy=zero_copy,
            force=force,
            force_share=source.force_share,
            allow_external=source.allow_external,
            source_backing_format=source.backing_format,
            from_snapshot=source.from_snapshot,
            secrets=source.secrets,
            parents=source.parents,
            storage=storage,
        )
        for target in targets
    ]


@contextmanager
def planned_objects(
    storage: ObjectBackend,
    source: Reading,
    targets: Sequence[ObjectTarget],
    *,
    zero_copy: ZeroCopy = "auto",
    force: bool = False,
) -> Iterator[Prepared]:
    """Yields what `make_objects` would do; changes nothing."""
    from vmconv.conversion.pipeline import prepared

    with prepared(*_requests(storage, source, targets, zero_copy, force=force)) as ready:
        yield ready


def make_objects(
    storage: ObjectBackend,
    source: Reading,
    targets: Sequence[ObjectTarget],
    *,
    zero_copy: ZeroCopy = "auto",
    force: bool = False,
    verify: bool | Verify = True,
    announce: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
    verifying: Progress | None = None,
    sharing: Progress | None = None,
) -> tuple[Result, ...]:
    """Makes objects of one disk, each verified before it appears under its name; see `vmconv.api.convert`."""
    from vmconv.conversion.pipeline import run

    return run(
        *_requests(storage, source, targets, zero_copy, force=force),
        verify=verify,
        announce=announce,
        progress=progress,
        verifying=verifying,
        sharing=sharing,
    )
