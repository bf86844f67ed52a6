"""`convert` and `create` as qemu-img's."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from typing import Any

from vmconv.cli.qemu_img.arguments import QEMU_NAMES, SECTOR, Given, plain_file, plain_name, size_of
from vmconv.cli.qemu_img.handing import NAME, NotAnsweredError
from vmconv.cli.qemu_img.images import ANYWHERE, format_of, new_mode, only_sharing, print_end, progress, translated

_OPTIONS: dict[str, tuple[str, ...]] = {
    "parallels": ("cluster_size",),
    "qcow2": (
        "cluster_size",
        "compat",
        "compression_type",
        "extended_l2",
        "lazy_refcounts",
        "preallocation",
        "refcount_bits",
    ),
    "qed": ("cluster_size", "table_size"),
    "raw": ("preallocation",),
    "vdi": ("static",),
    "vhd": ("subformat", "force_size"),
    "vhdx": ("subformat", "block_size", "log_size"),
    "vmdk": ("subformat", "adapter_type", "hwversion", "toolsversion", "zeroed_grain"),
}
"""Options of new images that mean the same to QEMU and vmconv."""

_RENAMED = {"compat": {"v2": "0.10", "v3": "1.1"}}

_SAME_DEFAULTS = {"vhd": {"force_size": "off"}}
"""Options whose default is another in QEMU."""

_CREATED = {
    "parallels": (("size", ""), ("cluster_size", "1048576")),
    "qcow2": (
        ("cluster_size", "65536"),
        ("extended_l2", "off"),
        ("preallocation", None),
        ("compression_type", "zlib"),
        ("size", ""),
        ("compat", None),
        ("backing_file", None),
        ("backing_fmt", None),
        ("lazy_refcounts", "off"),
        ("refcount_bits", "16"),
    ),
    "qed": (
        ("size", ""),
        ("backing_file", None),
        ("backing_fmt", None),
        ("cluster_size", "65536"),
        ("table_size", None),
    ),
    "raw": (("size", ""), ("preallocation", None)),
    "vdi": (("size", ""), ("static", "off")),
    "vhd": (("size", ""), ("subformat", None), ("force_size", None)),
    "vhdx": (("size", ""), ("log_size", "1048576"), ("block_size", "0"), ("subformat", None)),
    "vmdk": (
        ("size", ""),
        ("adapter_type", None),
        ("backing_file", None),
        ("backing_fmt", None),
        ("compat6", "off"),
        ("hwversion", "undefined"),
        ("toolsversion", None),
        ("subformat", None),
        ("zeroed_grain", None),
    ),
}
"""What qemu-img prints of a new image, in its order: option and default, None for one that is printed if given."""

_NUMBERS = ("block_size", "cluster_size", "log_size")
_MOST_COROUTINES = 16


def create(asked: Given) -> int:
    """Makes an image. Raises `NotAnsweredError` for a target or options that only QEMU knows."""
    from vmconv.api import create as made

    target = _target(asked.names[0]) if 1 <= len(asked.names) <= 2 else ""
    if not target:
        raise NotAnsweredError(f"{len(asked.names)} names")
    format_name = asked.format("-f") or "raw"
    qemu = asked.writer_options()
    size = size_of(asked.names[1]) if len(asked.names) == 2 else None
    if "size" in qemu:
        if size is not None:
            raise NotAnsweredError("two sizes")
        size = size_of(qemu.pop("size"))
    backing, backing_format = asked.last("-b"), asked.last("-F")
    if (backing is None) != (backing_format is None):
        raise NotAnsweredError("-b without -F")
    if backing is not None:
        plain_name(backing)
    options = _vmconv_options(qemu, format_name)
    if format_name == "qcow2":
        options.setdefault("cluster_size", "65536")
    if size is None:
        size = _size_of_backing(asked, target, backing)
    if size % SECTOR:
        raise NotAnsweredError(f"size {size} is not a multiple of {SECTOR}")
    made(
        target,
        size,
        target_format=format_name,
        options=options,
        backing_file=backing,
        backing_format=asked.format("-F"),
        mode=new_mode(target),
        force=True,
        allow_external=ANYWHERE,
    )
    if not asked.has("-q"):
        shown = {**qemu, "size": str(size), "backing_file": backing, "backing_fmt": backing_format}
        print(_formatting(target, format_name, shown))
    return 0


def _size_of_backing(asked: Given, target: str, backing: str | None) -> int:
    """Returns the size of the backing file's disk."""
    if not backing:
        raise NotAnsweredError("no size")
    from vmconv.api import info

    path = os.path.join(os.path.dirname(target), backing)
    size: int = info(path, format_name=asked.format("-F"), allow_external=ANYWHERE)["virtual-size"]
    return size


