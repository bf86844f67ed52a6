"""Edits of an image's metadata where it lies, by the protocol of conversions in place: all of an edit or nothing.

A format returns the file as it will be, a `Draft`. Its own reader and check must accept the written file before the
edit counts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from vmconv.conversion import execute
from vmconv.conversion.planner import plan_layout
from vmconv.errors import PlanError, VerifyError
from vmconv.inplace.rules import refuse_undo_file
from vmconv.inplace.settling import refuse_interrupted, settle
from vmconv.inplace.site import MetadataSite
from vmconv.inplace.stay import InPlaceBackend
from vmconv.interface.arguments import Editing
from vmconv.interface.format import CheckReport, Format
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.model.draft import Draft
from vmconv.model.extents import Column, Extents
from vmconv.model.image import Image
from vmconv.model.layout import Layout, OutFile
from vmconv.model.plan import Plan
from vmconv.model.sources import File

Agrees = Callable[[Image], str | None]
"""Returns what is wrong with the edited image, None if it is as it was meant."""


class Edited(NamedTuple):
    """The outcome of an edit: the image, and the bytes of metadata that were written."""

    path: str
    format_name: str
    written: int
    warnings: tuple[str, ...]


@contextmanager
def opened(asked: Editing, *, repeatable: bool) -> Iterator[tuple[Image, Format, Opener]]:
    """Yields the image to edit. An interrupted change of it is settled first, if the edit is `repeatable`."""
    with Opener(
        installed(), allow_external=asked.allow_external, settle=settle if repeatable else refuse_interrupted
    ) as opener:
        image = opener.image(asked.path, asked.source_format)
        yield image, opener.registry.format(image.format_name), opener


def refuse_corrupt(image: Image, report: CheckReport | None) -> None:
    """Raises `PlanError` for an image whose structure is damaged: an edit could make it worse."""
    if report is not None and (report.corruption_count or report.errors):
        found = (*report.corruptions, *report.errors)
        raise PlanError(f"{image.file.name}: {found[0]}", hint=f"vmconv check -r all {image.file.path}")


def carry_out(
    image: Image,
    draft: Draft,
    opener: Opener,
    asked: Editing,
    *,
    keeps_content: bool,
    agrees: Agrees,
    announce: Callable[[Plan], None] | None = None,
) -> Edited:
    """Makes the image's file what the draft is. Raises `VerifyError`, and changes nothing, unless the result agrees."""
    refuse_undo_file(image.file)
    one = opener.registry.format(image.format_name)
    site = MetadataSite(image, opener, asked.path, keep_undo=asked.keep_undo, keeps_content=keeps_content)
    with site.claimed(os.path.dirname(os.path.realpath(asked.path))):
        backend = InPlaceBackend(site.claim, keep_undo=asked.keep_undo)
        survey = backend.survey(site.directory.path, [image.file])
        name = site.claim.carrier.name
        layout = Layout((OutFile(draft.table()),))
        plan = plan_layout(layout, name, site.directory.path, backend.name, survey, destination="source")
        if announce:
            announce(plan)

        def verify(files: list[File]) -> None:
            made = one.read(files[0], opener)
            problem = agrees(made)
            if problem:
                raise VerifyError(
                    f"{image.file.name}: after the edit, {problem}",
                    hint="this is a defect of vmconv or of the storage, please report it; nothing was changed",
                )

        execute.carry_out(
            plan,
            backend.begin(site.directory),
            [image.file],
            asked.path,
            verify=verify,
            progress=None,
            created=None,
            done=lambda: None,
        )
    return Edited(asked.path, one.name, plan.totals.written, image.warnings)


def damage(one: Format, made: Image) -> str | None:
    """Returns the first defect that the format's own check finds, None for a sound image."""
    report = one.check(made)
    return report.corruptions[0] if report and report.corruption_count else None


def same_table(one: Extents, other: Extents) -> bool:
    """True if both tables have the same rows; of the sources only the order counts, because the edited file is new."""
    return one.size == other.size and all(map(np.array_equal, _columns(one), _columns(other)))


def _columns(table: Extents) -> tuple[Column, ...]:
    """Returns the columns of a table, its sources numbered in the order of their use."""
    _, first, number = np.unique(table.source, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))
    return table.start, table.kind.astype(np.int64), table.offset, order[number.reshape(-1)]
