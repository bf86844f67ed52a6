"""Which way a conversion goes, asked of the code itself: the tables of docs/ways.md.

    python tests/support/ways.py DIRECTORY...

writes them into the page; the directories are empty ones on XFS, Btrfs and ext4, in this order.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vmconv
from support.disks import MIB, make_disk
from support.variants import options, self_contained
from vmconv.errors import PlanError
from vmconv.io.registry import installed

PAGE = Path(__file__).parents[2] / "docs/ways.md"
BEGIN, END = "<!-- tables: python tests/support/ways.py writes them -->", "<!-- end of tables -->"

FILESYSTEMS = {"xfs": "XFS", "btrfs": "Btrfs", "ext4": "ext4"}
SIZE = 16 * MIB


class Source(NamedTuple):
    """An image to convert: `options` are vmconv's when `by_qemu` is false, else arguments of `qemu-img convert`."""

    title: str
    format: str
    options: tuple[str, ...] = ()
    by_qemu: bool = False


def sources() -> Iterator[Source]:
    """Yields each format as vmconv writes it, and images whose payload lies otherwise."""
    for name, one in sorted(installed().formats.items()):
        if one.can_read and one.can_write:
            yield Source(name, name)
    yield Source("vhd, fixed", "vhd", ("subformat=fixed",))
    yield Source("vhd, dynamic, by QEMU", "vhd", ("-O", "vpc"), by_qemu=True)
    yield Source("vdi by QEMU", "vdi", ("-O", "vdi"), by_qemu=True)
    yield Source(
        "qcow2, clusters of 512 bytes, by QEMU", "qcow2", ("-O", "qcow2", "-o", "cluster_size=512"), by_qemu=True
    )
    # What does not get shorter stays as it is; half of the disk is like that.
    yield Source("qcow2, compressed in part", "qcow2", ("-c", "-O", "qcow2"), by_qemu=True)
    yield Source("vmdk, streamOptimized", "vmdk", ("subformat=streamOptimized",))


class Pair(NamedTuple):
    """One conversion: an image, the format that it goes to, and where the target would be."""

    image: Path
    source: Source
    target: str

    def plan(self, *, in_place: bool = False, **options: str) -> vmconv.Plan:
        path = self.image.parent / f"new{installed().formats[self.target].suffixes[0]}"
        return vmconv.plan(
            str(self.image),
            str(path),
            source_format=self.source.format,
            target_format=self.target,
            options=options,
            in_place=in_place,
        )


def by_default(pair: Pair) -> str:
    """Returns S when all payload is shared, s when some is, C when it is copied."""
    totals = pair.plan().totals
    if not totals.copied:
        return "S"
    return "s" if totals.shared else "C"


def by_reference(pair: Pair) -> str:
    """Returns R when all payload can stay in the source, r when some can, nothing when none can."""
    if pair.target not in ("qcow2", "vmdk"):
        return ""
    try:
        totals = pair.plan(subformat="reference").totals
    except PlanError:
        return ""
    if totals.copied:
        return "r" if totals.referenced else ""
    return "R"


def in_place(pair: Pair) -> str:
    """Returns I when the source's own file can become the target, in one of its subformats; a block moves at most."""
    for variant in self_contained():
        if variant[0] == pair.target and stays(pair, options(variant)):
            return "I"
    return ""


def stays(pair: Pair, wish: Mapping[str, str]) -> bool:
    try:
        plan = pair.plan(in_place=True, **wish)
    except PlanError:
        return False
    # Where a new file replaces the old one, nothing has to make way.
    return plan.totals.copied <= (MIB if plan.backend == "in-place" else 0)


WAYS: tuple[Callable[[Pair], str], ...] = (by_default, by_reference, in_place)
"""Each says by a letter whether a pair can go this way; docs/ways.md says what the letters mean."""


def make(source: Source, raw: Path) -> Path:
    path = raw.parent / f"source{abs(hash(source))}.{source.format}"
    if source.by_qemu:
        subprocess.run(["qemu-img", "convert", "-f", "raw", *source.options, str(raw), str(path)], check=True)
    else:
        options = dict(option.split("=") for option in source.options)
        vmconv.convert(str(raw), str(path), target_format=source.format, options=options)
    return path


def table(directory: Path) -> list[str]:
    """Returns the table of one filesystem, as lines of Markdown."""
    raw = make_disk(directory / "disk.raw", SIZE)
    with raw.open("r+b") as file:
        file.seek(SIZE // 2)
        file.write(b"words that get shorter " * 5000)
        file.truncate(SIZE)
    targets = sorted(name for name, one in installed().formats.items() if one.can_read and one.can_write)
    lines = [f"| from \\ to | {' | '.join(targets)} |", f"| --- |{' --- |' * len(targets)}"]
    for source in sources():
        image = make(source, raw)
        pairs = [Pair(image, source, target) for target in targets]
        cells = ["".join(way(pair) for way in WAYS) for pair in pairs]
        lines.append(f"| {source.title} | {' | '.join(cells)} |")
        image.unlink()
    return lines


def tables(directories: Mapping[str, Path]) -> str:
    """Returns the tables of all filesystems; those that decide alike share one."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for kind, directory in directories.items():
        alike.setdefault(tuple(table(directory)), []).append(FILESYSTEMS[kind])
    parts: list[str] = []
    for lines, kinds in alike.items():
        parts += [f"### {' and '.join(kinds)}", "", *lines, ""]
    return "\n".join(parts)


def written(page: str) -> str:
    """Returns the tables as the page has them."""
    return page.partition(BEGIN)[2].partition(END)[0].strip("\n") + "\n"


def main(directories: Iterable[str]) -> None:
    made = tables(dict(zip(FILESYSTEMS, map(Path, directories), strict=True)))
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main(sys.argv[1:])
