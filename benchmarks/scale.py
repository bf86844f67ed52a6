"""Ten thousand disks of 2 TiB on shared storage, simulated: what the planner would ask for, and what is left over.

    python benchmarks/scale.py [--disks 10000] [--sample 12] [--size 2048] [--seed 17]

Some disks are laid out and planned by vmconv itself; nothing is written but a sparse file. The steps of each plan go
through models of JuiceFS and of Swift, whose rules are below. The sums are scaled up to the number of disks: that is
stated, with how much the disks of the sample differ. docs/scale.md has the result.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from vmconv.backends.juicefs import CHUNK, COMPACTED
from vmconv.conversion.containers import Target, lay_out, parts_of
from vmconv.conversion.planner import plan_layout
from vmconv.interface.backend import Survey
from vmconv.io.registry import Registry, installed
from vmconv.model.extents import Column, Columns, Extents, Kind
from vmconv.model.image import Image
from vmconv.model.options import parse_options
from vmconv.model.plan import Action, FilePlan, Plan
from vmconv.model.sources import File

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
CLUSTER = 64 << 10

# -- the disks


@dataclass(frozen=True)
class Guest:
    """A kind of disk. Sizes are means in bytes of log-normal distributions; `share` is that of all disks.

    `run` is payload without a gap in the guest's address space, `burst` payload that lies without a gap in an image
    that grew as the guest wrote.
    """

    name: str
    share: float
    full: float
    run: int
    burst: int


# A lightly used Debian on ext4 (16 GB, 3.1 GB allocated) had 438 gaps, 30 MB each, by e2freefrag: runs of 7 MiB
# (blog.learningtree.com/ca/worry-virtual-disk-fragmentation). Few files are in more than one piece (Meyer and Bolosky,
# A Study of Practical Deduplication, FAST 2011). How full disks are, and runs and bursts of aged ones, are our
# assumptions. The images of our corpus are too small: their payload is one run.
GUESTS = (
    Guest("lightly used", 0.5, 0.2, 7 * MIB, 4 * MIB),
    Guest("aged", 0.25, 0.45, MIB, 512 << 10),
    Guest("large files", 0.25, 0.6, 256 * MIB, 64 * MIB),
)
_SPREAD = 1.2
"""The standard deviation of the logarithm of runs, gaps and bursts."""

# -- the rules of JuiceFS (pkg/meta/base.go, pkg/meta/redis.go), and what it took here

MOST_SLICES = 2500
"""Ranges of a chunk from which on a write waits until it has been copied (maxSlices)."""
LONGEST_CALL = 0xFFFFF000
CALL_SECONDS = 0.00025
"""A call of copy_file_range with Redis on the same machine: 16,384 in 4.1 s."""
SLICE_MEMORY, CHUNK_MEMORY = 39, 180
"""Bytes of Redis for a range, and for a chunk besides: 8,192 ranges in random order, and chunks of one range."""
REDIS = 64 * GIB
"""Memory of a large Redis, half of which has to stay free for its forks."""


def lengths(random: np.random.Generator, mean: float, total: int) -> Column:
    """Returns lengths of whole clusters with this mean, together `total` bytes or a little more."""
    count = max(1, round(total / mean))
    drawn = random.lognormal(np.log(mean) - _SPREAD**2 / 2, _SPREAD, count)
    clusters = np.maximum(1, np.rint(drawn * (total / drawn.sum()) / CLUSTER)).astype(np.int64)
    found: Column = clusters * CLUSTER
    return found


def allocated(random: np.random.Generator, guest: Guest, size: int) -> tuple[Column, Column]:
    """Returns starts and lengths of the payload of a disk, in order."""
    run = lengths(random, guest.run, int(size * guest.full))
    gap = lengths(random, guest.run * (1 / guest.full - 1), int(size * (1 - guest.full)))
    count = min(len(run), len(gap))
    start = np.cumsum(np.stack([gap[:count], run[:count]], axis=1).ravel())[::2]
    inside = start + run[:count] <= size
    return start[inside], run[:count][inside]


def whole(file: File, size: int) -> Extents:
    """Returns the disk as a raw file, all of it payload: JuiceFS does not tell holes."""
    return Extents.placed(
        size, _rows(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)), np.array([size]), (file,)
    )


def _rows(start: Column, offset: Column) -> Columns:
    kind = np.full(len(start), Kind.DATA, dtype=np.uint8)
    return Columns(start, kind, np.zeros(len(start), dtype=np.int32), offset)


def grown(file: File, size: int, start: Column, length: Column, random: np.random.Generator, burst: int) -> Extents:
    """Returns the disk as an image that grew by bursts, in an order that has nothing to do with their places."""
    pieces = -(-length // burst)
    row = np.repeat(np.arange(len(start)), pieces)
    number = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    at = start[row] + number * burst
    part = np.minimum(burst, start[row] + length[row] - at)
    order = random.permutation(len(at))
    offset = np.empty_like(at)
    offset[order] = MIB + np.cumsum(part[order]) - part[order]
    return Extents.placed(size, _rows(at, offset), part, (file,))


# -- the plans


@dataclass(frozen=True)
class Way:
    """A conversion: of a raw source, or one that `grew` as the guest wrote."""

    grew: bool
    target: str
    options: str = ""

    def __str__(self) -> str:
        return f"{'qcow2 that grew' if self.grew else 'raw'} -> {self.target}{self.options and f' ({self.options})'}"


WAYS = (
    Way(False, "qcow2"),
    Way(False, "vhdx"),
    Way(True, "raw"),
    Way(True, "qcow2"),
    Way(True, "vhdx"),
    Way(True, "vmdk"),
)


def planned(table: Extents, way: Way, registry: Registry, directory: str, survey: Survey) -> Plan:
    file = table.sources[0]
    assert isinstance(file, File)
    image = Image("raw", file, table.size, lambda: table)
    form = registry.writer(way.target)
    options = parse_options(
        form.options(), dict(filter(None, [way.options.split("=")])) if way.options else {}, form.name
    )
    target = Target.of(form, options, directory, "target")
    (made,) = lay_out(parts_of(image, target, registry, None, chain=False), target, survey, registry, None)
    return plan_layout(made.layout, "target", directory, "juicefs", survey)


# -- JuiceFS


@dataclass
class Load:
    """What one conversion asks of JuiceFS: sums of bytes and counts, of which those of many disks are the sums too."""

    seconds: float = 0
    calls: int = 0
    slices: int = 0
    chunks: int = 0
    torn: int = 0
    """Chunks that are copied when a mount that may write reads them, and that have payload."""
    torn_bytes: int = 0
    shared: int = 0
    copied: int = 0
    written: int = 0
    kept: int = 0
    """Bytes that stay stored when the source is removed, of which the target refers to `shared`."""
    worst: int = 0
    """Ranges of the chunk that has most; of many disks the largest."""

    def add(self, other: Load) -> None:
        for one in fields(self):
            mine, its = getattr(self, one.name), getattr(other, one.name)
            setattr(self, one.name, max(mine, its) if one.name == "worst" else mine + its)

    @property
    def memory(self) -> int:
        return self.slices * SLICE_MEMORY + self.chunks * CHUNK_MEMORY


def load_of(plan: Plan, table: Extents) -> Load:
    totals = plan.totals
    load = Load(shared=totals.shared, copied=totals.copied, written=totals.written)
    for file in plan.files:
        _count(file, load)
    load.kept = _kept(plan, table)
    return load


def _count(file: FilePlan, load: Load) -> None:
    steps = file.steps
    share = steps.action == Action.SHARE
    load.calls += int((-(-steps.length[share] // LONGEST_CALL)).sum())
    # A range ends where a chunk of the target or of the source does. Written bytes are one range where they touch.
    size = -(-file.size // CHUNK)
    slices = _touched(steps.offset[share], steps.length[share], size)
    crossing = _inner_ends(steps.source_offset[share], steps.length[share])
    at = np.repeat(steps.offset[share] - steps.source_offset[share], crossing[0]) + crossing[1]
    apart = at % CHUNK != 0
    np.add.at(slices, at[apart] // CHUNK, 1)
    payload = slices > 0
    slices += _touched(*_joined(steps.offset[~share], steps.length[~share]), size)
    load.slices += int(slices.sum())
    load.chunks += int((slices > 0).sum())
    load.worst = max(load.worst, int(slices.max(initial=0)))
    torn = payload & (slices >= COMPACTED)
    load.torn += int(torn.sum())
    load.torn_bytes += int(_bytes_by_chunk(steps.offset, steps.length, size)[torn].sum())


def _joined(offset: Column, length: Column) -> tuple[Column, Column]:
    """Returns the ranges with neighbours joined."""
    if not len(offset):
        return offset, length
    first = np.append(True, offset[1:] != offset[:-1] + length[:-1])
    return offset[first], np.add.reduceat(length, np.flatnonzero(first))


def _touched(offset: Column, length: Column, size: int) -> Column:
    """Returns for each of `size` chunks how many ranges lie in it."""
    change = np.zeros(size + 1, dtype=np.int64)
    np.add.at(change, offset // CHUNK, 1)
    np.subtract.at(change, (offset + length - 1) // CHUNK + 1, 1)
    return np.cumsum(change)[:size]


def _inner_ends(offset: Column, length: Column) -> tuple[Column, Column]:
    """Returns how many ends of chunks lie inside of each range, and where each of them is."""
    first, last = offset // CHUNK + 1, (offset + length - 1) // CHUNK
    count = np.maximum(0, last - first + 1)
    number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return count, (np.repeat(first, count) + number) * CHUNK


def _bytes_by_chunk(offset: Column, length: Column, size: int) -> Column:
    """Returns the bytes of ranges in each chunk."""
    _, ends = _inner_ends(offset, length)
    edges = np.sort(np.concatenate([offset, ends]))
    stops = np.sort(np.concatenate([offset + length, ends]))
    found = np.zeros(size, dtype=np.int64)
    np.add.at(found, edges // CHUNK, stops - edges)
    return found


def _kept(plan: Plan, table: Extents) -> int:
    """Returns the bytes that stay stored when the source is removed.

    The source's chunks are one range each, from its first byte to its last: JuiceFS has copied them into one by then.
    It keeps the whole range as long as somebody refers to a byte of it.
    """
    data = table.kind == Kind.DATA
    bounds = np.append(table.start, table.size)
    offset, length = table.offset[data], np.diff(bounds)[data]
    size = int((offset + length).max(initial=0)) // CHUNK + 1
    stored = _bytes_by_chunk(offset, length, size)
    used = np.zeros(size, dtype=bool)
    for file in plan.files:
        share = file.steps.action == Action.SHARE
        used |= _touched(file.steps.source_offset[share], file.steps.length[share], size) > 0
    return int(stored[used].sum())


# -- Swift, with the manifests of vmconv's plugin

PUT_SECONDS = 0.15
"""A manifest of 1,000 ranges: 164 of them took 25.3 s."""
MOST_SEGMENTS = 1000
"""Ranges of a manifest (max_manifest_segments)."""
MOST_SINGLE = 16
"""Ranges of zeros that are not in a manifest of their own."""
PUBLISHED = ("raw", "qcow2", "vhdx", "vmdk")


@dataclass
class Publication:
    """What the publication of one disk asks of Swift."""

    rows: int = 0
    """Ranges in its manifests."""
    leaves: int = 0
    """Ranges of objects that hold bytes, those in manifests of zeros among them."""
    manifests: int = 0
    sent: int = 0
    """Bytes of manifests and metadata."""
    payload: int = 0
    """Objects of payload, which all publications of the disk refer to."""


def packed(file: File, size: int, start: Column, length: Column) -> Extents:
    """Returns the disk with its payload end to end, as in objects of 64 MiB of the guest's addresses each."""
    return Extents.placed(size, _rows(start, np.cumsum(length) - length), length, (file,))


