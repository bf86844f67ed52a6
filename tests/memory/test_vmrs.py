"""Hyper-V's saved states by hand, sound and hostile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.hyperv_storage import Twice, storage
from support.memory_images import MIB, PAGE, ram_range, saved_by_hyperv
from support.requirements import CORPUS, missing
from vmconv.errors import ImageError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.model.extents import Kind
from vmconv.testing import random_bytes

A, B = random_bytes(2 * MIB, 1), random_bytes(MIB + 5 * PAGE, 2)
TWO = [(0, A), (8 * MIB, B)]


def put(folder: Path, data: bytes, name: str = "web.vmrs") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def test_ranges_and_bytes_are_those_of_the_state(tmp_path: Path) -> None:
    with Opener(installed()) as opener:
        table = opener.image(str(put(tmp_path, saved_by_hyperv(TWO)))).guest
        rows = [(row.start, row.length) for row in table if row.kind != Kind.HOLE]
        assert sum(length for _, length in rows) == len(A) + len(B)
        assert table.size == 8 * MIB + len(B)
        for at, data in TWO:
            assert table.read(at, len(data)) == data


def test_ranges_may_be_in_any_order(tmp_path: Path) -> None:
    with Opener(installed()) as opener:
        table = opener.image(str(put(tmp_path, saved_by_hyperv(TWO[::-1])))).guest
        assert [table.read(at, len(data)) == data for at, data in TWO] == [True, True]


def test_all_of_it_is_shared_and_what_is_lost_is_named(xfs_dir: Path) -> None:
    path = put(xfs_dir, saved_by_hyperv(TWO))
    result = vmconv.convert(str(path), str(xfs_dir / "new.elf"), zero_copy="require")
    assert result.totals.shared == len(A) + len(B)
    assert "state of the devices and processors" in " ".join(result.losses)
    assert vmconv.prove(str(path), str(xfs_dir / "new.elf"))


def test_a_state_without_memory_says_so(tmp_path: Path) -> None:
    """Of a machine that was off: a real one."""
    archive = CORPUS / "configs.tar.xz"
    if not archive.exists():
        missing("corpus", f"{archive} is not there")
    import tarfile

    with tarfile.open(archive) as tar:
        file = tar.extractfile(next(name for name in tar.getnames() if name.endswith("/88D07DD7.VMRS")))
        assert file is not None
        path = put(tmp_path, file.read())
    with pytest.raises(ImageError, match=r"web\.vmrs: has no memory: the machine was not saved while it ran"):
        vmconv.convert(str(path), str(tmp_path / "new.ram"))


def test_a_configuration_is_no_saved_state(tmp_path: Path) -> None:
    path = put(tmp_path, storage({"configuration": {"properties": {"version": 1}}}), "web.vmcx")
    with pytest.raises(ImageError, match="Hyper-V"):
        vmconv.info(str(path))


def of(**more: Any) -> bytes:
    return saved_by_hyperv(TWO, more=more)


HUGE = 1 << 63
MALFORMED = [
    pytest.param(of(RamBlock1=bytes(5000)), r"compressed block at 0x\w+: record at 0 makes", id="packed"),
    pytest.param(of(RamBlock1=b"small"), r"compressed block at 0x\w+: record at 0 makes", id="packed inline"),
    pytest.param(of(RamBlock1=bytes(MIB + 1)), r"RamBlock1: has 1048577 bytes, 1048576 at most and not 0", id="long"),
    pytest.param(of(RamBlock1=b""), r"RamBlock1: has 0 bytes, 1048576 at most and not 0", id="no bytes"),
    pytest.param(of(RamBlock1=7), r"savedstate/RamBlock1: is not there", id="a number"),
    pytest.param(of(RamBlock1=Twice(A[:MIB], A[:MIB])), r"savedstate/RamBlock1: is there twice", id="twice"),
    pytest.param(of(RamMemoryBlock1=bytes(47)), r"savedstate/RamMemoryBlock1: has 47 bytes, not 48", id="range"),
    pytest.param(of(RamMemoryBlock1=ram_range(5, 512, 2048, version=2)), r"version 2 with flags 0x0", id="version"),
    pytest.param(of(RamMemoryBlock1=ram_range(5, 512, 2048, flags=4)), r"version 3 with flags 0x4", id="flags"),
    pytest.param(of(RamMemoryBlock1=ram_range(5, 513, 2048)), r"page 0x201 is not the first one of a block", id="page"),
    pytest.param(of(RamMemoryBlock1=ram_range(0, 512, 2048)), r"0x0 pages from 0x800 on are none", id="empty"),
    pytest.param(of(RamMemoryBlock1=ram_range(HUGE, 512, 2048)), r"0x8000000000000000 pages from", id="pages"),
    pytest.param(of(RamMemoryBlock1=ram_range(5, 512, HUGE)), r"0x5 pages from 0x8000000000000000", id="address"),
    pytest.param(of(RamMemoryBlock1=ram_range(1 << 40, 512, 2048)), r"savedstate/RamBlock4: is not there", id="blocks"),
    pytest.param(of(RamMemoryBlock1=ram_range(5, HUGE, 2048)), r"savedstate/RamBlock\d+: is not there", id="begin"),
    pytest.param(of(RamMemoryBlock1=ram_range(5, 512, 256)), r"begins at 0x100000, before 0x200000", id="overlap"),
    pytest.param(of(RamMemoryBlock1=ram_range(5, 256, 2048)), r"its bytes at 0x\w+, which are those", id="shared"),
    pytest.param(of(VmVersion=0x500), r"savedstate/VmVersion: 0x500 is not read, only versions from 0x501", id="old"),
    pytest.param(of(VmVersion="10.0"), r"savedstate/VmVersion: is of type 6, not", id="version's type"),
    pytest.param(saved_by_hyperv([]), r"has no memory: the machine was not saved", id="no memory"),
    pytest.param(saved_by_hyperv(TWO)[:-MIB], r"RamBlock3 at 0x\w+: 1048576 bytes reach past the end", id="cut off"),
    pytest.param(storage({}, changes=1), r"replay log at 0x3000: has 1 changes to apply", id="log"),
]


@pytest.mark.malformed
@pytest.mark.parametrize(("data", "message"), MALFORMED)
def test_a_malformed_state_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    target = tmp_path / "new.ram"
    with pytest.raises(ImageError, match=message) as caught:
        vmconv.convert(str(put(tmp_path, data)), str(target))
    assert str(caught.value).startswith("web.vmrs: ")
    assert "\n" not in str(caught.value)
    assert not target.exists()


def test_a_compressed_block_that_is_not_read_has_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="compressed") as caught:
        vmconv.convert(str(put(tmp_path, of(RamBlock0=bytes(9000)))), str(tmp_path / "new.ram"))
    assert "vmsavedstatedumpprovider.dll" in (caught.value.hint or "")
