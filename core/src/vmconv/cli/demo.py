"""`vmconv demo`: converts a real disk image in every way that a directory's filesystem allows."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vmconv.cli.verbs import Verb

if TYPE_CHECKING:
    from pathlib import Path

    from vmconv.cli.demonstration import Demonstration, Row

_SMALLEST = 8 << 20
_LARGEST = 1 << 40
_RECIPE = """\
{type} cannot share blocks between files; XFS and Btrfs can. As root:
  truncate -s 4G xfs.img && mkfs.xfs -q xfs.img && mkdir xfs && mount -o loop xfs.img xfs
  vmconv demo --directory xfs
  umount xfs && rm -r xfs xfs.img"""


def _run(options: argparse.Namespace) -> int:
    from vmconv.errors import BackendError, UsageError
    from vmconv.model.options import parse_size

    if not os.path.isdir(options.directory):
        raise BackendError(f"{options.directory}: is not a directory")
    try:
        size = parse_size(options.size)
    except ValueError as exc:
        raise UsageError(f"--size: {exc}") from exc
    if size < _SMALLEST:
        raise UsageError(f"--size: {options.size} is less than {_SMALLEST >> 20}M, the smallest that shows anything")
    if size > _LARGEST:
        raise UsageError(f"--size: {options.size} is more than {_LARGEST >> 40}T, and half of it would be written")
    with _workplace(options.directory, options.keep) as directory:
        return _demonstrate(directory, size)


@contextmanager
def _workplace(parent: str, keep: bool) -> Iterator[Path]:
    """Makes a directory that is removed at the end, or with `keep` is named and stays."""
    import shutil
    import tempfile
    from pathlib import Path

    from vmconv.cli.output import say
    from vmconv.errors import os_errors

    with os_errors("no directory can be made there", where=parent):
        directory = tempfile.mkdtemp(prefix="vmconv-demo-", dir=parent)
    try:
        yield Path(directory)
    finally:
        if keep:
            say(f"All files are kept in {directory}")
        else:
            shutil.rmtree(directory)


def _demonstrate(directory: Path, size: int) -> int:
    from vmconv.cli.demonstration import Demonstration
    from vmconv.cli.output import print_table, say, size_text
    from vmconv.system.linux import mount_of

    mount = mount_of(os.fspath(directory))
    say(f"A disk of {size_text(size)} with {size_text(size // 2)} of random payload, on {mount.type} at {mount.point}")
    demonstration = Demonstration(directory, size)
    rows = list(demonstration.rows())
    heading = ["WAY", "CONVERSION", "COPIED", "WRITTEN", "SECONDS", "SAME BYTES", "PAYLOAD IN ITS OLD BLOCKS"]
    print_table([heading, *map(_cells, rows)])
    for line in _remarks(demonstration):
        say(line)
    if not demonstration.shares:
        print(_RECIPE.format(type=mount.type))
    return 0 if all(row.same_bytes for row in rows) else 1


def _cells(row: Row) -> list[str]:
    same = "yes" if row.same_bytes else "NO"
    return [row.way, row.conversion, row.copied, row.written, row.seconds, same, row.same_blocks]


def _remarks(demonstration: Demonstration) -> Iterator[str]:
    for reason in demonstration.copied_because:
        yield f"Copied because {reason}."
    for reason in demonstration.left_out:
        yield f"Left out: {reason}"


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--directory", default=".", metavar="DIR", help="where to make the disk (default: .)")
    parser.add_argument("--size", default="256M", metavar="SIZE", help="size of the disk (default: 256M)")
    parser.add_argument("--keep", action="store_true", help="keep all files, and say where they are")


VERB = Verb(
    "Makes a real disk image in a temporary directory and converts it in every way: in place and back, by\n"
    "reference, as a view, and by sharing blocks where the filesystem can. Shows for each conversion what was\n"
    "copied and written, how long it took, whether a guest sees the same bytes, and how much of the payload lies\n"
    "in the very same blocks of storage. Does one conversion by qemu-img too, if it is installed.\n"
    "Removes everything it made.",
    _configure,
    _run,
)
