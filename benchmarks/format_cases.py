"""The cases of all formats: every format beside QEMU, misaligned sources, disks of a terabyte, and streams."""

from __future__ import annotations

import itertools
import json
import os

from bench import HASTY, VMCONV, Bench, qemu_img, vmconv, vmconv_hasty
from correct import same_as, samples_of, some_offsets
from images import GIB, TIB, Place, command, dense_raw, text_raw
from measure import Measured

PARALLEL = ("-W", "-m", "16")
# QEMU's names of the formats, each with the suffix of its files; qemu-img has no check for vpc.
FORMATS = {
    "raw": ".raw",
    "qcow2": ".qcow2",
    "vmdk": ".vmdk",
    "vhdx": ".vhdx",
    "vpc": ".vhd",
    "vdi": ".vdi",
    "parallels": ".hdd",
    "qed": ".qed",
}
# Each format once as source and once as target besides the pairs with raw.
RING = list(itertools.pairwise([*list(FORMATS)[1:], "qcow2"]))
_MIB = 1 << 20


def pairs(bench: Bench, place: Place) -> None:
    """One extent of payload from raw to each format, from each format to the next one, and back to raw."""
    raw = bench.random(place)
    others = [name for name in FORMATS if name != "raw"]
    for source, target in [("raw", name) for name in others] + RING + [(name, "raw") for name in others]:
        with place.scratch(f"source{FORMATS[source]}") as (made,):
            # The raw image itself stays: only what was made of it goes.
            image = raw if source == "raw" else _made(raw, made)
            _pair(bench, place, image, source, target)


def _made(raw: str, path: str, *flags: str) -> str:
    """Makes the source of a pair by vmconv, since qemu-img aligns its VHD and VDI to nothing; returns its path."""
    command(VMCONV, "convert", "-q", *flags, raw, path)
    return path


def _pair(bench: Bench, place: Place, image: str, source: str, target: str) -> None:
    with place.scratch(f"target{FORMATS[target]}") as (path,):
        check = same_as(image, source, target)
        title = f"{source} -> {target}, {bench.size / GIB:.3g} GiB in one extent"
        contenders = [vmconv(image, path, check=check), qemu_img(image, source, path, target, *PARALLEL)]
        # One round of qemu-img and two of vmconv: there are many pairs.
        measured = bench.measure("pairs", place, title, contenders, 2)
    text = f"{source} -> {target}"
    bench.at_most(measured, f"{text}: whole process", measured.median("vmconv"), 0.30)
    bench.at_least(measured, f"{text}: 60 times faster than qemu-img -W -m 16", "vmconv", "qemu-img -W -m 16", 60)


def misaligned(bench: Bench, place: Place) -> None:
    """VHD and VDI as QEMU writes them, whose blocks lie at odd places: how much can be shared with VMDK."""
    # Nothing here is shared by qemu-img: there would be no room for three files of the full size.
    size = bench.size // 2
    for name in ("vpc", "vdi"):
        with place.scratch("half.raw", f"source{FORMATS[name]}", "target.vmdk") as (raw, image, target):
            dense_raw(raw, bench.random(place), size)
            command("qemu-img", "convert", *PARALLEL, "-f", "raw", "-O", name, raw, image)
            contenders = [
                vmconv(image, target, check=same_as(image, name, "vmdk")),
                qemu_img(image, name, target, "vmdk", *PARALLEL),
            ]
            title = f"{name} by QEMU -> vmdk, {size / GIB:.3g} GiB"
            measured = bench.measure("misaligned", place, title, contenders, 2)
            plan = json.loads(command(VMCONV, "plan", "--output", "json", image, target))
        copied = 100 * plan["copied"] / (plan["shared"] + plan["copied"])
        bench.at_most(measured, f"{name} by QEMU -> vmdk: payload that is copied", copied, 1, "%")


def terabyte(bench: Bench, place: Place) -> None:
    """A terabyte with payload in every block, to the formats that hold one."""
    limits = {"vhdx": 0.4, "vmdk": 1.5, "vdi": 0.6, "parallels": None, "qed": None}
    with place.scratch("dense.raw") as (raw,):
        dense_raw(raw, bench.random(place), TIB)
        for name, limit in limits.items():
            with place.scratch(f"target{FORMATS[name]}") as (target,):
                check = samples_of(raw, name, some_offsets(TIB, 4))
                title = f"raw -> {name}, 1 TiB dense"
                measured = bench.measure("terabyte", place, title, [vmconv(raw, target, check=check)], 3)
            if limit is not None:
                bench.at_most(measured, f"1 TiB -> {name}", measured.median("vmconv"), limit)
                peak = max(measured.figures("vmconv", "peak")) / _MIB
                bench.at_most(measured, f"1 TiB -> {name}: peak memory", peak, 250, "MiB")


def streams(bench: Bench, place: Place) -> None:
    """StreamOptimized VMDK, which compresses: every byte is read and written, and the question is how well."""
    size = GIB // 4 if bench.quick else GIB
    options = "subformat=streamOptimized"
    with place.scratch("text.raw", "stream.vmdk", "target.raw", "target.vmdk") as (raw, image, back, target):
        text_raw(raw, size)
        written = bench.measure(
            "streams",
            place,
            f"raw -> streamOptimized, {size / GIB:.3g} GiB",
            [
                vmconv(raw, target, "-o", options, check=same_as(raw, "raw", "vmdk")),
                qemu_img(raw, "raw", target, "vmdk", "-o", options, heavy=False),
            ],
            3,
        )
        command("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", options, raw, image)
        read = _stream_read(bench, place, image, back)
    bench.at_least(written, "written as fast as by qemu-img", "vmconv", f"qemu-img -o {options}", 1)
    bench.at_least(read, "read 1.5 times faster than by qemu-img", "vmconv", "qemu-img -W -m 16", 1.5, hasty=HASTY)


def _stream_read(bench: Bench, place: Place, image: str, back: str) -> Measured:
    return bench.measure(
        "streams",
        place,
        f"streamOptimized -> raw, {os.path.getsize(image) / GIB:.3g} GiB",
        [
            vmconv(image, back, check=same_as(image, "vmdk", "raw")),
            vmconv_hasty(image, back),
            qemu_img(image, "vmdk", back, "raw", *PARALLEL, heavy=False),
        ],
        3,
    )
