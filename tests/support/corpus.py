"""The corpus of real images, with its manifest, and of configurations of machines."""

from __future__ import annotations

import csv
import hashlib
import lzma
import tarfile
from functools import cache
from pathlib import Path

import vmconv
from vmconv.io.opener import Opener
from vmconv.io.registry import installed

from .disks import QemuImg
from .requirements import CORPUS, REQUIRED, missing


def _manifest() -> list[dict[str, str]]:
    """Returns the rows of the manifest; none where there is no corpus, unless this run requires one."""
    path = CORPUS / "expected.tsv"
    if not path.exists() and "corpus" not in REQUIRED:
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def rows(format_name: str) -> list[dict[str, str]]:
    """Returns the rows of images of a format and of its kinds, such as `vhd` and `vhd-fixed`."""
    return [row for row in ROWS if row["format"].partition("-")[0] == format_name]


def unpack(corpus: Path, name: str, directory: Path) -> Path:
    """Decompresses an image and its siblings, which may be its parents and extents."""
    folder = (corpus / "images" / name).parent
    for packed in folder.iterdir():
        if packed.is_file():
            (directory / packed.stem).write_bytes(lzma.decompress(packed.read_bytes()))
    return directory / Path(name).name


def compare_with_qemu(row: dict[str, str], corpus: Path, directory: Path, qemu_img: QemuImg) -> None:
    """Asserts that vmconv reads an image as QEMU reads it, and finds nothing wrong with it."""
    image = unpack(corpus, row["name"], directory)
    vmconv.convert(image, directory / "new.raw")
    qemu_img("compare", "-f", row["format"], "-F", "raw", image, directory / "new.raw")
    report = vmconv.check(image)
    assert report is not None
    assert (report.corruption_count, report.leak_count) == (0, 0)


def digest(path: Path, format_name: str) -> str:
    """Returns the sha256 of all that the guest sees."""
    found = hashlib.sha256()
    with Opener(installed()) as opener:
        table = opener.image(str(path), format_name).flat
        for at in range(0, table.size, 16 << 20):
            found.update(table.read(at, min(16 << 20, table.size - at)))
    return found.hexdigest()


@cache
def configurations(suffix: str) -> dict[str, bytes]:
    """Returns the configurations of machines whose names have a suffix, by their paths in the corpus."""
    path = CORPUS / "configs.tar.xz"
    if not path.exists():
        missing("corpus", f"{path} does not exist")
    with tarfile.open(path) as archive:
        members = [member for member in archive if member.isfile() and member.name.endswith(suffix)]
        files = {member.name.partition("/")[2]: archive.extractfile(member) for member in members}
        return {name: file.read() for name, file in sorted(files.items()) if file is not None}


ROWS = _manifest()
