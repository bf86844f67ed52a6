"""Every image of the corpus is converted to what its manifest says, or refused."""

from __future__ import annotations

import csv
import hashlib
import lzma
import os
from pathlib import Path

import pytest

import vmconv
from vmconv.io.opener import Opener
from vmconv.io.registry import installed

CORPUS = Path(os.environ.get("VMCONV_CORPUS", Path(__file__).parents[4] / "shared" / "corpus"))


def manifest() -> list[dict[str, str]]:
    path = CORPUS / "expected.tsv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def unpack(corpus: Path, name: str, directory: Path) -> Path:
    """Decompresses an image and its siblings, which may be its parents and extents."""
    folder = (corpus / "images" / name).parent
    for packed in folder.iterdir():
        if packed.is_file():
            (directory / packed.stem).write_bytes(lzma.decompress(packed.read_bytes()))
    return directory / Path(name).name


def digest(path: Path, format_name: str) -> str:
    """Returns the sha256 of all that the guest sees."""
    found = hashlib.sha256()
    with Opener(installed()) as opener:
        table = opener.image(str(path), format_name).flat
        for at in range(0, table.size, 16 << 20):
            found.update(table.read(at, min(16 << 20, table.size - at)))
    return found.hexdigest()


ROWS = manifest()


@pytest.mark.parametrize("row", [r for r in ROWS if r["format"] == "qcow2"], ids=lambda row: row["name"])
def test_qcow2_images_are_converted_right_or_refused(row: dict[str, str], corpus: Path, xfs_dir: Path) -> None:
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


@pytest.mark.parametrize("name", ["libvirt/raw"])
def test_raw_images_are_converted_right(name: str, corpus: Path, xfs_dir: Path) -> None:
    image = unpack(corpus, name, xfs_dir)
    vmconv.convert(str(image), str(xfs_dir / "target.qcow2"))
    expected = hashlib.sha256(image.read_bytes()).hexdigest()
    assert digest(xfs_dir / "target.qcow2", "qcow2") == expected


@pytest.mark.parametrize("row", [r for r in ROWS if r["format"] != "qcow2"], ids=lambda row: row["name"])
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
