"""Every readable format to every writable one, in each subformat, as the registry has them: nothing names a format here
but the table of QEMU's names.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

import vmconv
from disks import MIB, QemuImg, make_disk
from vmconv.registry import installed

QEMU_NAMES = {"vhd": "vpc"}
SIZE = 12 * MIB

Variant = tuple[str, str]
"""A format's name and the options of its writer as a user gives them, "" for none."""


def variants() -> list[Variant]:
    """Returns each installed format with each of its subformats."""
    found = []
    for name, one in sorted(installed().formats.items()):
        if not (one.can_read and one.can_write):
            continue
        hint: Any = get_type_hints(one.options()).get("subformat")
        subformats = get_args(hint) if get_origin(hint) is Literal else ()
        found += [(name, f"subformat={value}") for value in subformats] or [(name, "")]
    return found


def options(variant: Variant) -> dict[str, str]:
    return dict(part.split("=") for part in variant[1].split(",") if part)


def is_compressed(variant: Variant) -> bool:
    return "streamOptimized" in variant[1]


def make(raw: Path, variant: Variant, directory: Path) -> Path:
    """Returns an image of the variant with the content of a raw disk, in a directory of its own."""
    folder = directory / "-".join([variant[0], *options(variant).values()])
    folder.mkdir()
    path = folder / f"disk{installed().formats[variant[0]].suffixes[0]}"
    vmconv.convert(str(raw), str(path), target_format=variant[0], options=options(variant))
    return path


@pytest.mark.parametrize("source", variants(), ids=lambda v: "-".join(filter(None, v)))
def test_a_format_converts_to_every_other(reflink_dir: Path, qemu_img: QemuImg, source: Variant) -> None:
    raw = make_disk(reflink_dir / "disk.raw", SIZE, unit=4096)
    image = make(raw, source, reflink_dir)
    # References have their source elsewhere.
    access: dict[str, Any] = {"allow_external": [str(reflink_dir)]}
    for target in variants():
        folder = reflink_dir / "target"
        folder.mkdir()
        path = folder / f"new{installed().formats[target[0]].suffixes[0]}"
        copies = is_compressed(source) or is_compressed(target)
        result = vmconv.convert(
            str(image),
            str(path),
            source_format=source[0],
            target_format=target[0],
            options=options(target),
            zero_copy="auto" if copies else "require",
            **access,
        )
        formats: dict[str, Any] = {"left_format": source[0], "right_format": target[0], **access}
        assert vmconv.compare(str(image), str(path), **formats), target
        if not copies:
            assert result.totals.copied == 0, target
            assert vmconv.prove(str(image), str(path), **formats), target
        qemu_img("compare", "-f", "raw", "-F", QEMU_NAMES.get(target[0], target[0]), raw, path)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def test_all_pairs_of_formats_are_tried() -> None:
    names = {variant[0] for variant in variants()}
    pairs = set(itertools.product(names, names))
    assert len(pairs) == len(installed().formats) ** 2
