"""Files that images name by paths of other systems, and by links: found where they are meant, and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import vmconv
from support import qcow2_images
from support.disks import MIB, QemuImg, make_disk, qemu_io
from vmconv.errors import AccessError, ImageError, PlanError
from vmconv.model import paths
from vmconv.plugin import Opener, installed

FOREIGN = {
    r"C:\VMs\base.vmdk": "base.vmdk",
    "C:/VMs/base.vmdk": "base.vmdk",
    "c:base.vmdk": "base.vmdk",
    r"\\server\share\base.vmdk": "base.vmdk",
    "//server/share/base.vmdk": "base.vmdk",
    r"\\?\Volume{26a21bda-a627-11d7-9931-806e6f6e6963}\VMs\base.vmdk": "base.vmdk",
    "/vmfs/volumes/5f0a11/vm/base.vmdk": "base.vmdk",
    "/Users/me/Virtual Machines/base.vmdk": "base.vmdk",
    "/Volumes/disk/base.vmdk": "base.vmdk",
    "[datastore1] vm/base.vmdk": "base.vmdk",
    "file:///Users/me/base.vmdk": "base.vmdk",
    "file://localhost/C:/my%20disks/base%20disk.vmdk": "base disk.vmdk",
}
HERE = ["base.vmdk", "sub/base.vmdk", "../base.vmdk", "/srv/base.vmdk", "a [b] c.vmdk", "users/base.vmdk"]
MOVED = [*FOREIGN, "/home/somebody/else/base.vmdk"]


@pytest.mark.parametrize(("reference", "base"), FOREIGN.items())
def test_a_path_of_another_system_has_a_base_name(reference: str, base: str) -> None:
    assert paths.is_foreign(reference)
    assert paths.base_of(reference) == base


@pytest.mark.parametrize("reference", HERE)
def test_a_path_of_this_system_is_not_foreign(reference: str) -> None:
    assert not paths.is_foreign(reference)


@pytest.mark.parametrize("reference", [r"C:\VMs\..", "C:\\", "/vmfs/..", "//", "C:.", "file:///", r"\\"])
def test_a_path_without_a_last_part_has_no_name(reference: str) -> None:
    assert paths.base_of(reference) == ""


# Parents of VMDKs, which the CID proves


@pytest.fixture
def chain(tmp_path: Path, qemu_img: QemuImg) -> Path:
    """A delta over base.vmdk, and what a guest sees of it in want.raw; in a directory of their own."""
    directory = tmp_path / "images"
    directory.mkdir()
    raw = make_disk(directory / "d.raw", MIB)
    qemu_img("convert", "-O", "vmdk", raw, directory / "base.vmdk")
    qemu_img("create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", directory / "child.vmdk")
    qemu_io(directory / "child.vmdk", "write -P 5 64k 64k")
    qemu_img("convert", "-O", "raw", directory / "child.vmdk", directory / "want.raw")
    return directory / "child.vmdk"


def name_parent(child: Path, reference: str) -> Path:
    """Writes another name of the parent into the descriptor inside the image."""
    data = bytearray(child.read_bytes())
    start, end = 512, 512 + 20 * 512
    lines = bytes(data[start:end]).rstrip(b"\0").split(b"\n")
    lines = [f'parentFileNameHint="{reference}"'.encode() if b"parentFileNameHint" in line else line for line in lines]
    data[start:end] = b"\n".join(lines).ljust(end - start, b"\0")
    child.write_bytes(data)
    return child


def is_right(child: Path) -> bool:
    target = child.with_name("got.raw")
    vmconv.convert(child, target)
    return target.read_bytes() == child.with_name("want.raw").read_bytes()


@pytest.mark.parametrize("reference", [each for each in MOVED if "base%20disk" not in each])
def test_a_parent_that_was_brought_along_is_found_beside_the_image(chain: Path, reference: str) -> None:
    assert is_right(name_parent(chain, reference))


@pytest.mark.parametrize("reference", [r"C:\VMs\BASE.VMDK", "/vmfs/volumes/x/Base.vmdk"])
def test_the_case_of_a_foreign_name_does_not_matter_where_one_file_has_it(chain: Path, reference: str) -> None:
    assert is_right(name_parent(chain, reference))
    (chain.parent / "bAsE.vMdK").write_bytes(b"another")
    chain.with_name("got.raw").unlink()
    # By its identity.
    assert is_right(chain)
    (chain.parent / "base.vmdk").write_bytes(b"a third")
    with pytest.raises(AccessError):
        vmconv.map_disk(chain)


@pytest.mark.parametrize("reference", MOVED)
def test_another_disk_of_that_name_is_refused_by_its_identity(chain: Path, qemu_img: QemuImg, reference: str) -> None:
    base = chain.parent / paths.base_of(reference)
    base.unlink(missing_ok=True)
    qemu_img("create", "-q", "-f", "vmdk", base, "1M")
    with pytest.raises(ImageError, match="parentCID"):
        vmconv.map_disk(name_parent(chain, reference))


@pytest.mark.parametrize("reference", list(FOREIGN))
def test_a_missing_parent_is_named_in_the_hint(chain: Path, reference: str) -> None:
    (chain.parent / "base.vmdk").unlink()
    with pytest.raises(AccessError) as caught:
        vmconv.map_disk(name_parent(chain, reference))
    assert repr(reference) in str(caught.value)
    assert caught.value.hint in (
        f"put {paths.base_of(reference)} beside the image",
        "protocols and json: names are never followed",
    )


def test_a_foreign_name_that_is_the_image_s_own_is_no_loop(chain: Path) -> None:
    assert is_right(name_parent(chain, r"C:\base\child.vmdk"))
    (chain.parent / "base.vmdk").unlink()
    with pytest.raises(AccessError, match="does not exist"):
        vmconv.map_disk(chain)


@pytest.mark.parametrize("reference", [r"C:\x\secret.vmdk", "/vmfs/volumes/x/secret.vmdk"])
def test_a_foreign_name_leads_out_of_no_directory(chain: Path, tmp_path: Path, reference: str) -> None:
    (chain.parent / "base.vmdk").rename(tmp_path / "secret.vmdk")
    with pytest.raises(AccessError, match="does not exist"):
        vmconv.map_disk(name_parent(chain, reference))
    (chain.parent / "secret.vmdk").symlink_to(tmp_path / "secret.vmdk")
    with pytest.raises(AccessError, match="lies outside"):
        vmconv.map_disk(chain)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["a pipe", "a directory"])
def test_only_a_regular_file_is_found_by_a_foreign_name(chain: Path, make: Callable[[Path], None]) -> None:
    (chain.parent / "base.vmdk").unlink()
    make(chain.parent / "odd.vmdk")
    with pytest.raises(AccessError, match="does not exist"):
        vmconv.map_disk(name_parent(chain, r"C:\x\odd.vmdk"))


def test_a_relative_path_of_windows_is_followed(chain: Path) -> None:
    (chain.parent / "sub").mkdir()
    (chain.parent / "base.vmdk").rename(chain.parent / "sub" / "base.vmdk")
    assert is_right(name_parent(chain, r"sub\base.vmdk"))


# Extents, which nothing proves


def flat(directory: Path, name: str, size: int) -> Path:
    descriptor = directory / "flat.vmdk"
    descriptor.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n"
        f'createType="monolithicFlat"\nRW {size // 512} FLAT "{name}" 0\n'
    )
    return descriptor


@pytest.mark.parametrize("reference", [r"D:\VMs\d.raw", r"\\nas\vm\d.raw", "/vmfs/volumes/x/d.raw", "/home/x/vm/d.raw"])
def test_an_extent_that_was_brought_along_is_found_with_a_warning(tmp_path: Path, reference: str) -> None:
    disk = make_disk(tmp_path / "d.raw", MIB)
    done = vmconv.convert(flat(tmp_path, reference, MIB), tmp_path / "got.raw")
    assert (tmp_path / "got.raw").read_bytes() == disk.read_bytes()
    report = vmconv.check(tmp_path / "flat.vmdk")
    assert report
    assert not report.corruptions
    assert done.warnings == (f"flat.vmdk: extent {reference!r} does not exist: using d.raw beside it",)


def test_an_extent_with_its_own_name_needs_no_warning(tmp_path: Path) -> None:
    make_disk(tmp_path / "d.raw", MIB)
    for reference in ("d.raw", "./d.raw", str(tmp_path / "d.raw")):
        done = vmconv.convert(flat(tmp_path, reference, MIB), tmp_path / "got.raw", force=True)
        assert not done.warnings


def test_an_extent_of_that_name_that_is_too_short_is_refused(tmp_path: Path) -> None:
    make_disk(tmp_path / "d.raw", MIB // 2)
    with pytest.raises(ImageError, match="past the end"):
        vmconv.map_disk(flat(tmp_path, r"D:\VMs\d.raw", MIB))


def test_an_extent_that_was_recorded_is_not_exchanged_for_another_one(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "d.raw", MIB)
    (tmp_path / "vm").mkdir()
    vmdk = tmp_path / "vm" / "d.vmdk"
    vmconv.convert(disk, vmdk, options={"subformat": "reference"})
    disk.rename(tmp_path / "vm" / "d.raw")
    with pytest.raises(AccessError):
        vmconv.map_disk(vmdk, allow_external=[tmp_path])


# Formats without an identity


def test_a_backing_file_of_another_system_is_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "base.raw").write_bytes(b"\x11" * 4096)
    overlay = tmp_path / "top.qcow2"
    overlay.write_bytes(qcow2_images.empty_overlay(r"C:\images\base.raw"))
    vmconv.convert(overlay, tmp_path / "got.raw")
    assert (tmp_path / "got.raw").read_bytes()[:512] == b"\x11" * 512
    assert "using base.raw beside the image" in caplog.text


def test_an_absolute_backing_file_that_is_not_here_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"\x11" * 4096)
    overlay = tmp_path / "top.qcow2"
    overlay.write_bytes(qcow2_images.empty_overlay("/no/such/place/base.raw"))
    with pytest.raises(AccessError) as caught:
        vmconv.map_disk(overlay)
    assert "if it is base.raw beside the image" in (caught.value.hint or "")


# Relative names of an image that is named by a link


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """An overlay in one directory, and a link to it in another one."""
    for directory in ("real", "links"):
        (tmp_path / directory).mkdir()
    (tmp_path / "real" / "top.qcow2").write_bytes(qcow2_images.empty_overlay("base.raw"))
    link = tmp_path / "links" / "top.qcow2"
    link.symlink_to("../real/top.qcow2")
    return link


def test_a_base_beside_the_image_only_is_found_through_a_link(linked: Path, tmp_path: Path) -> None:
    (tmp_path / "real" / "base.raw").write_bytes(b"\x11" * 4096)
    assert vmconv.map_disk(linked)


def test_two_bases_that_differ_are_refused(linked: Path, tmp_path: Path) -> None:
    """QEMU would read the one beside the link, libvirt names the image by its real path."""
    (tmp_path / "real" / "base.raw").write_bytes(b"\x11" * 4096)
    (tmp_path / "links" / "base.raw").write_bytes(b"\x22" * 4096)
    with pytest.raises(AccessError, match="is one file beside the link") as caught:
        vmconv.map_disk(linked)
    assert caught.value.hint == f"use the image's own path: {tmp_path}/real/top.qcow2"
    assert vmconv.map_disk(tmp_path / "real" / "top.qcow2")


def test_two_names_of_one_base_are_no_two_bases(linked: Path, tmp_path: Path) -> None:
    (tmp_path / "real" / "base.raw").write_bytes(b"\x11" * 4096)
    (tmp_path / "links" / "base.raw").symlink_to("../real/base.raw")
    assert vmconv.map_disk(linked)


def test_a_base_beside_the_link_only_must_be_allowed(linked: Path, tmp_path: Path) -> None:
    """As QEMU takes it; the directory of a link is not the image's."""
    (tmp_path / "links" / "base.raw").write_bytes(b"\x22" * 4096)
    with pytest.raises(AccessError, match="lies outside"):
        vmconv.map_disk(linked)
    vmconv.convert(linked, tmp_path / "got.raw", allow_external=[tmp_path / "links"])
    assert (tmp_path / "got.raw").read_bytes()[:512] == b"\x22" * 512


