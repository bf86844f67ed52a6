"""The case of converting in place, where nothing can be shared: the file itself becomes the target."""

from __future__ import annotations

from bench import VMCONV, Bench, python, qemu_img
from correct import as_remembered, some_offsets
from images import GIB, Place
from measure import Contender


def in_place(bench: Bench, place: Place) -> None:
    """A raw disk becomes qcow2 and VMDK inside its own file, and is turned back after each run, outside the timing."""
    raw = bench.random(place)
    for name in ("qcow2", "vmdk"):
        check = as_remembered(raw, name, some_offsets(bench.size))
        with place.scratch(f"target.{name}", "tiny.raw", f"tiny.{name}") as (target, *tiny):
            undo = [VMCONV, "undo", target]
            flags = ["-q", "--in-place", "--keep-undo"]
            measured = bench.measure(
                "in-place",
                place,
                f"raw -> {name} in place, {bench.size / GIB:.3g} GiB of random payload",
                [
                    Contender("vmconv", [VMCONV, "convert", *flags, raw, target], target, check=check, back=undo),
                    python("vmconv, warm", "child_inplace.py", raw, target, *tiny, target=target, back=undo),
                    qemu_img(raw, "raw", target, name, "-W", "-m", "16", heavy=False),
                ],
                min(bench.runs, 3),
            )
        bench.at_most(measured, f"raw -> {name} in place: whole process", measured.median("vmconv"), 0.35)
        inner = measured.median("vmconv, warm", "inner")
        bench.at_most(measured, f"raw -> {name} in place: one call in a warm process, without its syncs", inner, 0.03)
        other = "qemu-img -W -m 16"
        bench.at_least(measured, f"raw -> {name} in place: 30 times faster than {other}", "vmconv", other, 30)
        written = measured.median("vmconv", "wchar")
        bench.at_most(measured, f"raw -> {name} in place: bytes written", written / (1 << 20), 16, "MiB")
