"""The cases: what is converted, by whom, and what is expected of it."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from archive_case import archives
from backup_case import backups
from batch_case import batch
from bench import HASTY, VMCONV, Bench, python, qemu_img, vmconv, vmconv_hasty
from child_clone import DESCRIPTOR
from correct import same_as, samples_of, some_offsets
from device_case import devices
from format_cases import PARALLEL, misaligned, pairs, streams, terabyte
from images import CLUSTER, GIB, TIB, Place, command, dense_raw, qcow2, shuffled, sparse_raw, text_raw
from inplace_cases import in_place
from juicefs_case import juicefs
from machine_case import machines, machines_in_place
from measure import Contender, Measured
from memory_case import memory
from reference_case import reference
from remote_case import remote
from swift_case import swift
from sync_case import sync
from view_case import views

EIGHT = ("-W", "-m", "8")
_MIB = 1 << 20


def contiguous(bench: Bench, place: Place) -> None:
    """One extent of payload, to qcow2 and back: what sharing costs at its cheapest."""
    raw = bench.random(place)
    with place.scratch("contiguous.qcow2") as (image,):
        qcow2(image, raw, range(bench.size // CLUSTER))
        measured = _contiguous(bench, place, raw, "raw", "qcow2")
        bench.at_least(measured, "raw -> qcow2: 8 times faster than qemu-img -C", "vmconv", "qemu-img -C", 8)
        _contiguous(bench, place, image, "qcow2", "raw")


def _contiguous(bench: Bench, place: Place, source: str, source_format: str, target_format: str) -> Measured:
    title = f"{source_format} -> {target_format}"
    check = same_as(source, source_format, target_format)
    suffixes = (source_format, target_format)
    with _tiny(place, *suffixes) as tiny, place.scratch(f"target.{target_format}") as (target,):
        measured = bench.measure(
            "contiguous",
            place,
            f"{title}, {_gib(bench.size)} of random payload in one extent",
            [
                vmconv(source, target, check=check),
                python("vmconv, warm", "child_warm.py", source, target, *tiny, target=target),
                qemu_img(source, source_format, target, target_format, *PARALLEL),
                qemu_img(source, source_format, target, target_format, "-C"),
                Contender("cp --reflink", ["cp", "--reflink=always", source, target], target, durable=False),
            ],
        )
    seconds = measured.median("vmconv")
    bench.at_most(measured, f"{title}: whole process", seconds, 0.30)
    bench.at_most(measured, f"{title}: whole process, the aim", seconds, 0.12)
    bench.at_most(measured, f"{title}: one call in a warm process", measured.median("vmconv, warm", "inner"), 0.025)
    bench.at_least(measured, f"{title}: 40 times faster than qemu-img -W -m 16", "vmconv", "qemu-img -W -m 16", 40)
    bench.at_least(measured, f"{title}: never slower than qemu-img -C", "vmconv", "qemu-img -C", 1)
    return measured


@contextmanager
def _tiny(place: Place, source_format: str, target_format: str) -> Iterator[list[str]]:
    """Yields the paths of a tiny image and of a target for it: something to get warm with."""
    with place.scratch("tiny.raw", f"tiny-source.{source_format}", f"tiny-target.{target_format}") as paths:
        raw, source, target = paths
        with open(raw, "wb") as file:
            file.write(os.urandom(16 * CLUSTER))
        command("qemu-img", "convert", "-f", "raw", "-O", source_format, raw, source)
        yield [source, target]


def permuted(bench: Bench, place: Place) -> None:
    """As many extents as clusters: against the bare calls that share them, which nobody can avoid."""
    raw = bench.random(place)
    order = shuffled(bench.size // CLUSTER)
    with place.scratch("permuted.qcow2", "calls", "target.raw") as (image, calls, target):
        payload = qcow2(image, raw, order)
        _write_calls(calls, order, payload, by_target=place.kind == "btrfs")
        check = same_as(image, "qcow2", "raw")
        clone = (image, target, str(bench.size), calls)
        with _tiny(place, "qcow2", "raw") as tiny:
            measured = bench.measure(
                "permuted",
                place,
                f"qcow2 -> raw, {len(order)} clusters in random order",
                [
                    vmconv(image, target, check=check),
                    python("vmconv, warm", "child_warm.py", image, target, *tiny, target=target),
                    python("bare FICLONERANGE calls", "child_clone.py", *clone, target=target, check=check),
                    qemu_img(image, "qcow2", target, "raw", *PARALLEL),
                    qemu_img(image, "qcow2", target, "raw", "-C"),
                ],
            )
    bare = "bare FICLONERANGE calls"
    whole = measured.median("vmconv") / measured.median(bare)
    inside = measured.median("vmconv, warm", "inner") / measured.median(bare, "inner")
    bench.at_most(measured, "whole process, in whole processes of bare calls", whole, 1.3, "x")
    bench.at_most(measured, "one call in a warm process, in bare calls alone", inside, 1.3, "x")
    bench.at_least(measured, "faster than qemu-img -C", "vmconv", "qemu-img -C", 1)
    bench.at_least(measured, "faster than qemu-img -W -m 16", "vmconv", "qemu-img -W -m 16", 1)


def _write_calls(path: str, order: list[int], payload: int, *, by_target: bool) -> None:
    """Writes one struct file_clone_range for each cluster, in the order that the filesystem likes best."""
    pairs = list(enumerate(order))
    if not by_target:
        pairs.sort(key=lambda pair: pair[1])
    with open(path, "wb") as file:
        for guest, host in pairs:
            file.write(struct.pack("=qQQQ", DESCRIPTOR, payload + host * CLUSTER, CLUSTER, guest * CLUSTER))


def start_up(bench: Bench, place: Place) -> None:
    """Commands that do nothing: what everything else has in it too."""
    names = ("formats", "--help", "--version")
    contenders = [Contender(f"vmconv {name}", [VMCONV, name]) for name in names]
    contenders.append(Contender("bare interpreter", [sys.executable, "-c", "pass"]))
    measured = bench.measure("start-up", place, "commands that touch no image", contenders, max(10, bench.runs))
    for name in names:
        bench.at_most(measured, f"vmconv {name}", measured.median(f"vmconv {name}"), 0.15)


def copy(bench: Bench, place: Place) -> None:
    """Storage that cannot share: every byte is copied, and the question is how well."""
    raw = bench.random(place)
    with place.scratch("contiguous.qcow2") as (image,):
        _copy(bench, place, raw, "raw", "qcow2")
        qcow2(image, raw, range(bench.size // CLUSTER))
        # Nothing is shared here: there would be no room for a third file of this size.
        os.unlink(raw)
        _copy(bench, place, image, "qcow2", "raw")


def _copy(bench: Bench, place: Place, source: str, source_format: str, target_format: str) -> None:
    with place.scratch(f"target.{target_format}") as (target,):
        title = f"{source_format} -> {target_format}"
        measured = bench.measure(
            "copy",
            place,
            f"{title}, {_gib(bench.size)} of random payload",
            [
                vmconv(source, target, check=same_as(source, source_format, target_format)),
                vmconv_hasty(source, target),
                qemu_img(source, source_format, target, target_format, *PARALLEL, heavy=False),
                qemu_img(source, source_format, target, target_format, *EIGHT, heavy=False),
            ],
            _few(bench),
        )
    for other in ("qemu-img -W -m 16", "qemu-img -W -m 8"):
        bench.at_least(measured, f"{title}: at least as fast as {other}", "vmconv", other, 1, hasty=HASTY)


def compressed(bench: Bench, place: Place) -> None:
    """Compressed clusters, which nobody can share: how well they are decompressed."""
    for kind in ("zlib", "zstd"):
        with place.scratch(f"{kind}.qcow2", "target.raw") as (_, target):
            image = bench.compressed(place, kind)
            measured = bench.measure(
                "compressed",
                place,
                f"qcow2 ({kind}) -> raw, {_gib(os.path.getsize(image))} that decompress to "
                f"{_gib(GIB // 4 if bench.quick else GIB)}",
                [
                    vmconv(image, target, check=same_as(image, "qcow2", "raw")),
                    vmconv_hasty(image, target),
                    qemu_img(image, "qcow2", target, "raw", *PARALLEL, heavy=False),
                ],
                _few(bench),
            )
        if kind == "zlib":
            text = "zlib: 1.5 times faster than qemu-img -W -m 16"
            bench.at_least(measured, text, "vmconv", "qemu-img -W -m 16", 1.5, hasty=HASTY)


def compressing(bench: Bench, place: Place) -> None:
    """Clusters that are compressed while they are written, and clusters of a source that is compressed already."""
    size = GIB // 4 if bench.quick else GIB
    with place.scratch("text.raw") as (raw,):
        text_raw(raw, size)
        for kind in ("zlib", "zstd"):
            title = f"raw -> qcow2 -c ({kind}), {_gib(size)} of text"
            text = f"{kind}: as fast as qemu-img -c -W -m 16"
            flags = ("-c", "-o", f"compression_type={kind}")
            _compressing(bench, place, (raw, "raw"), flags, title, text, 1)
            image = bench.compressed(place, kind)
            title = f"qcow2 ({kind}) -> qcow2 -c ({kind}), {_gib(size)} of text"
            text = f"{kind}: taken over 10 times faster than qemu-img -c -W -m 16"
            _compressing(bench, place, (image, "qcow2"), flags, title, text, 10)


def _compressing(
    bench: Bench, place: Place, source: tuple[str, str], flags: Sequence[str], title: str, text: str, limit: float
) -> None:
    sizes: dict[str, int] = {}

    def checked(name: str) -> Callable[[str], None]:
        def check(target: str) -> None:
            sizes[name] = os.path.getsize(target)
            same_as(*source, "qcow2")(target)

        return check

    with place.scratch("target.qcow2") as (target,):
        ours = vmconv(source[0], target, *flags, check=checked("vmconv"))
        theirs = qemu_img(*source, target, "qcow2", *flags, *PARALLEL, heavy=False)
        hasty = replace(vmconv(source[0], target, *flags, "-t", "unsafe"), name=HASTY, durable=False)
        theirs = replace(theirs, name="qemu-img", check=checked("qemu-img"))
        measured = bench.measure("compressing", place, title, [ours, hasty, theirs], _few(bench))
    print(f"  size of the result: vmconv {sizes['vmconv']}, qemu-img {sizes['qemu-img']}")
    bench.at_least(measured, text, "vmconv", "qemu-img", limit, hasty=HASTY)
    larger = 100 * (sizes["vmconv"] / sizes["qemu-img"] - 1)
    bench.at_most(measured, f"{title}: larger than by qemu-img", larger, 3, "%")


def scale(bench: Bench, place: Place) -> None:
    """Disks far larger than storage: time and memory follow the metadata."""
    content = bench.random(place)
    slope = []
    for size in (64 * GIB, 256 * GIB, TIB):
        with place.scratch("dense.raw") as (raw,):
            dense_raw(raw, content, size)
            measured = _to_qcow2(bench, place, raw, size, "64K")
            slope.append((size, measured))
            if size == TIB:
                _whole_tebibyte(bench, place, raw, measured)
    for size, measured in slope:
        seconds, metadata = measured.median("vmconv"), measured.median("vmconv", "wchar") / _MIB
        print(f"  {_gib(size)}: {seconds:.3f} s for {metadata:.0f} MiB of metadata")
    with place.scratch("sparse.raw") as (raw,):
        offsets = sparse_raw(raw, content, 64 * TIB, 512)
        places = [*offsets[::64], *(offset + (16 << 20) for offset in offsets[::128])]
        measured = _to_qcow2(bench, place, raw, 64 * TIB, "64K", places, "512 pieces of 16 MiB")
        _memory(bench, measured, "64 TiB sparse")


def _whole_tebibyte(bench: Bench, place: Place, raw: str, measured: Measured) -> None:
    bench.at_most(measured, "1 TiB, 64K clusters", measured.median("vmconv"), 1.5)
    _memory(bench, measured, "1 TiB, 64K clusters")
    bench.at_most(measured, "1 TiB, 64K clusters: bytes read", measured.median("vmconv", "rchar") / _MIB, 512, "MiB")
    large = _to_qcow2(bench, place, raw, TIB, "2M")
    bench.at_most(large, "1 TiB, 2M clusters", large.median("vmconv"), 0.5)
    _memory(bench, large, "1 TiB, 2M clusters")
    with place.scratch("pair.qcow2", "back.raw") as (image, back):
        command(VMCONV, "convert", "-q", raw, image)
        check = samples_of(raw, "raw", some_offsets(TIB))
        returned = bench.measure("scale", place, "qcow2 (64K) -> raw, 1 TiB dense", [vmconv(image, back, check=check)])
        _memory(bench, returned, "1 TiB back to raw")
        pair = Contender("vmconv compare", [VMCONV, "compare", raw, image])
        compared = bench.measure("scale", place, "compare raw with qcow2 (64K), 1 TiB dense", [pair])
    _memory(bench, compared, "compare of 1 TiB", "vmconv compare")
    for figure in ("rchar", "read_bytes"):
        value = compared.median("vmconv compare", figure) / _MIB
        bench.at_most(compared, f"compare of 1 TiB: {figure}, which has no payload in it", value, 512, "MiB")


def _to_qcow2(
    bench: Bench,
    place: Place,
    raw: str,
    size: int,
    cluster: str,
    offsets: list[int] | None = None,
    what: str = "dense",
) -> Measured:
    check = samples_of(raw, "qcow2", some_offsets(size) if offsets is None else offsets)
    with place.scratch("target.qcow2") as (target,):
        whole = vmconv(raw, target, "-o", f"cluster_size={cluster}", check=check)
        trusting = Contender("vmconv --no-verify", [*whole.command, "--no-verify"], target)
        return bench.measure("scale", place, f"raw -> qcow2 ({cluster}), {_gib(size)} {what}", [whole, trusting])


def _memory(bench: Bench, measured: Measured, text: str, name: str = "vmconv") -> None:
    peak = max(measured.figures(name, "peak")) / _MIB
    bench.at_most(measured, f"{text}: peak memory", peak, 250, "MiB")


def io_growth(bench: Bench, place: Place) -> None:
    """Bytes read and written for more and more payload: both grow with the metadata only."""
    content = bench.random(place)
    sizes = [bench.size // 8, bench.size // 2, bench.size]
    found = []
    for size in sizes:
        with place.scratch("part.raw", "target.qcow2") as (raw, target):
            dense_raw(raw, content, size)
            check = same_as(raw, "raw", "qcow2")
            title = f"raw -> qcow2, {_gib(size)}"
            found.append(bench.measure("io", place, title, [vmconv(raw, target, check=check)], _few(bench)))
    # 64K clusters: 8 bytes of L2 entry and 2 of reference count for each, written once and read back once.
    metadata = 10 / CLUSTER * _MIB
    for figure in ("wchar", "write_bytes", "rchar"):
        grown = found[-1].median("vmconv", figure) - found[0].median("vmconv", figure)
        value = grown / (sizes[-1] - sizes[0]) * _MIB
        bench.at_most(found[-1], f"{figure} for each MiB of payload", value, 2 * metadata, "B")


def _few(bench: Bench) -> int:
    """Returns how often programs run that take long, all of them."""
    return min(bench.runs, 3)


def _gib(size: int) -> str:
    return f"{size / TIB:g} TiB" if size >= TIB else f"{size / GIB:.3g} GiB"


@dataclass(frozen=True)
class Case:
    """What `--only` names: on which filesystems it is measured; `directory` is the one that the user named."""

    name: str
    places: tuple[str, ...]
    measure: Callable[[Bench, Place], None]


CASES = (
    Case("start-up", ("none",), start_up),
    Case("contiguous", ("xfs", "btrfs"), contiguous),
    Case("permuted", ("xfs", "btrfs"), permuted),
    Case("io", ("xfs", "btrfs"), io_growth),
    Case("scale", ("xfs",), scale),
    Case("reference", ("xfs", "ext4"), reference),
    Case("compressed", ("xfs", "ext4"), compressed),
    Case("compressing", ("xfs", "ext4"), compressing),
    Case("in-place", ("ext4",), in_place),
    Case("sync", ("xfs", "btrfs", "ext4"), sync),
    Case("copy", ("ext4", "directory"), copy),
    Case("devices", ("ext4",), devices),
    Case("remote", ("ext4",), remote),
    Case("swift", ("xfs",), swift),
    Case("juicefs", ("xfs",), juicefs),
    Case("pairs", ("xfs", "btrfs"), pairs),
    Case("misaligned", ("xfs", "btrfs"), misaligned),
    Case("terabyte", ("xfs",), terabyte),
    Case("streams", ("xfs", "ext4"), streams),
    Case("machines", ("xfs", "btrfs"), machines),
    Case("machines", ("ext4",), machines_in_place),
    Case("memory", ("xfs", "btrfs"), memory),
    Case("views", ("xfs", "ext4"), views),
    Case("backups", ("xfs",), backups),
    Case("archives", ("xfs", "ext4"), archives),
    Case("batch", ("xfs", "ext4"), batch),
)
