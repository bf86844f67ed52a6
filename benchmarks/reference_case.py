"""The case of references: targets that name the payload in its source's files."""

from __future__ import annotations

from bench import VMCONV, Bench, Check, vmconv
from correct import same_as, samples_of, some_offsets
from images import TIB, Place, command, dense_raw
from measure import Contender

_MIB = 1 << 20


def reference(bench: Bench, place: Place) -> None:
    """Payload that stays in the source's file: whatever the size, and on any filesystem."""
    raw = bench.random(place)
    for target_format in ("vmdk", "qcow2"):
        check = same_as(raw, "raw", target_format)
        _reference(bench, place, raw, "raw", target_format, bench.size, check)
    if place.kind != "xfs":
        return
    with place.scratch("dense.raw", "dense.vhdx") as (dense, vhdx):
        dense_raw(dense, raw, TIB)
        command(VMCONV, "convert", "-q", dense, vhdx)
        for source in (dense, vhdx):
            for target_format in ("vmdk", "qcow2"):
                check = samples_of(dense, target_format, some_offsets(TIB))
                _reference(bench, place, source, source.rpartition(".")[2], target_format, TIB, check)


def _reference(
    bench: Bench, place: Place, source: str, source_format: str, target_format: str, size: int, check: Check
) -> None:
    title = f"{source_format} -> {target_format} by reference, {size >> 30} GiB"
    with place.scratch(f"by-reference.{target_format}") as (target,):
        contenders = [vmconv(source, target, "-o", "subformat=reference", check=check)]
        if target_format == "qcow2":
            layer = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", source_format, "-b", source, target]
            contenders.append(Contender("qemu-img create -b", layer, target, durable=False))
        measured = bench.measure("reference", place, f"{title} of payload", contenders)
    bench.at_most(measured, f"{title}: whole process", measured.median("vmconv"), 0.25)
    bench.at_most(measured, f"{title}: bytes written", measured.median("vmconv", "wchar") / 1024, 4, "KiB")
    bench.at_most(measured, f"{title}: bytes read", measured.median("vmconv", "rchar") / _MIB, 16, "MiB")