def published(plan: Plan, table: Extents) -> Publication:
    from vmconv_swift.payload import PIECE, SMALLEST
    from vmconv_swift.segments import SMALL_GAP
    from vmconv_swift.zeros import ZEROS

    found = Publication()
    data = table.kind == Kind.DATA
    start, length = table.start[data], np.diff(np.append(table.start, table.size))[data]
    found.payload = int((_bytes_by_chunk(start, length, -(-table.size // PIECE)) > 0).sum())
    for file in plan.files:
        steps = file.steps
        share = steps.action == Action.SHARE
        offset, source, size = steps.offset[share], steps.source_offset[share], steps.length[share]
        apart = (offset[1:] != offset[:-1] + size[:-1]) | (source[1:] != source[:-1] + size[:-1])
        metadata, _ = _joined(steps.offset[~share], steps.length[~share])
        gap = np.array([size for _, size in file.gaps() if size > SMALL_GAP], dtype=np.int64)
        many = gap > MOST_SINGLE * ZEROS
        zeros = np.where(many, -(-gap // (MOST_SEGMENTS * ZEROS)), -(-gap // ZEROS))
        own = (1 + int(apart.sum()) if len(offset) else 0) + found.payload + len(metadata)
        rows = own + int(zeros.sum())
        found.rows += rows
        found.leaves += own + int((-(-gap // ZEROS)).sum())
        while rows > MOST_SEGMENTS:
            rows = -(-rows // MOST_SEGMENTS)
            found.manifests += rows
        found.manifests += 1
        found.sent += max(SMALLEST, int(steps.length[~share].sum()))
    found.sent += found.rows * _row_bytes()
    return found


def _row_bytes() -> int:
    """Returns the bytes of a range in a manifest."""
    from vmconv_swift.manifest import Segment, body_of
    from vmconv_swift.names import ObjectName

    where = ObjectName("images-vmconv", f"payload/{0:064x}")
    segments = [Segment(where, f"{0:032x}", 64 * MIB, number * CLUSTER, CLUSTER) for number in range(MOST_SEGMENTS)]
    return len(body_of(segments)) // MOST_SEGMENTS


# -- the command


def samples(count: int) -> Iterator[Guest]:
    """Yields kinds of guests by their shares; each at least once."""
    for guest in GUESTS:
        for _ in range(max(1, round(count * guest.share))):
            yield guest


def main() -> int:
    options = _options()
    random = np.random.default_rng(options.seed)
    registry = installed()
    size = options.size * GIB
    found: dict[Way, list[tuple[Guest, Load]]] = {way: [] for way in WAYS}
    objects: dict[str, list[tuple[Guest, Publication]]] = {target: [] for target in PUBLISHED}
    with tempfile.TemporaryDirectory() as directory, open(os.path.join(directory, "source"), "wb") as hollow:
        hollow.truncate(2 * size)
        file = File(hollow.name, os.open(hollow.name, os.O_RDONLY))
        # JuiceFS says of each file that it is payload everywhere. This one is sparse, so that it needs no room.
        file.on_storage = Extents.whole(file)
        for number, guest in enumerate(samples(options.sample)):
            start, length = allocated(random, guest, size)
            tables = {
                False: whole(file, size),
                True: grown(file, size, start, length, random, guest.burst),
            }
            for way in WAYS:
                began = time.process_time()
                plan = planned(tables[way.grew], way, registry, directory, Survey(1, chunk=CHUNK))
                seconds = time.process_time() - began
                load = load_of(plan, tables[way.grew])
                load.seconds = seconds
                found[way].append((guest, load))
            table = packed(file, size, start, length)
            for target, sample in objects.items():
                plan = planned(table, Way(False, target), registry, directory, Survey(1))
                sample.append((guest, published(plan, table)))
            print(f"disk {number + 1}: {guest.name}, {len(start)} runs", file=sys.stderr)
        file.close()
    _report(found, options)
    _report_objects(objects, options)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disks", type=int, default=10_000, help="number of disks to scale up to (10000)")
    parser.add_argument("--sample", type=int, default=12, help="number of disks that are planned (12)")
    parser.add_argument("--size", type=int, default=2048, help="GiB of each disk (2048)")
    parser.add_argument("--seed", type=int, default=17, help="seed of the random numbers (17)")
    return parser.parse_args()


def mean_of(sample: Sequence[tuple[Guest, Load]] | Sequence[tuple[Guest, Publication]]) -> dict[str, float]:
    """Returns the mean of each figure over all disks, of which the sample has guests of each kind."""
    figures: dict[str, float] = {}
    first = sample[0][1]
    for name in (*(one.name for one in fields(first)), *(["memory"] if isinstance(first, Load) else [])):
        mean = 0.0
        for guest in GUESTS:
            values = [float(getattr(load, name)) for one, load in sample if one is guest]
            mean += guest.share * sum(values) / len(values)
        figures[name] = max(getattr(load, name) for _, load in sample) if name == "worst" else mean
    return figures


def _report(found: dict[Way, list[tuple[Guest, Load]]], options: argparse.Namespace) -> None:
    count = len(next(iter(found.values())))
    print(f"{count} disks of {options.size} GiB were planned, seed {options.seed}; scaled up to {options.disks} disks")
    print("\nA disk, on average; in brackets the least and the most of the sample:\n")
    print("| conversion | planned in | calls | ranges | memory of Redis | copied later | kept for nothing |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for way, sample in found.items():
        print(f"| {way} | {_row(sample)} |")
    print(f"\n{options.disks} disks, each converted once:\n")
    print("| conversion | calls take | memory of Redis | copied later | most ranges in a chunk | breaks at |")
    print("| --- | --- | --- | --- | --- | --- |")
    for way, sample in found.items():
        print(f"| {way} | {_fleet(mean_of(sample), options.disks)} |")


def _report_objects(objects: dict[str, list[tuple[Guest, Publication]]], options: argparse.Namespace) -> None:
    from vmconv_swift.manifest import MAX_LEAVES

    print(f"\nSwift: a disk published once, on average; then {options.disks} disks:\n")
    print(
        "| format | ranges | at most | manifests | sent | PUTs take | payload objects | all disks: sent | PUTs take |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for target, sample in objects.items():
        mean, most = mean_of(sample), max(one.leaves for _, one in sample)
        refused = f" (refused: more than {MAX_LEAVES:,})" if most > MAX_LEAVES else ""
        seconds = mean["manifests"] * PUT_SECONDS
        cells = (
            target,
            f"{mean['rows']:,.0f}",
            f"{most:,}{refused}",
            f"{mean['manifests']:,.0f}",
            f"{mean['sent'] / MIB:,.0f} MiB",
            f"{seconds:,.0f} s",
            f"{mean['payload']:,.0f}",
            f"{mean['sent'] * options.disks / TIB:,.2f} TiB",
            f"{seconds * options.disks / 3600:,.0f} h",
        )
        print(f"| {' | '.join(cells)} |")


def _row(sample: Sequence[tuple[Guest, Load]]) -> str:
    mean = mean_of(sample)
    calls = [load.calls for _, load in sample]
    later = mean["torn_bytes"] / max(1, mean["shared"])
    return " | ".join(
        (
            f"{mean['seconds']:.2f} s",
            f"{mean['calls']:,.0f} ({min(calls):,} to {max(calls):,})",
            f"{mean['slices']:,.0f}",
            f"{mean['memory'] / MIB:.1f} MiB",
            f"{mean['torn_bytes'] / GIB:,.0f} GiB ({later:.0%})",
            f"{max(0, mean['kept'] - mean['shared']) / GIB:,.1f} GiB",
        )
    )


def _fleet(mean: dict[str, float], disks: int) -> str:
    memory = mean["memory"] * disks
    return " | ".join(
        (
            f"{mean['calls'] * disks * CALL_SECONDS / 3600:,.1f} h",
            f"{memory / GIB:,.1f} GiB",
            f"{mean['torn_bytes'] * disks / TIB:,.0f} TiB",
            f"{mean['worst']:,.0f} of {MOST_SLICES}",
            f"{REDIS / 2 / mean['memory']:,.0f} disks",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
