"""Every readable format to every writable one, in each subformat, as the registry has them: none is named here."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk
from support.variants import Variant, is_compressed, make, options, qemu_name, title, variants
from vmconv.io.registry import installed

SIZE = 12 * MIB


@pytest.mark.parametrize("source", variants(), ids=title)
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
        qemu_img("compare", "-f", "raw", "-F", qemu_name(target), raw, path)
        # 63: QEMU has no check for this format.
        qemu_img("check", "-f", qemu_name(target), path, ok=(0, 63))
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def test_all_pairs_of_formats_are_tried() -> None:
    names = {variant[0] for variant in variants()}
    pairs = set(itertools.product(names, names))
    assert len(pairs) == sum(one.can_read and one.can_write for one in installed().formats.values()) ** 2
