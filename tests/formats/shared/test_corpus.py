"""Every image of the corpus is converted to what its manifest says, or refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import vmconv
from support.corpus import ROWS, digest, unpack
from vmconv.io.registry import installed

QCOW = ("qcow1", "qcow2")


@pytest.mark.parametrize("row", [r for r in ROWS if r["format"] in QCOW], ids=lambda row: row["name"])
def test_qcow_images_are_converted_right_or_refused(row: dict[str, str], corpus: Path, xfs_dir: Path) -> None:
    image = unpack(corpus, row["name"], xfs_dir)
    targets = [(xfs_dir / "target.raw", "raw"), (xfs_dir / "target.qcow2", "qcow2")]
    for target, target_format in targets:
        if row["expect"] == "must-refuse":
            with pytest.raises(vmconv.VmconvError) as caught:
                vmconv.convert(str(image), str(target))
            assert "\n" not in str(caught.value)
            assert not target.exists()
        else:
            vmconv.convert(str(image), str(target))
            assert digest(target, target_format) == row["expect"]
            assert vmconv.compare(str(image), str(target))


@pytest.mark.of_format("raw")
@pytest.mark.parametrize("name", ["libvirt/raw"])
def test_raw_images_are_converted_right(name: str, corpus: Path, xfs_dir: Path) -> None:
    image = unpack(corpus, name, xfs_dir)
    vmconv.convert(str(image), str(xfs_dir / "target.qcow2"))
    expected = hashlib.sha256(image.read_bytes()).hexdigest()
    assert digest(xfs_dir / "target.qcow2", "qcow2") == expected


@pytest.mark.parametrize("row", [r for r in ROWS if r["format"] not in QCOW], ids=lambda row: row["name"])
def test_images_of_other_formats_are_never_taken_for_raw(row: dict[str, str], corpus: Path, xfs_dir: Path) -> None:
    name = row["format"].split("-")[0]
    if name in installed().formats or row["expect"] == "aux" or row["format"] == "parallels-bundle":
        pytest.skip("has tests of its own")
    image = unpack(corpus, row["name"], xfs_dir)
    if row["name"] == "glance/testserver.ova":
        image = image.rename(image.with_suffix(".ova"))
    with pytest.raises(vmconv.VmconvError) as caught:
        vmconv.convert(str(image), str(xfs_dir / "target.raw"))
    assert "\n" not in str(caught.value)
    assert not (xfs_dir / "target.raw").exists()


def test_the_corpus_is_there(corpus: Path) -> None:
    assert ROWS