def _formatting(target: str, format_name: str, given: dict[str, Any]) -> str:
    shown = [("fmt", QEMU_NAMES[format_name])]
    for name, default in _CREATED[format_name]:
        value = given.get(name)
        if value is not None and name in _NUMBERS:
            value = str(size_of(value))
        if value is None:
            value = default
        if value is not None:
            shown.append((name, value))
    return f"Formatting '{target}', " + " ".join(f"{name}={value}" for name, value in shown)


def _vmconv_options(qemu: dict[str, str], format_name: str) -> dict[str, str]:
    options = translated(qemu, _OPTIONS[format_name], _RENAMED)
    return {**_SAME_DEFAULTS.get(format_name, {}), **options}


def _target(name: str) -> str:
    """Returns the name of a file to make or replace; others, such as devices and pipes, are written by QEMU."""
    plain_name(name)
    try:
        status = os.stat(name)
    except FileNotFoundError:
        return name
    except (OSError, ValueError) as exc:
        raise NotAnsweredError(f"{name}: {exc}") from exc
    if not stat.S_ISREG(status.st_mode):
        raise NotAnsweredError(f"{name}: not a regular file")
    # qemu-img would change the file under all of its names.
    if status.st_nlink > 1:
        raise NotAnsweredError(f"{name}: has {status.st_nlink} names")
    return name


def convert(asked: Given) -> int:
    """Converts. Raises `NotAnsweredError` if that means to copy, or to write into an existing image."""
    from vmconv.api import convert as converted
    from vmconv.cli.options import durability

    if len(asked.names) < 2:
        raise NotAnsweredError(f"{len(asked.names)} names")
    *sources, target = asked.names
    for source in sources:
        plain_file(source)
    device = _is_device(target)
    target_format = asked.format("-O") or "raw"
    if device and target_format != "raw":
        raise NotAnsweredError(f"{target}: a block device, and -O is {QEMU_NAMES[target_format]}")
    if not device:
        if asked.has("-n"):
            raise NotAnsweredError("-n into an image")
        _target(target)
    _refuse_odd(asked)
    named = asked.format("-f")
    formats = {format_of(source, named) for source in sources}
    if len(formats) > 1:
        raise NotAnsweredError(f"sources are {' and '.join(sorted(formats))}")
    qemu = asked.writer_options()
    if device and qemu:
        raise NotAnsweredError(f"{target}: a block device, and -o is given")
    backing, backing_format = asked.last("-B"), asked.last("-F")
    if (backing is None) != (backing_format is None):
        raise NotAnsweredError("-B without -F")
    compress, shown = asked.has("-c"), asked.has("-p") and not asked.has("-q")
    asked.cache("-T", "writeback")
    result = converted(
        sources[0],
        target,
        more_sources=sources[1:],
        source_format=formats.pop(),
        target_format=None if device else target_format,
        options={} if device else _vmconv_options(qemu, target_format),
        snapshot=asked.last("-l"),
        backing_file=backing,
        backing_format=asked.format("-F"),
        cache=durability(asked.cache("-t", "unsafe")),
        rate=None if asked.last("-r") is None else size_of(asked.last("-r") or ""),
        force=not device,
        force_share=asked.has("-U"),
        allow_external=ANYWHERE,
        mode=None if device else new_mode(target),
        compress=compress,
        bitmaps=asked.has("--bitmaps"),
        skip_broken_bitmaps=asked.has("--skip-broken-bitmaps"),
        no_create=device,
        target_is_zero=device and asked.has("--target-is-zero"),
        announce=None if compress or device else only_sharing,
        progress=progress(shown),
    )
    if asked.has("--skip-broken-bitmaps"):
        _name_skipped(result.losses)
    print_end(shown)
    return 0


def _name_skipped(losses: Sequence[str]) -> None:
    """Prints the bitmaps among the losses, as QEMU warns of them: the last of the image first."""
    for loss in reversed(losses):
        bitmap, which, _ = loss.rpartition(", which ")
        if which and bitmap.startswith("bitmap "):
            print(f"{NAME}: warning: Skipping inconsistent {bitmap}", file=sys.stderr)


def _refuse_odd(asked: Given) -> None:
    """Raises `NotAnsweredError` for combinations that QEMU refuses or warns of."""
    coroutines = asked.last("-m")
    if coroutines is not None and not 1 <= size_of(coroutines) <= _MOST_COROUTINES:
        raise NotAnsweredError(f"-m {coroutines}")
    if asked.has("-C") and asked.has("-c"):
        raise NotAnsweredError("-C and -c")
    if asked.has("--target-is-zero") and not asked.has("-n"):
        raise NotAnsweredError("--target-is-zero without -n")
    if asked.has("--skip-broken-bitmaps") and not asked.has("--bitmaps"):
        raise NotAnsweredError("--skip-broken-bitmaps without --bitmaps")
    for name in asked.names:
        plain_name(name)


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False
