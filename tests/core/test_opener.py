"""What an image may make us open: nothing that its user did not name or allow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support import qcow2_images
from support.disks import QemuImg
from vmconv import api
from vmconv.errors import AccessError, ImageError, UsageError, VmconvError
from vmconv.io.known import KNOWN
from vmconv.io.opener import MAX_CHAIN_DEPTH, Opener
from vmconv.io.registry import Registry, installed
from vmconv.testing.malformed import time_limit

SECRET = b"secret!!" * 64
PLAIN = b"\x11" * 512 * 16
"""Seconds within which a refusal has to come."""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """The directory that images lie in."""
    directory = tmp_path / "images"
    directory.mkdir()
    return directory


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file outside the images' directory, large enough to be a backing or a data file."""
    directory = tmp_path / "outside"
    directory.mkdir()
    file = directory / "secret.raw"
    file.write_bytes(SECRET * 256)
    return file


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The real paths of all that is opened while the test runs."""
    paths: list[str] = []
    real_open = os.open

    def recording(path: str, *arguments: int, **more: int) -> int:
        paths.append(os.path.realpath(path))
        return real_open(path, *arguments, **more)

    monkeypatch.setattr(os, "open", recording)
    return paths


@pytest.fixture
def soon() -> Iterator[None]:
    """Ends a test that waits for something that never comes."""
    with time_limit():
        yield


in_time = pytest.mark.usefixtures("soon")


def overlay(reference: str) -> bytes:
    return qcow2_images.empty_overlay(reference)


REFERRERS = {"backing file": overlay, "data file": qcow2_images.with_data_file}
referrer = pytest.mark.parametrize("role", REFERRERS)


def converted(source: Path, target: Path, **options: Any) -> bytes:
    api.convert(str(source), str(target), target_format="raw", **options)
    return target.read_bytes()


def referring(directory: Path, role: str, reference: str) -> Path:
    image = directory / "disk.qcow2"
    image.write_bytes(REFERRERS[role](reference))
    return image


def refused(source: Path, **options: Any) -> VmconvError:
    with pytest.raises(VmconvError) as caught:
        converted(source, source.with_name("target.raw"), **options)
    assert not source.with_name("target.raw").exists()
    assert "\n" not in str(caught.value)
    return caught.value


def refused_as_external(source: Path) -> None:
    error = refused(source)
    assert isinstance(error, AccessError)
    assert "--allow-external" in (error.hint or "")


# Files outside the directory of the image


@referrer
def test_an_absolute_reference_to_the_outside_is_refused(images: Path, outside: Path, role: str) -> None:
    refused_as_external(referring(images, role, str(outside)))


@referrer
def test_a_reference_to_the_outside_by_dot_dot_is_refused(images: Path, outside: Path, role: str) -> None:
    refused_as_external(referring(images, role, f"../{outside.parent.name}/{outside.name}"))


@referrer
def test_a_reference_to_the_outside_by_a_symlink_in_the_directory_is_refused(
    images: Path, outside: Path, role: str
) -> None:
    (images / "link.raw").symlink_to(outside)
    refused_as_external(referring(images, role, "link.raw"))


@referrer
def test_a_reference_through_a_symlinked_directory_is_refused(images: Path, outside: Path, role: str) -> None:
    (images / "sub").symlink_to(outside.parent)
    refused_as_external(referring(images, role, f"sub/{outside.name}"))


def test_a_directory_whose_name_begins_as_the_image_s_own_is_outside(images: Path) -> None:
    other = images.with_name(images.name + "-other")
    other.mkdir()
    (other / "base.raw").write_bytes(PLAIN)
    refused_as_external(referring(images, "backing file", f"../{other.name}/base.raw"))


@referrer
def test_a_file_outside_is_never_opened(images: Path, outside: Path, opened: list[str], role: str) -> None:
    refused(referring(images, role, str(outside)))
    assert str(outside) not in opened


@referrer
def test_a_file_outside_is_accepted_when_its_tree_is_allowed(images: Path, outside: Path, role: str) -> None:
    image = referring(images, role, str(outside))
    data = converted(image, images / "target.raw", allow_external=[str(outside.parent)])
    assert data.startswith(SECRET)


@referrer
def test_a_file_outside_is_accepted_when_it_is_allowed_itself(images: Path, outside: Path, role: str) -> None:
    image = referring(images, role, str(outside))
    data = converted(image, images / "target.raw", allow_external=[str(outside)])
    assert data.startswith(SECRET)


def test_allowing_one_tree_does_not_allow_another(images: Path, outside: Path, tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    image = referring(images, "backing file", str(outside))
    assert isinstance(refused(image, allow_external=[str(allowed)]), AccessError)


def test_a_layer_outside_gives_its_own_directory_no_rights(images: Path, outside: Path) -> None:
    (outside.parent / "middle.qcow2").write_bytes(overlay("secret.raw"))
    image = images / "disk.qcow2"
    image.write_bytes(qcow2_images.empty_overlay(str(outside.parent / "middle.qcow2"), "qcow2"))
    error = refused(image, allow_external=[str(outside.parent / "middle.qcow2")])
    assert isinstance(error, AccessError)


@pytest.mark.parametrize(
    "reference",
    [
        "nbd://host/disk",
        "nbd:unix:/run/nbd",
        'json:{"driver":"file"}',
        "file:///etc/passwd",
        "ssh://host/d",
        "fat:/etc",
    ],
)
@pytest.mark.parametrize("allowed", [[], ["/"]], ids=["by default", "with everything allowed"])
@referrer
def test_a_protocol_is_refused(images: Path, role: str, reference: str, allowed: list[str]) -> None:
    error = refused(referring(images, role, reference), allow_external=allowed)
    assert isinstance(error, AccessError)
    assert repr(reference) in str(error)
    assert "never followed" in (error.hint or "")


# Files that may be followed


@referrer
@pytest.mark.parametrize("place", ["base.raw", "sub/base.raw", "sub/../base.raw"])
def test_a_file_in_the_directory_or_below_is_followed(images: Path, role: str, place: str) -> None:
    (images / "sub").mkdir()
    (images / place).write_bytes(PLAIN * 8)
    data = converted(referring(images, role, place), images / "target.raw")
    assert data.startswith(PLAIN)


@referrer
def test_a_symlink_that_stays_inside_the_directory_is_followed(images: Path, role: str) -> None:
    (images / "base.raw").write_bytes(PLAIN * 8)
    (images / "link.raw").symlink_to("base.raw")
    assert converted(referring(images, role, "link.raw"), images / "target.raw").startswith(PLAIN)


def test_a_reference_is_relative_to_its_image_and_not_to_the_working_directory(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images / "data.raw").write_bytes(PLAIN * 8)
    (tmp_path / "data.raw").write_bytes(SECRET * 256)
    monkeypatch.chdir(tmp_path)
    referring(images, "data file", "data.raw")
    assert converted(Path("images/disk.qcow2"), images / "target.raw").startswith(PLAIN)


# Chains


@in_time
def test_an_image_that_backs_itself_is_refused_at_once(images: Path) -> None:
    image = images / "disk.qcow2"
    image.write_bytes(qcow2_images.empty_overlay("disk.qcow2", "qcow2"))
    error = refused(image)
    assert isinstance(error, ImageError)
    assert "loop" in str(error)


@in_time
def test_a_loop_of_two_images_is_refused_at_once(images: Path) -> None:
    (images / "a.qcow2").write_bytes(qcow2_images.empty_overlay("b.qcow2", "qcow2"))
    (images / "b.qcow2").write_bytes(qcow2_images.empty_overlay("a.qcow2", "qcow2"))
    error = refused(images / "a.qcow2")
    assert isinstance(error, ImageError)
    assert "loop" in str(error)


def test_a_loop_through_a_hard_link_is_refused(images: Path) -> None:
    (images / "a.qcow2").write_bytes(qcow2_images.empty_overlay("b.qcow2", "qcow2"))
    (images / "b.qcow2").hardlink_to(images / "a.qcow2")
    assert "loop" in str(refused(images / "a.qcow2"))


def make_chain(directory: Path, layers: int) -> Path:
    (directory / "0.raw").write_bytes(PLAIN)
    below, below_format = "0.raw", "raw"
    for number in range(1, layers):
        image = directory / f"{number}.qcow2"
        image.write_bytes(qcow2_images.empty_overlay(below, below_format))
        below, below_format = image.name, "qcow2"
    return directory / below


def test_the_longest_chain_that_is_allowed_is_read(images: Path) -> None:
    assert converted(make_chain(images, MAX_CHAIN_DEPTH), images / "target.raw") == PLAIN


def test_a_chain_that_is_longer_is_refused(images: Path) -> None:
    error = refused(make_chain(images, MAX_CHAIN_DEPTH + 1))
    assert isinstance(error, ImageError)
    assert str(MAX_CHAIN_DEPTH) in str(error)


@referrer
def test_a_missing_file_is_named_with_its_role(images: Path, role: str) -> None:
    error = refused(referring(images, role, "gone.raw"))
    assert isinstance(error, AccessError)
    assert "gone.raw" in str(error)
    assert role in str(error)


@referrer
def test_a_missing_file_whose_name_has_a_line_break_takes_one_line(images: Path, role: str) -> None:
    assert "all is well" in str(refused(referring(images, role, "gone\nvmconv: all is well")))


@referrer
@pytest.mark.parametrize("reference", ["", "base\0.raw", "\0"], ids=["empty", "with a zero byte", "zero byte"])
def test_a_reference_that_no_file_can_have_is_an_image_error(images: Path, role: str, reference: str) -> None:
    assert isinstance(refused(referring(images, role, reference)), ImageError)


# What is no file


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_directory(path: Path) -> None:
    path.mkdir()


def make_character_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


SPECIAL = {"a pipe": make_pipe, "a directory": make_directory, "a character device": make_character_device}


@in_time
@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_is_refused_as_source_without_waiting(images: Path, kind: str) -> None:
    SPECIAL[kind](images / "disk.raw")
    error = refused(images / "disk.raw")
    assert isinstance(error, AccessError)
    assert "neither a regular file nor a block device" in str(error)


@in_time
@referrer
@pytest.mark.parametrize("kind", ["a pipe", "a directory"])
def test_a_special_file_is_refused_when_an_image_names_it(images: Path, role: str, kind: str) -> None:
    SPECIAL[kind](images / "base.raw")
    assert isinstance(refused(referring(images, role, "base.raw")), AccessError)


def test_a_source_that_does_not_exist_is_named(images: Path) -> None:
    error = refused(images / "gone.raw")
    assert isinstance(error, AccessError)
    assert "gone.raw" in str(error)


# A guest that writes a header into its disk

hostile_name = pytest.mark.parametrize("name", ["disk.raw", "disk.img", "disk"])


@pytest.fixture
def guest_written() -> bytes:
    """A raw disk whose guest wrote a qcow2 header into it, which points to a file of the host."""
    return qcow2_images.empty_overlay("/etc/passwd", "raw", cluster_bits=16).ljust(1 << 20, b"\x77")


@hostile_name
def test_a_raw_disk_with_a_header_of_the_guest_s_is_refused(images: Path, guest_written: bytes, name: str) -> None:
    (images / name).write_bytes(guest_written)
    error = refused(images / name)
    assert isinstance(error, ImageError)
    assert "-f raw" in (error.hint or "")


@hostile_name
def test_a_raw_disk_with_a_header_of_the_guest_s_is_raw_when_the_user_says_so(
    images: Path, guest_written: bytes, name: str
) -> None:
    (images / name).write_bytes(guest_written)
    assert converted(images / name, images / "target.raw", source_format="raw") == guest_written


def test_a_raw_disk_with_a_header_of_the_guest_s_keeps_it_inside_a_qcow2(
    images: Path, guest_written: bytes, qemu_img: QemuImg
) -> None:
    (images / "disk.raw").write_bytes(guest_written)
    api.convert(str(images / "disk.raw"), str(images / "target.qcow2"), source_format="raw")
    qemu_img("compare", "-f", "raw", "-F", "qcow2", images / "disk.raw", images / "target.qcow2")


@hostile_name
def test_a_file_that_a_guest_s_header_names_is_never_opened(
    images: Path, guest_written: bytes, opened: list[str], name: str
) -> None:
    (images / name).write_bytes(guest_written)
    converted(images / name, images / "target.raw", source_format="raw", allow_external=["/"])
    assert str(images / name) in opened
    assert "/etc/passwd" not in opened


def test_a_raw_backing_file_with_a_header_of_the_guest_s_is_read_as_raw(
    images: Path, guest_written: bytes, opened: list[str]
) -> None:
    (images / "base.img").write_bytes(guest_written)
    (images / "disk.qcow2").write_bytes(qcow2_images.empty_overlay("base.img", cluster_bits=16))
    assert converted(images / "disk.qcow2", images / "target.raw", allow_external=["/"]) == guest_written
    assert "/etc/passwd" not in opened


def test_the_format_of_a_backing_file_is_not_guessed_from_a_guest_s_header(images: Path, guest_written: bytes) -> None:
    (images / "base.img").write_bytes(guest_written)
    (images / "disk.qcow2").write_bytes(qcow2_images.empty_overlay("base.img", None))
    assert isinstance(refused(images / "disk.qcow2"), ImageError)


def test_a_raw_data_file_with_a_header_of_the_guest_s_is_read_as_bytes(images: Path, guest_written: bytes) -> None:
    (images / "data.raw").write_bytes(guest_written)
    image = referring(images, "data file", "data.raw")
    assert converted(image, images / "target.raw").startswith(guest_written[: qcow2_images.CLUSTER])


# Formats that exist but are not installed


def at(offset: int, magic: bytes, size: int = 4096) -> Callable[[], bytes]:
    """Returns what makes a disk of text with `magic` at `offset`, which counts from the end when it is negative."""

    def make() -> bytes:
        data = bytearray(b"\x33" * size)
        place = offset if offset >= 0 else size + offset
        data[place : place + len(magic)] = magic
        return bytes(data)

    return make


FOREIGN = {
    "vmdk-sparse": ("vmdk", at(0, b"KDMV\1\0\0\0")),
    "vmdk-esx": ("vmdk", at(0, b"COWD\1\0\0\0")),
    "vmdk-descriptor": ("vmdk", at(0, b"# Disk DescriptorFile\nversion=1\n")),
    "vmdk-sesparse": ("vmdk", at(0, b"\xbe\xba\xfe\xca\0\0\0\0")),
    "vhdx": ("vhdx", at(0, b"vhdxfile")),
    "vhd-dynamic": ("vhd", at(0, b"conectix\0\0\0\2")),
    "vhd-fixed": ("vhd", at(-512, b"conectix\0\0\0\2")),
    "vhd-short-footer": ("vhd", at(-511, b"conectix\0\0\0\2")),
    "vdi": ("vdi", at(64, b"\x7f\x10\xda\xbe")),
    "parallels": ("parallels", at(0, b"WithoutFreeSpace")),
    "parallels-extended": ("parallels", at(0, b"WithouFreSpacExt")),
    "qed": ("qed", at(0, b"QED\0")),
    "qcow1": ("qcow", at(0, b"QFI\xfb\0\0\0\1")),
    "luks": ("luks", at(0, b"LUKS\xba\xbe\0\1")),
    "bochs": ("bochs", at(0, b"Bochs Virtual HD Image")),
    "cloop": ("cloop", at(0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop")),
    "dmg": ("dmg", at(-512, b"koly\0\0\0\4")),
    "asif": ("asif", at(0, b"shdw\0\0\0\1")),
    "sparseimage": ("sparseimage", at(0, b"sprs\0\0\0\3")),
    "uml-cow": ("uml-cow", at(0, b"OOOM\0\0\0\3")),
}
foreign = pytest.mark.parametrize("case", FOREIGN)


@pytest.fixture
def two_formats() -> Iterator[Opener]:
    """An opener that knows raw and qcow2 only, whatever else is installed here."""
    everything = installed()
    registry = Registry(formats={name: everything.formats[name] for name in ("raw", "qcow2")})
    with Opener(registry) as opener:
        yield opener


@foreign
@pytest.mark.parametrize("name", ["disk", "disk.img", "disk.raw"])
def test_a_format_that_is_not_installed_is_known_by_its_content(
    images: Path, two_formats: Opener, case: str, name: str
) -> None:
    format_name, make = FOREIGN[case]
    (images / name).write_bytes(make())
    with pytest.raises(ImageError, match=f"signature of {format_name}"):
        two_formats.image(str(images / name))


@foreign
def test_a_format_that_is_not_installed_says_what_to_install(images: Path, two_formats: Opener, case: str) -> None:
    format_name, make = FOREIGN[case]
    known = next(known for known in KNOWN if known.name == format_name)
    path = images / f"disk{known.suffixes[0]}"
    path.write_bytes(make())
    with pytest.raises(UsageError, match=f"format '{format_name}' is not installed") as caught:
        two_formats.image(str(path))
    assert (f"pip install {known.distribution}" if known.distribution else known.title) in (caught.value.hint or "")


@foreign
def test_info_does_not_take_a_format_that_is_not_installed_for_raw(
    images: Path, two_formats: Opener, case: str
) -> None:
    format_name, make = FOREIGN[case]
    (images / "disk").write_bytes(make())
    with pytest.raises(UsageError, match=f"format '{format_name}' is not installed"):
        two_formats.image(str(images / "disk"), content_decides=True)


@foreign
def test_a_disk_with_a_foreign_signature_is_raw_if_stated(images: Path, two_formats: Opener, case: str) -> None:
    _, make = FOREIGN[case]
    (images / "disk").write_bytes(make())
    assert two_formats.image(str(images / "disk"), "raw").size == len(make())


@pytest.mark.parametrize("suffix", [known.suffixes[0] for known in KNOWN if known.name != "raw"])
def test_a_name_that_speaks_of_a_format_without_its_signature_is_refused(
    images: Path, two_formats: Opener, suffix: str
) -> None:
    (images / f"disk{suffix}").write_bytes(PLAIN)
    with pytest.raises(ImageError, match="no signature of") as caught:
        two_formats.image(str(images / f"disk{suffix}"))
    assert "-f raw" in (caught.value.hint or "")
