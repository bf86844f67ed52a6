"""A real Linux guest boots from a converted disk in every format, reads its payload, and what it writes comes back."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

import vmconv
from support.disks import QemuImg
from support.guest import answer_on, boot, make_guest, run, what_is_missing
from support.requirements import missing
from support.variants import Variant, is_compressed, make, qemu_name, self_contained

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A raw disk that boots, and the sum of its payload."""
    lack = what_is_missing()
    if lack:
        missing("oracle", lack)
    return make_guest(tmp_path_factory.mktemp("guest"))


def answers_in(text: str) -> dict[str, str]:
    """Returns the two lines that the guest says of each disk, by its serial number; tokens differ."""
    lines = r"^disk (\d+) *\n(token [0-9a-f-]{36}\npayload [0-9a-f]{64}  -\n)"
    return dict(re.findall(lines, text.replace("\r", ""), re.MULTILINE))


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in self_contained()))
def test_a_guest_boots_and_what_it_writes_is_there_after_converting_back(
    xfs_dir: Path, qemu_img: QemuImg, guest: tuple[Path, str], name: str
) -> None:
    """The guest boots from the first subformat, and has a disk in each: a boot takes longer than all the rest."""
    raw = xfs_dir / "guest.raw"
    run("cp", "--sparse=always", guest[0], raw)
    before = hashlib.sha256(raw.read_bytes()).digest()
    images: dict[Path, Variant] = {}
    for variant in (one for one in self_contained() if one[0] == name):
        zero_copy = "auto" if is_compressed(variant) else "require"
        images[make(raw, variant, xfs_dir, zero_copy=zero_copy)] = variant

    # QEMU does not write to compressed grains: there, what the guest writes goes to a file of QEMU's own.
    unwritten = {image: "snapshot=on" for image, variant in images.items() if is_compressed(variant)}
    text = boot([*images], qemu_name((name, "")), unwritten)

    said = answers_in(text)
    assert [*said] == [str(number) for number in range(len(images))], text
    for answer, image in zip(said.values(), images, strict=True):
        assert guest[1] in answer
        back = image.parent / "back.raw"
        vmconv.convert(str(image), str(back), source_format=name)
        qemu_img("compare", "-f", "raw", "-F", qemu_name((name, "")), back, image)
        if image in unwritten:
            qemu_img("compare", "-f", "raw", "-F", "raw", raw, back)
        else:
            assert answer_on(back) == answer
    # The guest wrote to blocks that it shared with the source.
    assert hashlib.sha256(raw.read_bytes()).digest() == before
