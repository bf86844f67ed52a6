"""The case of block devices: half a disk of payload, written into a loop device as a raw disk and as qcow2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bench import HASTY, VMCONV, Bench, Check
from correct import same_as
from images import GIB, Place, command, random_raw
from measure import Contender

_PIECE = 16 << 20
_METADATA = 64 << 20
_PARALLEL = ("-W", "-m", "16")


def devices(bench: Bench, place: Place) -> None:
    """Payload is written, the rest zeroed: every second piece of the source is a hole."""
    size = bench.size // 2
    with place.scratch("half.raw", "device.img") as (raw, backing):
        random_raw(raw, size)
        for at in range(_PIECE, size, 2 * _PIECE):
            command("fallocate", "--punch-hole", "--offset", str(at), "--length", str(_PIECE), raw)
        # The device is full of other bytes before the first run, as a used one is. qcow2 has metadata, too.
        random_raw(backing, size + _METADATA)
        for target_format, length in (("raw", size), ("qcow2", size + _METADATA)):
            with _loop(backing, length) as device:
                _device(bench, place, raw, device, target_format, size)


def _device(bench: Bench, place: Place, raw: str, device: str, target_format: str, size: int) -> None:
    check = same_as(raw, "raw", target_format)
    title = f"raw -> {target_format} on a loop device, {size / GIB:.3g} GiB, half of it payload"
    contenders = [
        _vmconv("vmconv", raw, device, target_format, check=check),
        _vmconv(HASTY, raw, device, target_format, "-t", "unsafe"),
        _qemu_img(raw, device, target_format),
        _qemu_img(raw, device, target_format, "-t", "none"),
    ]
    measured = bench.measure("devices", place, title, contenders)
    for other in contenders[2:]:
        text = f"raw -> {target_format} on a device: at least as fast as {other.name}"
        bench.at_least(measured, text, "vmconv", other.name, 1, hasty=HASTY)


def _vmconv(name: str, raw: str, device: str, target_format: str, *flags: str, check: Check | None = None) -> Contender:
    command = [VMCONV, "convert", "-q", "-n", "-O", target_format, *flags, raw, device]
    return Contender(name, command, device=device, durable=name != HASTY, check=check)


def _qemu_img(raw: str, device: str, target_format: str, *flags: str) -> Contender:
    """Returns `qemu-img convert` into the device. Without -n it makes the header of a container, too."""
    keeps = ("-n",) if target_format == "raw" else ()
    name = " ".join(("qemu-img", *keeps, *_PARALLEL, *flags))
    command = ["qemu-img", "convert", *keeps, *_PARALLEL, *flags, "-f", "raw", "-O", target_format, raw, device]
    return Contender(name, command, device=device, durable=False)


@contextmanager
def _loop(backing: str, length: int) -> Iterator[str]:
    """Yields a loop device of the first bytes of a file."""
    device = command("losetup", "--find", "--show", "--sizelimit", str(length), backing).strip()
    try:
        yield device
    finally:
        command("losetup", "--detach", device)
