"""A file in the snapshots of its filesystem: real Btrfs, in the layouts of Snapper, Timeshift and btrbk."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk
from vmconv.cli.main import main
from vmconv.errors import AccessError, UsageError
from vmconv.io.snapshots import in_snapshot

Capture = pytest.CaptureFixture[str]

INFO = """<?xml version="1.0"?>
<snapshot>
  <type>single</type>
  <num>{number}</num>
  <date>2026-11-{day:02} 10:00:00</date>
  <description>timeline</description>
</snapshot>
"""


def btrfs(*arguments: object) -> None:
    subprocess.run(["btrfs", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture
def top(btrfs_dir: Path) -> Iterator[Path]:
    """A directory on Btrfs with the subvolume `vm`, in it `disk.raw`; its subvolumes are removed at the end."""
    btrfs("subvolume", "create", btrfs_dir / "vm")
    make_disk(btrfs_dir / "vm" / "disk.raw", 4 * MIB, pieces=3)
    yield btrfs_dir
    for directory, names, _ in os.walk(btrfs_dir):
        for name in list(names):
            path = Path(directory, name)
            if not path.is_symlink() and path.stat().st_ino == 256:
                names.remove(name)
                _remove(path)


def _remove(subvolume: Path) -> None:
    subprocess.run(["btrfs", "property", "set", "-ts", subvolume, "ro", "false"], check=True)
    for directory, names, _ in os.walk(subvolume):
        for name in list(names):
            path = Path(directory, name)
            if not path.is_symlink() and path.stat().st_ino == 256:
                names.remove(name)
                _remove(path)
    btrfs("subvolume", "delete", subvolume)


Keep = Callable[[Path, str], Path]


def snapper(subvolume: Path, when: str) -> Path:
    number = int(when)
    directory = subvolume / ".snapshots" / when
    directory.mkdir(parents=True)
    (directory / "info.xml").write_text(INFO.format(number=number, day=number))
    btrfs("subvolume", "snapshot", "-r", subvolume, directory / "snapshot")
    return directory / "snapshot"


def btrbk(subvolume: Path, when: str) -> Path:
    directory = subvolume.parent / "btrbk_snapshots"
    directory.mkdir(exist_ok=True)
    btrfs("subvolume", "snapshot", "-r", subvolume, directory / f"{subvolume.name}.202611{int(when):02}T1000")
    return directory / f"{subvolume.name}.202611{int(when):02}T1000"


def timeshift(subvolume: Path, when: str) -> Path:
    directory = subvolume.parent / "timeshift-btrfs" / "snapshots" / f"2026-11-{int(when):02}_10-00-00"
    directory.mkdir(parents=True)
    btrfs("subvolume", "snapshot", "-r", subvolume, directory / subvolume.name)
    return directory / subvolume.name


LAYOUTS = [snapper, btrbk, timeshift]


@pytest.fixture(params=LAYOUTS, ids=[layout.__name__ for layout in LAYOUTS])
def keep(request: pytest.FixtureRequest) -> Keep:
    kept: Keep = request.param
    return kept


def rewrite(path: Path, seed: int) -> bytes:
    make_disk(path, 4 * MIB, pieces=3, seed=seed)
    return path.read_bytes()


def test_the_newest_snapshot_is_shared_from(top: Path, keep: Keep, capsys: Capture) -> None:
    live = top / "vm" / "disk.raw"
    # In an order that is neither of names nor of inodes.
    content = {}
    for when in ("9", "11", "10"):
        content[when] = rewrite(live, int(when))
        keep(top / "vm", when)
    rewrite(live, 99)
    target = top / "new.raw"
    assert main(["convert", "--from-snapshot", "newest", "--zero-copy=require", str(live), str(target)]) == 0
    assert target.read_bytes() == content["11"]
    said = capsys.readouterr()
    assert "from the snapshot " in said.err
    assert "of 2026-11-11" in said.err
    found = in_snapshot(str(live), "newest")
    assert vmconv.prove(found.path, target)


def test_a_snapshot_is_chosen_by_name_and_by_date(top: Path, keep: Keep) -> None:
    live = top / "vm" / "disk.raw"
    content = {when: (rewrite(live, int(when)), keep(top / "vm", when))[0] for when in ("9", "10", "11")}
    newest = in_snapshot(str(live), "newest")
    named = in_snapshot(str(live), "2026-11-10")
    assert named == in_snapshot(str(live), named.name)
    assert named != newest
    assert Path(named.path).read_bytes() == content["10"]
    with pytest.raises(AccessError, match="no snapshot '2026-01-01' has it") as caught:
        in_snapshot(str(live), "2026-01-01")
    assert str(newest) in str(caught.value.hint)


def test_a_moment_is_a_whole_date_minute_or_second(top: Path, keep: Keep) -> None:
    live = top / "vm" / "disk.raw"
    rewrite(live, 1)
    keep(top / "vm", "10")
    found = in_snapshot(str(live), "newest")
    second = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.made))
    for wanted in (second, second[:16], second[:10]):
        assert in_snapshot(str(live), wanted) == found
    for wanted in (second[:18], second[:15], second[:13], second[:11], f"{second[:14]}59"):
        with pytest.raises(AccessError, match="no snapshot"):
            in_snapshot(str(live), wanted)
    with pytest.raises(UsageError, match="--from-snapshot: no snapshot is named") as caught:
        in_snapshot(str(live), "")
    assert caught.value.exit_code == 2


def test_a_file_that_was_deleted_is_found(top: Path, keep: Keep) -> None:
    live = top / "vm" / "disk.raw"
    content = live.read_bytes()
    keep(top / "vm", "5")
    live.unlink()
    keep(top / "vm", "6")
    vmconv.convert(live, top / "new.qcow2", from_snapshot="newest", zero_copy="require")
    vmconv.convert(top / "new.qcow2", top / "back.raw")
    assert (top / "back.raw").read_bytes() == content
    assert vmconv.info(live, from_snapshot="newest")["virtual-size"] == 4 * MIB
    assert vmconv.plan(live, top / "plan.qcow2", from_snapshot="newest").totals.copied == 0


def test_layers_come_from_the_snapshot_too(top: Path, keep: Keep, qemu_img: QemuImg) -> None:
    base, overlay = top / "vm" / "disk.raw", top / "vm" / "top.qcow2"
    content = base.read_bytes()
    qemu_img("create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", overlay)
    keep(top / "vm", "5")
    rewrite(base, 7)
    vmconv.convert(overlay, top / "new.raw", from_snapshot="newest")
    assert (top / "new.raw").read_bytes() == content


def test_a_snapshot_that_can_be_written_does_not_count(top: Path, keep: Keep) -> None:
    root = keep(top / "vm", "5")
    subprocess.run(["btrfs", "property", "set", "-ts", root, "ro", "false"], check=True)
    with pytest.raises(AccessError, match="no read-only snapshot"):
        in_snapshot(str(top / "vm" / "disk.raw"), "newest")


def test_a_link_of_a_stranger_is_not_followed(top: Path, keep: Keep) -> None:
    live, private = top / "vm" / "disk.raw", top / "private"
    private.mkdir()
    (private / "disk.raw").write_bytes(b"secret" * 1000)
    link = top / "vm" / "linked.raw"
    link.symlink_to(private / "disk.raw")
    root = keep(top / "vm", "5")
    with pytest.raises(AccessError, match="no read-only snapshot"):
        in_snapshot(str(link), "newest")
    _remove(root)
    btrfs("subvolume", "snapshot", "-r", top / "vm", private / "snapshot")
    root.symlink_to(private / "snapshot")
    with pytest.raises(AccessError, match="no read-only snapshot"):
        in_snapshot(str(live), "newest")


def test_a_snapshot_of_another_filesystem_does_not_count(top: Path, xfs_dir: Path) -> None:
    live = xfs_dir / "disk.raw"
    make_disk(live, MIB, pieces=1)
    directory = xfs_dir / ".snapshots" / "1"
    (directory / "snapshot").mkdir(parents=True)
    (directory / "info.xml").write_text(INFO.format(number=1, day=1))
    btrfs("subvolume", "snapshot", "-r", top / "vm", top / "other")
    subprocess.run(["mount", "--bind", top / "other", directory / "snapshot"], check=True)
    try:
        with pytest.raises(AccessError, match="no read-only snapshot"):
            in_snapshot(str(live), "newest")
    finally:
        subprocess.run(["umount", directory / "snapshot"], check=True)


def test_timeshift_is_found_where_the_top_of_the_filesystem_is_mounted(top: Path, tmp_path: Path) -> None:
    # A system has its subvolume at /, and the top elsewhere.
    timeshift(top / "vm", "5")
    rest = tmp_path / "mounted"
    rest.mkdir()
    subprocess.run(["mount", "--bind", top / "vm", rest], check=True)
    try:
        found = in_snapshot(str(rest / "disk.raw"), "newest")
        assert found.layout == "Timeshift"
        assert os.path.samefile(found.path, top / "timeshift-btrfs/snapshots/2026-11-05_10-00-00/vm/disk.raw")
    finally:
        subprocess.run(["umount", rest], check=True)


def test_names_that_are_no_snapshots_do_not_count(top: Path) -> None:
    for name in ("vm.2026", "vm.20269999", "vm.20261105T1000.bak", "vmx.20261105"):
        btrfs("subvolume", "snapshot", "-r", top / "vm", top / name)
    (top / "vm" / ".snapshots" / "1" / "snapshot").mkdir(parents=True)
    with pytest.raises(AccessError, match="no read-only snapshot"):
        in_snapshot(str(top / "vm" / "disk.raw"), "newest")


def test_a_snapshot_is_not_changed_in_place(top: Path) -> None:
    snapper(top / "vm", "5")
    live = top / "vm" / "disk.raw"
    with pytest.raises(UsageError, match="a snapshot is never changed"):
        vmconv.convert(live, top / "vm" / "new.qcow2", in_place=True, from_snapshot="newest")
    command = ["convert", "--in-place", "--from-snapshot", "newest", str(live), str(top / "vm" / "new.qcow2")]
    assert main(command) == 2


@pytest.mark.parametrize("read_only", [False, True])
def test_blocks_are_shared_across_bind_mounts(reflink_dir: Path, tmp_path: Path, read_only: bool) -> None:
    raw = make_disk(reflink_dir / "disk.raw", 4 * MIB)
    other = tmp_path / "mounted"
    other.mkdir()
    subprocess.run(["mount", "--bind", reflink_dir, other], check=True)
    try:
        if read_only:
            subprocess.run(["mount", "-o", "remount,bind,ro", other], check=True)
        vmconv.convert(other / "disk.raw", reflink_dir / "new.qcow2", zero_copy="require")
    finally:
        subprocess.run(["umount", other], check=True)
    assert vmconv.prove(raw, reflink_dir / "new.qcow2")


def test_an_old_kernel_s_limit_of_one_mount_is_named(reflink_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from vmconv.system import linux

    raw = make_disk(reflink_dir / "disk.raw", MIB)

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(linux, "clone_range", refuse)
    plan = vmconv.plan(raw, reflink_dir / "new.qcow2")
    assert "Linux before 5.18 shares within one mount" in plan.copies[0].reason


def test_a_machine_is_converted_as_it_was(top: Path) -> None:
    config = top / "vm" / "web.vmx"
    vmdk = top / "vm" / "web.vmdk"
    vmconv.convert(top / "vm" / "disk.raw", vmdk)
    config.write_text(
        '.encoding = "UTF-8"\nconfig.version = "8"\nvirtualHW.version = "19"\nmemSize = "1024"\n'
        'guestOS = "otherlinux-64"\n'
        'displayName = "web"\nscsi0.present = "TRUE"\nscsi0.virtualDev = "pvscsi"\nscsi0:0.present = "TRUE"\n'
        'scsi0:0.fileName = "web.vmdk"\n'
    )
    snapper(top / "vm", "5")
    config.write_text(config.read_text().replace("1024", "2048"))
    vmdk.unlink()
    made = top / "made"
    made.mkdir()
    vmconv.machine_convert(config, made, target_format="libvirt", from_snapshot="newest", zero_copy="require")
    assert "<memory unit='KiB'>1048576</memory>" in next(made.glob("*.xml")).read_text().replace('"', "'")
