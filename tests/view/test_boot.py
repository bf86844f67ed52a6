"""A real Linux guest boots from writable views, and what it wrote is brought into the images or thrown away."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path

import pytest

import vmconv
from support.disks import QemuImg
from support.guest import answer_on, boot, make_guest, run, what_is_missing
from support.nbd import served
from support.requirements import missing
from vmconv_view.overlay_options import SUFFIX

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A raw disk that boots, and the sum of its payload."""
    lack = what_is_missing()
    if lack:
        missing("oracle", lack)
    return make_guest(tmp_path_factory.mktemp("guest"))


@pytest.mark.parametrize("end", ["--commit", "--discard"])
def test_a_guest_boots_from_a_writable_view(
    tmp_path: Path, qemu_img: QemuImg, guest: tuple[Path, str], end: str
) -> None:
    raw, vhdx = tmp_path / "guest.raw", tmp_path / "guest.vhdx"
    run("cp", "--sparse=always", guest[0], raw)
    vmconv.convert(raw, vhdx)
    images = [vhdx, raw] if end == "--commit" else [raw, vhdx]
    before = {image: sha256(image.read_bytes()).digest() for image in images}
    with served(images[0], str(images[1]), "-x", "first", "-x", "second", "--writable", end, exports=2) as running:
        text = boot([*running.uris.values()], "raw")
        code, said = running.end()
    assert code == 0, said
    assert not [*tmp_path.glob(f"*{SUFFIX}")]
    answers = re.findall(r"^disk \d+ *\n(token .*\npayload .*\n)", text.replace("\r", ""), re.MULTILINE)
    assert [guest[1] in answer for answer in answers] == [True, True], text
    for image, answer in zip(images, answers, strict=True):
        if end == "--discard":
            assert sha256(image.read_bytes()).digest() == before[image]
            continue
        # QEMU reads what the guest wrote, from the image itself.
        back = tmp_path / "back.raw"
        qemu_img("convert", "-O", "raw", image, back)
        assert answer_on(back) == answer
    report = vmconv.check(vhdx)
    assert report is not None
    assert report.corruption_count == 0
