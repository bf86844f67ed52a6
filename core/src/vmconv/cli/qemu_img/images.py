"""Formats of images as QEMU finds them, and limits on what a front end does instead of qemu-img."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from vmconv.cli.qemu_img.arguments import QEMU_NAMES
from vmconv.cli.qemu_img.handing import NotAnsweredError, find

if TYPE_CHECKING:
    from vmconv.model.plan import Plan

COMPLETE = "    (100.00/100%)\r"

ANYWHERE = ("/",)
"""qemu-img opens each file that an image names."""

_FOOTER_ONLY = 512


def format_of(path: str, named: str | None, *, written: bool = False) -> str:
    """Returns the format of an image: the one `named`, else by its content alone, as QEMU finds it.

    Raises `NotAnsweredError` if vmconv and QEMU may disagree. `written`: the image is changed, and QEMU warns of
    raw ones.
    """
    if named is not None:
        return named
    from vmconv.io.opener import Opener
    from vmconv.io.registry import installed

    with Opener(installed()) as opener:
        file = opener.file(path)
        found = opener.registry.probe(file)
        begins = os.pread(file.descriptor, 8, 0)
    if found is None and not written:
        return "raw"
    if found not in QEMU_NAMES:
        raise NotAnsweredError(f"{path}: the content is {found or 'raw, and the format not stated'}")
    # QEMU looks for a VHD's signature at the beginning only, so that it takes a fixed one for raw.
    if found == "vhd" and begins != b"conectix":
        raise NotAnsweredError(f"{path}: a fixed VHD, which QEMU takes for raw unless -f vpc is given")
    return found


def only_sharing(plan: Plan) -> None:
    """Raises `NotAnsweredError` for a plan that copies more than it shares: qemu-img drops zeros when it copies."""
    totals = plan.totals
    if totals.copied > totals.shared + totals.referenced and find() is not None:
        reasons = "; ".join(dict.fromkeys(copy.reason for copy in plan.copies))
        raise NotAnsweredError(f"{totals.copied} bytes would be copied, {totals.shared} shared: {reasons}")


def new_mode(path: str) -> int | None:
    """Returns the permission bits of a new file as QEMU makes it; None for one that exists and keeps its own."""
    if os.path.exists(path):
        return None
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o644 & ~mask


def translated(qemu: dict[str, str], known: Iterable[str], renamed: dict[str, dict[str, str]]) -> dict[str, str]:
    """Returns vmconv's options for QEMU's. Raises `NotAnsweredError` for one that is not in `known`."""
    for name in qemu:
        if name not in known:
            raise NotAnsweredError(f"-o {name}")
    return {name: renamed.get(name, {}).get(value, value) for name, value in qemu.items()}


def progress(wanted: bool) -> Callable[[int, int], None] | None:
    """Returns a function that prints qemu-img's progress, if wanted; `print_end` ends the line."""
    if not wanted:
        return None

    def show(done: int, to_do: int) -> None:
        sys.stdout.write(f"    ({100 * done / to_do if to_do else 100:.2f}/100%)\r")
        sys.stdout.flush()

    return show


def print_end(wanted: bool) -> None:
    """Prints the last progress of qemu-img."""
    if wanted:
        sys.stdout.write(f"{COMPLETE}\n")