def test_a_link_to_a_directory_makes_no_difference(linked: Path, tmp_path: Path) -> None:
    (tmp_path / "real" / "base.raw").write_bytes(b"\x11" * 4096)
    (tmp_path / "alias").symlink_to("real")
    assert vmconv.map_disk(tmp_path / "alias" / "top.qcow2")


# In place


def test_a_disk_that_a_neighbour_names_by_a_foreign_path_stays(chain: Path) -> None:
    name_parent(chain, r"C:\VMs\base.vmdk")
    with pytest.raises(vmconv.VmconvError, match=r"child\.vmdk"):
        vmconv.convert(chain.with_name("base.vmdk"), chain.with_name("new.qcow2"), in_place=True)
    assert is_right(chain)


@pytest.mark.parametrize("name", ["a\\b", "latin-\udce9", "\udc80", "\udcff", "a\\\udcff"])
def test_a_name_that_windows_would_read_otherwise_is_no_path_of_windows(name: str) -> None:
    with pytest.raises(PlanError, match="cannot be a Windows path"):
        paths.to_windows(name)


@pytest.mark.parametrize("name", ["größe.vhd", "\U0001f4be.vhd", "\ue000.vhd"])
def test_other_names_are_paths_of_windows(name: str) -> None:
    assert paths.to_windows(f"a/{name}") == f"a\\{name}"


@pytest.mark.parametrize(
    ("windows", "path"),
    [
        (r".\a.vhd", "a.vhd"),
        (r".\.\a\b.vhd", "a/b.vhd"),
        ("./a.vhd", "a.vhd"),
        (r"..\a.vhd", "../a.vhd"),
        (".a.vhd", ".a.vhd"),
        (r"C:\a\b.vhd", "b.vhd"),
        (r"\\host\a\b.vhd", "b.vhd"),
    ],
)
def test_a_path_of_windows_is_one_of_this_system(windows: str, path: str) -> None:
    assert paths.from_windows(windows) == path


def test_an_image_with_other_facts_has_the_warnings_of_its_table(tmp_path: Path) -> None:
    make_disk(tmp_path / "d.raw", MIB)
    with Opener(installed()) as opener:
        image = opener.image(str(flat(tmp_path, "/vmfs/volumes/x/d.raw", MIB)))
        other = image.stating(adapter_type="lsilogic")
        assert image.facts.adapter_type != other.facts.adapter_type == other.disk.adapter_type == "lsilogic"
        assert other.guest == image.guest
        assert other.warnings == image.warnings != ()
        assert image.stating() is image
