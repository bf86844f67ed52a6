"""No two images have one id, unless the user says so; and an overlay is never read on another disk than its own."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk, qemu_io
from support.variants import Variant, has_identity, identified, make, options, self_contained, title
from vmconv.conversion.views import views
from vmconv.errors import ImageError, PlanError, UsageError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.model.identity import derived, fresh
from vmconv.model.view import View

SIZE = 8 * MIB
IDENTITY = "01234567-89ab-4cde-8f01-23456789abcd"
WITH_IDS = [variant for variant in self_contained() if has_identity(variant)]
BACKED = [("vmdk", "subformat=monolithicSparse"), ("vhd", ""), ("vhdx", ""), ("vdi", "")]
"""The formats with ids that can have a parent, in the subformat that can."""


def ids(image: Path) -> dict[str, str]:
    """Returns what an image states of itself that no other may state."""
    said = vmconv.info(str(image), allow_external=[str(image.parent)])
    facts = {**said["format-specific"]["data"], **said["disk"]}
    names = ("identity", "cid", "long-content-id", "data-write-guid", "file-write-guid", "modification-uuid")
    return {name: str(facts[name]) for name in names if facts.get(name) is not None}


def files(image: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(image.parent.iterdir())}


@pytest.mark.parametrize("variant", WITH_IDS, ids=title)
def test_each_conversion_makes_ids_of_its_own(tmp_path: Path, variant: Variant) -> None:
    raw = make_disk(tmp_path / "disk.raw", SIZE)
    one, other = (ids(make(raw, variant, tmp_path / name)) for name in folders(tmp_path, "one", "other"))
    assert one.keys() == other.keys()
    assert one
    assert not one.items() & other.items()


def folders(directory: Path, *names: str) -> Iterator[str]:
    """Makes directories and yields their names."""
    for name in names:
        (directory / name).mkdir()
        yield name


@pytest.mark.parametrize("variant", self_contained(), ids=title)
def test_the_same_identity_gives_the_same_image(tmp_path: Path, variant: Variant) -> None:
    raw = make_disk(tmp_path / "disk.raw", SIZE)
    made = []
    for name in folders(tmp_path, "one", "again", "other"):
        target = tmp_path / name / f"disk{installed().formats[variant[0]].suffixes[0]}"
        wanted = IDENTITY if name != "other" else str(UUID(int=1))
        vmconv.convert(str(raw), str(target), target_format=variant[0], options=identified(variant, wanted))
        made.append(target)
    one, again, other = map(files, made)
    assert one == again
    assert (one == other) is not has_identity(variant)
    if has_identity(variant):
        assert ids(made[0])["identity"] == IDENTITY


def test_an_image_of_an_image_has_an_identity_of_its_own(tmp_path: Path) -> None:
    raw = make_disk(tmp_path / "disk.raw", SIZE)
    for (name, option), (target, _) in itertools.product(BACKED, BACKED):
        image = tmp_path / f"disk.{name}"
        vmconv.convert(str(raw), str(image), options=identified((name, option)), target_format=name, force=True)
        path = tmp_path / f"copy.{target}"
        result = vmconv.convert(str(image), str(path), force=True)
        assert not any("identity" in loss for loss in result.losses), (name, target)
        assert not set(ids(image).values()) & set(ids(path).values())
        vmconv.convert(str(image), str(path), options={"identity": IDENTITY}, force=True)
        assert ids(path)["identity"] == IDENTITY
    assert any("identity" in loss for loss in vmconv.plan(str(image), str(tmp_path / "copy.qcow2")).losses)


def chain(directory: Path, qemu_img: QemuImg) -> Path:
    """Returns the top of three layers, the base raw."""
    make_disk(directory / "base.raw", SIZE)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", directory / "middle.qcow2")
    qemu_io(directory / "middle.qcow2", "write -P 1 1M 64k")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", directory / "top.qcow2")
    qemu_io(directory / "top.qcow2", "write -P 2 2M 64k")
    return directory / "top.qcow2"


@pytest.mark.parametrize("variant", BACKED, ids=title)
@pytest.mark.parametrize("identity", [None, IDENTITY], ids=str)
def test_each_layer_has_ids_of_its_own(
    tmp_path: Path, qemu_img: QemuImg, variant: Variant, identity: str | None
) -> None:
    top = chain(tmp_path, qemu_img)
    target = tmp_path / f"top.{variant[0]}"
    given = options(variant) if identity is None else identified(variant, identity)
    vmconv.convert(str(top), str(target), chain=True, options=given)
    layers = [tmp_path / f"{name}.{variant[0]}" for name in ("base", "middle", "top")]
    stated = [ids(layer) for layer in layers]
    if variant[0] == "vhdx":
        # The id that the guest sees is that of the base.
        assert len({each.pop("identity") for each in stated}) == 1
    elif identity is not None:
        assert stated[-1]["identity"] == identity
    found = [set(each.values()) for each in stated]
    assert all(not one & other for one, other in itertools.combinations(found, 2))
    assert vmconv.compare(str(top), str(target))
    if identity is not None:
        before = [layer.read_bytes() for layer in layers]
        vmconv.convert(str(top), str(target), chain=True, options=given, force=True)
        assert [layer.read_bytes() for layer in layers] == before


@pytest.mark.parametrize("variant", BACKED, ids=title)
@pytest.mark.parametrize("exchanged", ["other disk", "same disk", "middle"])
def test_an_overlay_on_an_exchanged_base_is_refused(
    tmp_path: Path, qemu_img: QemuImg, variant: Variant, exchanged: str
) -> None:
    top = chain(tmp_path, qemu_img)
    target = tmp_path / f"top.{variant[0]}"
    vmconv.convert(str(top), str(target), chain=True)
    vmconv.convert(str(target), str(tmp_path / "right.raw"))
    other = make_disk(tmp_path / "other.raw", SIZE, seed=1)
    # The same disk: nobody knows whether it was written to meanwhile.
    source = other if exchanged == "other disk" else tmp_path / "base.raw"
    below = "middle" if exchanged == "middle" else "base"
    vmconv.convert(str(source), str(tmp_path / f"{below}.{variant[0]}"), force=True)
    before = sorted(path.name for path in tmp_path.iterdir())
    for ask in (
        lambda: vmconv.convert(str(target), str(tmp_path / "wrong.raw")),
        lambda: vmconv.compare(str(target), str(top)),
        lambda: vmconv.map_disk(str(target)),
        lambda: vmconv.convert(str(target), str(tmp_path / f"new.{variant[0]}"), chain=True),
    ):
        with pytest.raises(ImageError) as caught:
            ask()
        assert "\n" not in str(caught.value)
        assert caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_fanout_gives_each_image_an_identity_of_its_own(tmp_path: Path) -> None:
    raw = make_disk(tmp_path / "disk.raw", SIZE)
    names = [name for name, _ in BACKED]
    vmconv.fanout(str(raw), names, directory=str(tmp_path))
    found = [set(ids(tmp_path / f"disk.{name}").values()) for name in names]
    assert all(found)
    assert all(not one & other for one, other in itertools.combinations(found, 2))


# -- what is only read


def viewed(image: Path, name: str, given: dict[str, str], snapshot: str | None = None) -> bytes:
    """Returns the metadata at the beginning and end of an image as it is viewed."""
    with Opener(installed()) as opener:
        found = views(opener.image(str(image), snapshot=snapshot), installed().formats[name], given, "disk")
        return b"".join(ends(view) for view in found.values())


def ends(view: View) -> bytes:
    return view.read(0, min(view.size, 4 * MIB)) + view.read(max(0, view.size - 512), min(view.size, 512))


@pytest.mark.parametrize("variant", [v for v in WITH_IDS if "stream" not in v[1]], ids=title)
def test_a_view_stays_the_same_until_the_source_changes(tmp_path: Path, variant: Variant) -> None:
    raw = make_disk(tmp_path / "disk.raw", SIZE)
    name, given = variant[0], options(variant)
    first = viewed(raw, name, given)
    assert viewed(raw, name, given) == first
    other = make_disk(tmp_path / "other.raw", SIZE)
    assert viewed(other, name, given) != first
    os.utime(raw)
    assert viewed(raw, name, given) != first
    assert viewed(raw, name, {**given, "identity": IDENTITY}) == viewed(other, name, {**given, "identity": IDENTITY})


def test_variants_and_snapshots_of_one_image_are_viewed_with_ids_of_their_own(
    tmp_path: Path, qemu_img: QemuImg
) -> None:
    raw, image = make_disk(tmp_path / "disk.raw", SIZE), tmp_path / "disk.qcow2"
    vmconv.convert(str(raw), str(image))
    qemu_img("snapshot", "-c", "before", image)
    qemu_io(image, "write -P 1 0 1M")
    uuid = slice(392, 408)
    now, then = viewed(image, "vdi", {})[uuid], viewed(image, "vdi", {}, "before")[uuid]
    assert len({now, then, viewed(image, "vdi", {"static": "on"})[uuid]}) == 3


def test_each_stream_has_new_ids_by_default(tmp_path: Path) -> None:
    raw = make_disk(tmp_path / "disk.raw", SIZE)

    def streamed(*flags: str) -> bytes:
        command = [sys.executable, "-m", "vmconv", "convert", "-q", "-O", "vdi", *flags, str(raw), "-"]
        return subprocess.run(command, capture_output=True, check=True, timeout=600).stdout

    assert streamed() != streamed()
    assert streamed("-o", f"identity={IDENTITY}") == streamed("-o", f"identity={{{IDENTITY.upper()}}}")


# -- in place


def test_in_place_and_back_gives_new_ids_and_undo_the_old_ones(ext4_dir: Path) -> None:
    raw = make_disk(ext4_dir / "disk.raw", SIZE)
    image, other = ext4_dir / "disk.vmdk", ext4_dir / "disk.qcow2"
    vmconv.convert(str(raw), str(image))
    before, stated = image.read_bytes(), ids(image)
    vmconv.convert(str(image), str(other), in_place=True)
    vmconv.convert(str(other), str(image), in_place=True)
    assert not ids(image).items() & stated.items()
    assert vmconv.compare(str(raw), str(image))
    image.write_bytes(before)
    vmconv.convert(str(image), str(image), in_place=True, keep_undo=True)
    assert not ids(image).items() & stated.items()
    vmconv.undo(str(image))
    assert image.read_bytes() == before


# -- the option, and what ids are made of


@pytest.mark.parametrize("value", ["", "1234", IDENTITY[:-1], f"{IDENTITY}0", "x" * 36, str(UUID(int=0))])
def test_an_invalid_uuid_is_refused_by_name_and_value(tmp_path: Path, value: str) -> None:
    raw = make_disk(tmp_path / "disk.raw", SIZE)
    with pytest.raises(UsageError, match=rf"vdi option identity={value}: "):
        vmconv.convert(str(raw), str(tmp_path / "disk.vdi"), options={"identity": value})
    with pytest.raises(UsageError, match="qcow2 has no option 'identity'"):
        vmconv.convert(str(raw), str(tmp_path / "disk.qcow2"), options={"identity": IDENTITY})


@pytest.mark.parametrize("value", [UUID(IDENTITY), IDENTITY.replace("-", ""), UUID(IDENTITY).bytes], ids=str)
def test_a_uuid_is_taken_in_each_of_its_shapes(tmp_path: Path, value: Any) -> None:
    raw = make_disk(tmp_path / "disk.raw", SIZE)
    vmconv.convert(str(raw), str(tmp_path / "disk.vdi"), options={"identity": value})
    assert ids(tmp_path / "disk.vdi")["identity"] == IDENTITY


def test_ids_are_uuids() -> None:
    one = fresh()
    assert (UUID(bytes=one).version, UUID(bytes=derived(one, "a")).version) == (4, 8)
    assert len({one, fresh(), derived(one, "a"), derived(one, "b"), derived(fresh(), "a")}) == 5


def test_a_parent_without_an_identity_cannot_be_named(tmp_path: Path, qemu_img: QemuImg) -> None:
    top = chain(tmp_path, qemu_img)
    with pytest.raises(PlanError, match="parent"):
        vmconv.convert(str(top), str(tmp_path / "top.vhd"), backing_file="base.raw")
