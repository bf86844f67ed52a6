"""Parents that moved: named by the user, or found by their identity; never another disk in silence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import vmconv
from support.disks import MIB, make_disk
from support.mounting import mounted
from support.nbd import served
from vmconv.cli.main import main
from vmconv.errors import AccessError, ImageError, PlanError, UsageError, VmconvError

KNOWING = ["vhd", "vhdx", "vmdk", "vdi"]
"""Formats that know their parent by an id."""
NAMING = ["qcow2", "qed"]
SIZE = 4 * MIB

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", SIZE, pieces=8)


def chain(disk: Path, format_name: str, layers: int = 2) -> list[Path]:
    """Returns empty layers on an image of the disk, the base first, all in one directory."""
    first, folder = disk.parent / "first", disk.parent / "images"
    first.mkdir()
    folder.mkdir()
    made = [first / "0.qcow2"]
    vmconv.convert(disk, made[0])
    for number in range(1, layers):
        made.append(first / f"{number}.qcow2")
        vmconv.create(made[-1], backing_file=made[-2].name)
    named = [folder / f"{one.stem}.{format_name}" for one in made]
    vmconv.convert(made[-1], named[-1], chain=True)
    return named


def moved(path: Path, name: str = "elsewhere/moved") -> Path:
    """Renames a file, to a directory that no image names."""
    target = path.parent.parent / f"{name}{path.suffix}"
    target.parent.mkdir(exist_ok=True)
    return path.rename(target)


@pytest.mark.parametrize("name", [*KNOWING, *NAMING])
def test_a_parent_elsewhere_is_named(disk: Path, name: str) -> None:
    base, child = chain(disk, name)
    away = moved(base)
    with pytest.raises(VmconvError):
        vmconv.convert(child, disk.parent / "new.raw")
    vmconv.convert(child, disk.parent / "new.raw", parents=[away])
    assert (disk.parent / "new.raw").read_bytes() == disk.read_bytes()
    assert vmconv.compare(child, disk, parents=[away])
    assert vmconv.prove(child, disk, parents=[away]) is not None
    assert vmconv.check(child, parents=[away]) is not None
    assert vmconv.map_disk(child, parents=[away])[0].depth == 1
    assert vmconv.measure("raw", child, parents=[away]).required == SIZE
    assert vmconv.info(child, parents=[away])["format"] == name


@pytest.mark.parametrize("name", [*KNOWING, *NAMING])
def test_a_sync_from_a_layer_takes_its_parent_elsewhere(disk: Path, name: str) -> None:
    base, child = chain(disk, name)
    target = disk.parent / "target.raw"
    vmconv.convert(child, target)
    away = moved(base)
    with pytest.raises(VmconvError):
        vmconv.sync(child, target)
    vmconv.sync(child, target, parents=[away])
    assert target.read_bytes() == disk.read_bytes()
    with pytest.raises(UsageError, match="no layer takes it"):
        vmconv.sync(child, target, parents=[away, disk])


@pytest.mark.parametrize("name", [*KNOWING, *NAMING])
def test_a_rebase_takes_the_old_parent_elsewhere(disk: Path, name: str) -> None:
    base, child = chain(disk, name)
    empty = base.with_name(f"empty.{name}")
    vmconv.create(empty, SIZE)
    away = moved(base)
    with pytest.raises(VmconvError):
        vmconv.rebase(child, empty.name)
    with pytest.raises(UsageError, match="no layer takes it"):
        vmconv.rebase(child, empty.name, parents=[away, disk])
    assert main(["rebase", "-q", "-b", empty.name, "--parent", str(away), str(child)]) == 0
    assert vmconv.compare(child, disk)
    assert main(["rebase", "-u", "-b", empty.name, "--parent", str(away), str(child)]) == 2


@pytest.mark.parametrize("command", [["resize", "+1M"], ["commit"], ["convert", "new.raw"], ["rebase", "-b", ""]])
def test_the_hint_names_an_option_that_the_command_has(disk: Path, command: list[str], capsys: Capture) -> None:
    base, child = chain(disk, "qcow2")
    moved(base)
    assert main([command[0], str(child), *command[1:]]) == 1
    hint = capsys.readouterr().err.partition("hint: ")[2]
    assert "rebase -u" in hint and ("--parent" in hint) == (command[0] in ("convert", "rebase"))


@pytest.mark.parametrize("name", NAMING)
def test_it_is_said_that_no_identity_tells(disk: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    base, child = chain(disk, name)
    away = moved(base)
    assert main(["convert", "-q", "--parent", str(away), str(child), str(disk.parent / "new.raw")]) == 0
    said = caplog.text
    assert f"backing file '{base.name}' does not exist: using {away}, a disk of {SIZE} bytes; no identity" in said


@pytest.mark.parametrize("name", KNOWING)
def test_another_disk_is_refused_by_its_identity(disk: Path, name: str) -> None:
    base, child = chain(disk, name)
    moved(base)
    other = disk.parent / f"other.{name}"
    vmconv.convert(disk, other)
    with pytest.raises(ImageError, match="other"):
        vmconv.convert(child, disk.parent / "new.raw", parents=[other])
    assert not (disk.parent / "new.raw").exists()


@pytest.mark.parametrize("name", KNOWING)
def test_a_renamed_parent_is_found_by_its_identity(disk: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    base, child = chain(disk, name)
    # Others of the format in the directory, one of them damaged.
    vmconv.convert(disk, base.with_name(f"a.{name}"))
    base.with_name(f"b.{name}").write_bytes(b"damaged" * 1000)
    renamed = base.rename(base.with_name(f"renamed.{name}"))
    assert main(["convert", "-q", str(child), str(disk.parent / "new.raw")]) == 0
    assert (disk.parent / "new.raw").read_bytes() == disk.read_bytes()
    if name != "vdi":
        assert f"using {renamed}, which has its identity" in caplog.text


@pytest.mark.parametrize("name", KNOWING)
def test_two_with_the_identity_are_refused_until_one_is_named(disk: Path, name: str) -> None:
    base, child = chain(disk, name)
    renamed = base.rename(base.with_name(f"renamed.{name}"))
    copy = Path(shutil.copy(renamed, base.with_name(f"copy.{name}")))
    with pytest.raises(ImageError, match="both have the") as caught:
        vmconv.convert(child, disk.parent / "new.raw")
    assert "--parent" in (caught.value.hint or "")
    vmconv.convert(child, disk.parent / "new.raw", parents=[copy])
    assert (disk.parent / "new.raw").read_bytes() == disk.read_bytes()


@pytest.mark.parametrize("name", ["vhd", "vhdx", "vmdk"])
def test_another_disk_under_the_name_is_passed_over(disk: Path, name: str) -> None:
    base, child = chain(disk, name)
    away = moved(base)
    vmconv.convert(disk, base)
    with pytest.raises(ImageError, match=base.name):
        vmconv.convert(child, disk.parent / "new.raw")
    vmconv.convert(child, disk.parent / "new.raw", parents=[away])
    assert (disk.parent / "new.raw").read_bytes() == disk.read_bytes()


@pytest.mark.parametrize("name", [*KNOWING, *NAMING])
def test_it_is_the_parent_of_the_layer_that_lacks_one(disk: Path, name: str) -> None:
    base, _, top = chain(disk, name, layers=3)
    away = moved(base)
    vmconv.convert(top, disk.parent / "new.raw", parents=[away])
    assert (disk.parent / "new.raw").read_bytes() == disk.read_bytes()


@pytest.mark.parametrize("name", [*KNOWING, *NAMING])
def test_each_layer_takes_the_next(disk: Path, name: str) -> None:
    base, middle, top = chain(disk, name, layers=3)
    low, high = moved(base, "a/low"), moved(middle, "b/high")
    vmconv.convert(top, disk.parent / "new.raw", parents=[high, low])
    assert (disk.parent / "new.raw").read_bytes() == disk.read_bytes()
    with pytest.raises(VmconvError):
        vmconv.convert(top, disk.parent / "other.raw", parents=[high])


@pytest.mark.parametrize("name", ["qcow2", "vhdx"])
def test_a_parent_that_no_layer_lacks_is_refused(disk: Path, name: str) -> None:
    base, child = chain(disk, name)
    copy = Path(shutil.copy(base, disk.parent / f"copy.{name}"))
    for call in (vmconv.info, vmconv.check, vmconv.map_disk):
        with pytest.raises(UsageError, match="no layer takes it as its parent"):
            call(child, parents=[copy])
    with pytest.raises(UsageError, match="no layer takes it as its parent"):
        vmconv.convert(child, disk.parent / "new.raw", parents=[copy])
    with pytest.raises(UsageError, match="no layer takes it as its parent"):
        vmconv.compare(child, disk, parents=[copy])


def test_a_compared_pair_may_lack_a_parent_each(disk: Path) -> None:
    base, child = chain(disk, "qcow2")
    other = child.with_name("other.qcow2")
    vmconv.create(other, backing_file=base.name)
    away = moved(base)
    with pytest.raises(AccessError):
        vmconv.compare(child, other)
    assert vmconv.compare(child, disk, parents=[away])


def test_the_name_of_a_lost_parent_is_not_followed(disk: Path) -> None:
    base, child = chain(disk, "qcow2")
    vmconv.rebase(child, "json:{}", unsafe=True, backing_format="qcow2")
    with pytest.raises(AccessError, match="not a plain file name"):
        vmconv.convert(child, disk.parent / "new.raw")
    vmconv.convert(child, disk.parent / "new.raw", parents=[base])
    assert (disk.parent / "new.raw").read_bytes() == disk.read_bytes()


def test_a_loop_by_the_option_is_refused(disk: Path) -> None:
    base, child = chain(disk, "qcow2")
    base.unlink()
    os.link(child, child.with_name("again.qcow2"))
    with pytest.raises(ImageError, match="a loop"):
        vmconv.convert(child, disk.parent / "new.raw", parents=[child.with_name("again.qcow2")])


def test_a_moved_name_beside_the_image_is_in_the_hint(disk: Path) -> None:
    base, child = chain(disk, "qcow2")
    vmconv.rebase(child, f"/nowhere/{base.name}", unsafe=True, backing_format="qcow2")
    with pytest.raises(AccessError) as caught:
        vmconv.convert(child, disk.parent / "new.raw")
    assert f"--parent {base}" in (caught.value.hint or "")
    vmconv.convert(child, disk.parent / "new.raw", parents=[base])


def test_many_images_have_no_parent_in_common(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, child = chain(disk, "qcow2")
    away, folder = str(moved(base)), str(disk.parent / "out")
    assert main(["convert", "--parent", away, "-O", "raw", "--directory", folder, str(child)]) == 2
    assert "--parent is for a single disk" in capfd.readouterr().err
    assert main(["serve", "--writable", "--parent", away, str(child)]) == 2
    assert "vmconv rebase -u" in capfd.readouterr().err
    point = disk.parent / "point"
    point.mkdir()
    assert main(["mount", "--parent", away, str(child.parent), str(point)]) == 2
    assert "--parent is for one image" in capfd.readouterr().err


@pytest.mark.parametrize("name", [*KNOWING, *NAMING])
def test_a_base_with_a_child_beside_it_says_so(disk: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    base, child = chain(disk, name)
    assert main(["info", str(base)]) == 0
    assert f"has a child: {child.name} refers to it" in capfd.readouterr().out
    assert main(["info", "--output", "json", str(base)]) == 0
    assert json.loads(capfd.readouterr().out)["child"] == vmconv.info(base)["child"] == child.name
    assert "child" not in vmconv.info(child)
    with pytest.raises(VmconvError, match=child.name):
        vmconv.convert(base, base.with_name("new.raw"), in_place=True)
    found = vmconv.convert(disk, base, force=True)
    assert f"{child.name} refers to {base.name}, which will be another image" in "".join(found.warnings)
    child.unlink()
    assert not [text for text in vmconv.convert(disk, base, force=True).warnings if "refers to" in text]


def test_a_view_of_an_image_without_its_parent(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    base, child = chain(disk, "vhdx")
    away = str(moved(base))
    with served(child, "--parent", away) as running:
        shown = subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", running.uri, str(disk)], check=False)
        assert shown.returncode == 0
    point = tmp_path_factory.mktemp("point")
    # The process that mounts leaves its directory.
    with mounted(child, point, "--parent", os.path.relpath(away)):
        shown_as = point / child.name / "raw" / f"{child.stem}.raw"
        assert shown_as.read_bytes() == disk.read_bytes()


def test_an_export_refuses_a_parent_that_nothing_lacks(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, child = chain(disk, "qcow2")
    other = disk.parent / "other.qcow2"
    vmconv.convert(disk, other)
    assert main(["serve", "--parent", str(other), "--socket", str(disk.parent / "s"), str(child)]) == 2
    assert "no layer takes it as its parent" in capfd.readouterr().err
    assert base.exists()


@pytest.mark.parametrize(("name", "how"), [("qcow2", "named"), ("vhdx", "named"), ("vhdx", "found")])
def test_nothing_is_made_on_a_layer_that_others_could_not_read(disk: Path, name: str, how: str) -> None:
    base, middle, top = chain(disk, name, layers=3)
    away = moved(base) if how == "named" else base.rename(base.with_name(f"renamed.{name}"))
    given = [away] if how == "named" else []
    with pytest.raises(PlanError, match=f"{middle.name}: stays below the target") as caught:
        vmconv.convert(top, top.with_name(f"new.{name}"), backing_file=middle.name, parents=given)
    assert "vmconv rebase -u" in (caught.value.hint or "")
    if name == "qcow2":
        with pytest.raises(PlanError, match="stays below the target"):
            vmconv.convert(top, top.with_name("new.qcow2"), options={"subformat": "reference"}, parents=given)
    # The parent itself can stay: the new image names it where it is.
    target = away.with_name(f"on it.{name}")
    vmconv.convert(top, target, backing_file=away.name, parents=given)
    assert vmconv.compare(target, disk)


def test_a_lost_parent_has_a_hint(disk: Path) -> None:
    base, child = chain(disk, "qcow2")
    moved(base)
    with pytest.raises(AccessError) as caught:
        vmconv.convert(child, disk.parent / "new.raw")
    assert "--parent FILE" in (caught.value.hint or "")


@pytest.mark.malformed
def test_a_search_that_takes_long_is_ended(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, child = chain(disk, "vmdk")
    base.rename(base.with_name("renamed.vmdk"))
    monkeypatch.setattr("vmconv.io.opener.MAX_SEARCH_SECONDS", -1.0)
    with pytest.raises(ImageError, match="search for its parent has ended") as caught:
        vmconv.convert(child, disk.parent / "new.raw")
    assert "--parent" in (caught.value.hint or "")
    # A parent under its name needs no search.
    vmconv.convert(child, disk.parent / "new.raw", parents=[base.with_name("renamed.vmdk")])
