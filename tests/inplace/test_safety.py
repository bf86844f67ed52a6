"""In place beside others: whose files are changed, through which directory, with which rights, and what is said."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import qcow2_images
from support.crash import OTHERS, Stopped, StoppingCalls
from support.disks import MIB, QemuImg, make_disk
from support.inplace import NOBODY, as_nobody, contents, descriptor, in_place, interrupted, names, refused, run_cli
from support.requirements import another_user
from support.vdi_images import build
from support.vdi_images import chain as vdi_chain
from vmconv import api
from vmconv.errors import AccessError, BackendError, PlanError
from vmconv.inplace import neighbours
from vmconv.inplace.names import JOURNAL, UNDO, WORKING, beside
from vmconv.inplace.syscalls import Syscalls
from vmconv.io import ownership
from vmconv.io.directory import NAME_MAX
from vmconv.testing.malformed import time_limit
from vmconv_vdi import structs as vdi_structs

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files of other users")
BOB, ALICE = 1000, 1001
ACL = "system.posix_acl_access"


def bits(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- whose files


def bob_s_image(directory: Path, *, of: int = ALICE) -> Path:
    """Returns an image of bob's whose payload lies in a private file of another user."""
    extent = make_disk(directory / "extent.raw", MIB)
    extent.chmod(0o600)
    os.chown(extent, of, of)
    image = descriptor(extent).with_name("front.vmdk").rename(directory / "bob.vmdk")
    os.chown(image, BOB, BOB)
    return image


@as_root
@pytest.mark.parametrize("target", ["bob.qcow2", "bob.raw", "bob.vmdk"])
def test_a_file_of_another_user_than_the_image_s_is_refused(any_dir: Path, target: str) -> None:
    image = bob_s_image(any_dir)
    kind = target.rpartition(".")[2]
    error = refused(image, any_dir / target, target_format=kind)
    assert str(error) == f"{any_dir / 'extent.raw'}: belongs to user {ALICE}, bob.vmdk to user {BOB}"
    assert "--any-owner" in str(error.hint)


@as_root
def test_another_users_file_is_used_on_request(any_dir: Path) -> None:
    image = bob_s_image(any_dir)
    done = run_cli("convert", "--in-place", "--any-owner", image, any_dir / "bob.qcow2")
    assert done.returncode == 0, done.stderr
    assert names(any_dir) == {"bob.qcow2"}
    assert (bits(any_dir / "bob.qcow2"), (any_dir / "bob.qcow2").stat().st_uid) == (0o600, ALICE)


@as_root
def test_another_user_s_base_does_not_go_with_a_chain(reflink_dir: Path, qemu_img: QemuImg) -> None:
    base, top = reflink_dir / "base.qcow2", reflink_dir / "top.qcow2"
    qemu_img("create", "-f", "qcow2", base, "1M")
    qemu_img("create", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top)
    os.chown(base, ALICE, ALICE)
    os.chown(top, BOB, BOB)
    assert f"belongs to user {ALICE}" in str(refused(top, reflink_dir / "top.qed", chain=True))


@as_root
def test_another_user_s_private_base_is_not_put_into_a_file_of_the_image_s_owner(
    reflink_dir: Path, qemu_img: QemuImg
) -> None:
    base, top = make_disk(reflink_dir / "base.raw", MIB), reflink_dir / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", base.name, "-F", "raw", top)
    os.chown(base, ALICE, ALICE)
    os.chown(top, BOB, BOB)
    base.chmod(0o600)
    target = reflink_dir / "flat.vhdx"
    with pytest.raises(AccessError, match=f"user {BOB}, who may not read .*base.raw"):
        in_place(top, target)
    assert names(reflink_dir) == {"base.raw", "top.qcow2"}
    in_place(top, target, any_owner=True)
    assert bits(target) == 0o600


@as_root
def test_a_link_of_another_user_s_says_no_directory(any_dir: Path) -> None:
    """Bob's link leads to where alice's disk is: in place, undo and recover look for it elsewhere."""
    alices, bobs = any_dir / "alice", any_dir / "bob"
    for path in (alices, bobs):
        path.mkdir()
    disk = make_disk(alices / "disk.raw", MIB)
    os.chown(disk, ALICE, ALICE)
    link = bobs / "link"
    link.symlink_to(alices)
    os.chown(link, BOB, BOB, follow_symlinks=False)
    for target in (link / "new.qcow2", alices / "new.qcow2"):
        with pytest.raises(AccessError, match=f"link of user {BOB}, and leads to a directory of user 0"):
            in_place(link / disk.name, target)
    for back in (api.undo, api.recover):
        with pytest.raises(AccessError, match=f"link of user {BOB}"):
            back(str(link / disk.name))
    assert names(alices) == {"disk.raw"}


@as_root
def test_another_user_s_file_is_not_replaced_even_by_force(any_dir: Path) -> None:
    disk = make_disk(any_dir / "disk.raw", MIB)
    taken = any_dir / "new.qcow2"
    taken.write_bytes(b"alice's")
    os.chown(taken, ALICE, ALICE)
    assert f"new.qcow2: belongs to user {ALICE}" in str(refused(disk, taken, force=True))
    in_place(disk, taken, force=True, any_owner=True)
    assert names(any_dir) == {"new.qcow2"}


@pytest.mark.parametrize("named", ["new.qcow2", "new.qcow2.vmconv-undo"])
def test_a_killed_undo_can_be_repeated(ext4_dir: Path, named: str) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    before = disk.read_bytes()
    in_place(disk, ext4_dir / "new.qcow2", keep_undo=True)
    program = (
        "import os, signal; from vmconv.io.directory import Directory as D; real = D.rename\n"
        "def rename(*a, **k): real(*a, **k); os.kill(os.getpid(), signal.SIGKILL)\n"
        f"D.rename = rename; from vmconv import api; api.undo({str(ext4_dir / 'new.qcow2')!r})"
    )
    killed = subprocess.run([sys.executable, "-c", program], timeout=600, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (ext4_dir / "new.qcow2").exists()
    api.undo(str(ext4_dir / named))
    assert names(ext4_dir) == {"disk.raw"}
    assert disk.read_bytes() == before


@as_root
def test_undo_takes_no_file_that_is_another_user_s(ext4_dir: Path) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    in_place(disk, ext4_dir / "new.vmdk", options={"subformat": "monolithicFlat"}, keep_undo=True)
    flat = ext4_dir / "new-flat.vmdk"
    assert flat.exists()
    status = flat.stat()
    os.chown(flat, ALICE, ALICE)
    os.utime(flat, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(PlanError, match=f"new-flat.vmdk: belongs to user {ALICE}") as caught:
        api.undo(str(ext4_dir / "new.vmdk"))
    assert "--trust" in str(caught.value.hint)


@as_root
@pytest.mark.parametrize("what", ["working", "made"])
def test_recovery_takes_no_file_that_somebody_has_exchanged(ext4_dir: Path, what: str) -> None:
    """Bob may rename in his directory: another user's file has the name that the interrupted one had."""
    disk = interrupted(ext4_dir)
    working = ext4_dir / (disk.name + WORKING)
    size = working.stat().st_size
    if what == "working":
        working.rename(ext4_dir / "hidden")
        working.write_bytes(bytes(size))
        os.chown(working, ALICE, ALICE)
    else:
        working.with_name("other").hardlink_to(working)
    before = contents(ext4_dir)
    with pytest.raises(AccessError, match=f"belongs to user {ALICE}|hard links"):
        api.recover(str(disk))
    assert contents(ext4_dir) == before


def test_a_file_of_working_names_is_not_written_over(any_dir: Path) -> None:
    disk = make_disk(any_dir / "disk.raw", MIB)
    for name in ("disk.raw" + WORKING, "new.qcow2" + WORKING):
        (any_dir / name).write_bytes(b"somebody's")
        if name.startswith("disk") or any_dir.parent.name != "ext4":
            assert "is in the way" in str(refused(disk, any_dir / "new.qcow2"))
        (any_dir / name).unlink()


# -- through which directory


class ExchangingCalls(Syscalls):
    """Exchanges the directory for another one before call number `at`, for good."""

    def __init__(self, directory: Path, decoy: Path, at: int) -> None:
        self.paths = directory, decoy
        self.at = at
        self.made = 0

    def step(self) -> None:
        if self.made == self.at:
            exchange(*self.paths)
        self.made += 1


def exchange(one: Path, other: Path) -> None:
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def _counted(name: str) -> Callable[..., Any]:
    def call(self: ExchangingCalls, *arguments: Any, **more: Any) -> Any:
        self.step()
        return getattr(Syscalls, name)(self, *arguments, **more)

    return call


for _name in (*OTHERS, "write"):
    setattr(ExchangingCalls, _name, _counted(_name))


def decoy_of(directory: Path) -> Path:
    """Returns a directory with the same names, each leading to a file that is not to be touched."""
    decoy = directory.with_name("decoy")
    decoy.mkdir()
    (directory.parent / "victim").write_bytes(b"victim" * 1000)
    for name in ("disk.raw", "new.qcow2", "disk.raw" + WORKING, "new.qcow2" + WORKING, "new.qcow2" + UNDO):
        (decoy / name).symlink_to("../victim")
    return decoy


@pytest.mark.parametrize("way", ["there", "back", "recovered"])
def test_an_exchanged_directory_is_not_touched(any_dir: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Before each call that changes anything: what is changed lies in the directory that was opened first."""
    if way != "there" and any_dir.parent.name != "ext4":
        pytest.skip("the same for all filesystems")
    count, at = 1, 0
    while at < count:
        home = any_dir / str(at)
        home.mkdir()
        own = home / "own"
        own.mkdir()
        disk = make_disk(own / "disk.raw", MIB)
        if way == "back":
            in_place(disk, own / "new.qcow2", keep_undo=True)
        elif way == "recovered":
            disk.unlink()
            interrupted(own)
        before = contents(own)
        decoy = decoy_of(own)
        calls = ExchangingCalls(own, decoy, at)
        if way == "there":
            with monkeypatch.context() as patch:
                for module in ("stay", "share"):
                    patch.setattr(f"vmconv.inplace.{module}.Syscalls", lambda calls=calls: calls)
                api.convert(str(disk), str(own / "new.qcow2"), in_place=True)
        elif way == "back":
            from vmconv.inplace import undo

            undo.undo(str(own / "new.qcow2"), calls=calls)
        else:
            from vmconv.inplace import recovery

            recovery.recover(str(disk), calls=calls)
        count = calls.made
        assert names(decoy) == ({"new.qcow2"} if way == "there" else {"disk.raw"}), at
        assert all(path.is_symlink() for path in own.iterdir())
        assert len(names(own)) == 5
        assert (home / "victim").read_bytes() == b"victim" * 1000
        assert way != "back" or contents(decoy) != before
        at += 1
    assert count > 4


def test_a_directory_that_is_exchanged_before_the_source_is_opened_for_writing(
    any_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = any_dir / "own"
    own.mkdir()
    disk = make_disk(own / "disk.raw", MIB)
    decoy = decoy_of(own)
    look = neighbours.look

    def looked(*arguments: Any, **more: Any) -> Any:
        found = look(*arguments, **more)
        exchange(own, decoy)
        return found

    monkeypatch.setattr(neighbours, "look", looked)
    in_place(disk, own / "new.qcow2")
    assert names(decoy) == {"new.qcow2"}
    assert (any_dir / "victim").read_bytes() == b"victim" * 1000


def test_a_file_that_is_exchanged_is_not_opened_for_writing(any_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = make_disk(any_dir / "disk.raw", MIB)
    look = neighbours.look

    def looked(*arguments: Any, **more: Any) -> Any:
        found = look(*arguments, **more)
        disk.rename(any_dir / "moved")
        disk.write_bytes(b"victim")
        return found

    monkeypatch.setattr(neighbours, "look", looked)
    with pytest.raises(AccessError, match="was replaced"):
        in_place(disk, any_dir / "new.qcow2")
    assert disk.read_bytes() == b"victim"


# -- with which rights


@as_root
@pytest.mark.parametrize("undoable", [False, True])
def test_the_file_that_replaces_the_source_keeps_its_owner(any_dir: Path, *, undoable: bool) -> None:
    disk = make_disk(any_dir / "disk.raw", MIB)
    os.setxattr(disk, "user.note", b"kept")
    os.chown(disk, BOB, 4321)
    disk.chmod(0o640)
    in_place(disk, any_dir / "new.qcow2", keep_undo=undoable)
    new = any_dir / "new.qcow2"
    assert (bits(new), new.stat().st_uid, new.stat().st_gid) == (0o640, BOB, 4321)
    assert os.getxattr(new, "user.note") == b"kept"
    if undoable:
        kept = any_dir / ("new.qcow2" + UNDO)
        assert (bits(kept), kept.stat().st_uid) == (0o600, 0)
        api.undo(str(new))
        assert names(any_dir) == {"disk.raw"}
        assert (bits(disk), disk.stat().st_uid, disk.stat().st_gid) == (0o640, BOB, 4321)


@as_root
def test_files_beside_have_the_owner_and_mode_too(any_dir: Path) -> None:
    """A descriptor of the target, and on the way back the one of the source."""
    flat = make_disk(any_dir / "flat.raw", MIB)
    image = descriptor(flat).with_name("front.vmdk")
    for path, mode in ((flat, 0o600), (image, 0o640)):
        os.chown(path, BOB, 4321)
        path.chmod(mode)
    made = any_dir / "new.vmdk"
    in_place(image, made, options={"subformat": "monolithicFlat"}, keep_undo=True)
    flat_name = any_dir / "new-flat.vmdk"
    for path in (made, flat_name):
        assert (path.stat().st_uid, path.stat().st_gid, bits(path) & 0o027) == (BOB, 4321, 0)
    api.undo(str(made))
    assert (bits(flat), flat.stat().st_uid, flat.stat().st_gid) == (0o600, BOB, 4321)
    assert (bits(image), image.stat().st_uid, image.stat().st_gid) == (0o640, BOB, 4321)


class WatchingCalls(Syscalls):
    """Notes the modes of all files of a directory before each call."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.seen: dict[str, int] = {}

    def step(self) -> None:
        for path in self.directory.iterdir():
            self.seen[path.name] = self.seen.get(path.name, 0) | bits(path)


for _name in (*OTHERS, "write"):
    setattr(WatchingCalls, _name, _counted(_name))


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o777])
def test_nothing_is_more_readable_in_between(any_dir: Path, monkeypatch: pytest.MonkeyPatch, mask: int) -> None:
    disk = make_disk(any_dir / "disk.raw", MIB)
    disk.chmod(0o600)
    calls = WatchingCalls(any_dir)
    for module in ("stay", "share"):
        monkeypatch.setattr(f"vmconv.inplace.{module}.Syscalls", lambda: calls)
    before = os.umask(mask)
    try:
        in_place(disk, any_dir / "new.vmdk", keep_undo=True)
        made = make_disk(any_dir / "other.raw", MIB)
        made.chmod(0o600)
        in_place(made, any_dir / "other.qcow2", source_format="raw")
    finally:
        os.umask(before)
    calls.step()
    assert {name: mode & 0o177 for name, mode in calls.seen.items()} == dict.fromkeys(calls.seen, 0)
    assert {"new.vmdk", "new.vmdk" + UNDO, "disk.raw" + JOURNAL, "other.qcow2"} <= calls.seen.keys()


@as_root
def test_a_flattened_chain_is_readable_only_to_users_with_access_to_all_layers(
    reflink_dir: Path, qemu_img: QemuImg
) -> None:
    base, top = reflink_dir / "base.qcow2", reflink_dir / "top.qcow2"
    qemu_img("create", "-f", "qcow2", base, "1M")
    qemu_img("create", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top)
    base.chmod(0o600)
    top.chmod(0o644)
    in_place(top, reflink_dir / "flat.raw")
    assert bits(reflink_dir / "flat.raw") == 0o600


@as_root
def test_without_permission_to_chown_the_file_itself_is_changed(xfs_dir: Path) -> None:
    """A group's file: a new one would be another user's."""
    disk = make_disk(xfs_dir / "disk.raw", MIB)
    os.chown(disk, BOB, NOBODY)
    disk.chmod(0o660)
    os.chown(xfs_dir, NOBODY, NOBODY)
    for parent in xfs_dir.parents:
        parent.chmod(parent.stat().st_mode | 0o011)
    done = as_nobody("convert", "--in-place", disk, xfs_dir / "new.qcow2", environment={"HOME": "/"})
    assert done.returncode == 0, done.stderr
    assert "kept" in done.stdout
    assert ((xfs_dir / "new.qcow2").stat().st_uid, bits(xfs_dir / "new.qcow2")) == (BOB, 0o660)


# -- neighbours


def opened_by(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns what is opened from now on: paths, with that of the directory where they are relative to one."""
    opened: list[str] = []
    real = os.open

    def noted(path: Any, *arguments: Any, dir_fd: int | None = None, **more: Any) -> int:
        place = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        opened.append(os.path.join(place, os.fspath(path)))
        return real(path, *arguments, dir_fd=dir_fd, **more)

    monkeypatch.setattr(os, "open", noted)
    return opened


def test_files_that_neighbours_name_in_other_directories_are_not_opened(
    ext4_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qemu_img: QemuImg
) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    private = make_disk(tmp_path / "private.raw", MIB)
    os.mkfifo(tmp_path / "pipe")
    for number, name in enumerate([str(private), f"../../../../..{private}", str(tmp_path / "pipe")]):
        (ext4_dir / f"o{number}.qcow2").write_bytes(qcow2_images.empty_overlay(name))
        (ext4_dir / f"d{number}.qcow2").write_bytes(qcow2_images.with_data_file(name))
        head = '# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
        (ext4_dir / f"v{number}.vmdk").write_text(f'{head}RW 9 FLAT "{name}" 0\n')
    qemu_img("create", "-f", "qed", "-b", private, "-F", "raw", ext4_dir / "q.qed")
    (ext4_dir / "away").symlink_to(tmp_path)
    (ext4_dir / "link.qcow2").symlink_to(private)
    (ext4_dir / "a.qcow2").write_bytes(qcow2_images.empty_overlay("link.qcow2"))
    (ext4_dir / "b.qcow2").write_bytes(qcow2_images.empty_overlay("away/private.raw"))
    with monkeypatch.context() as patch:
        opened = opened_by(patch)
        in_place(disk, ext4_dir / "new.qcow2")
    assert any(path == str(ext4_dir / "o0.qcow2") for path in opened)
    assert [path for path in opened if path.startswith(str(tmp_path))] == []


def through_a_link(directory: Path) -> str:
    (directory / "base").symlink_to("disk.raw")
    return "base"


def by_another_way(directory: Path) -> str:
    way = directory.with_name("way")
    way.unlink(missing_ok=True)
    way.symlink_to(directory)
    return str(way / "disk.raw")


NAMED: list[Callable[[Path], str]] = [
    lambda _: "disk.raw",
    lambda _: "./disk.raw",
    lambda directory: f"../{directory.name}/disk.raw",
    lambda directory: str(directory / "disk.raw"),
    through_a_link,
    by_another_way,
]


@pytest.mark.parametrize("named", NAMED, ids=["plain", "dot", "up and down", "absolute", "link", "another way"])
@pytest.mark.parametrize("kind", ["overlay", "data file", "extent", "second extent"])
def test_a_neighbour_is_found_by_any_name(ext4_dir: Path, named: Callable[[Path], str], kind: str) -> None:
    own = ext4_dir / "own"
    own.mkdir()
    disk = make_disk(own / "disk.raw", MIB)
    name = named(own)
    if kind == "overlay":
        (own / "front").write_bytes(qcow2_images.empty_overlay(name))
    elif kind == "data file":
        (own / "front").write_bytes(qcow2_images.with_data_file(name))
    else:
        first = 'RW 8 FLAT "gone.raw" 0\n' if kind == "second extent" else ""
        head = '# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="twoGbMaxExtentFlat"\n'
        (own / "front").write_text(f'{head}{first}RW 8 FLAT "{name}" 0\n')
    assert "front: refers to disk.raw" in str(refused(disk, own / "new.qcow2"))


@pytest.mark.parametrize("name", ["disk.vdi", "disk.image"])
def test_a_neighbour_with_its_parent_by_identity_is_found(ext4_dir: Path, name: str) -> None:
    parent, child, _ = vdi_chain(ext4_dir)
    parent = parent.rename(ext4_dir / name)
    error = refused(parent, ext4_dir / "new.qcow2", source_format="vdi")
    assert f"{child.name}: refers to {name}" in str(error)


@pytest.mark.parametrize("kind", ["vhd", "vhdx"])
def test_a_differencing_neighbour_is_found(any_dir: Path, qemu_img: QemuImg, kind: str) -> None:
    base, top = any_dir / "base.qcow2", any_dir / "top.qcow2"
    qemu_img("create", "-f", "qcow2", base, "4M")
    qemu_img("create", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top)
    api.convert(str(top), str(any_dir / f"made.{kind}"), chain=True)
    parent = any_dir / f"base.{kind}"
    assert parent.exists()
    for path in (base, top):
        path.unlink()
    assert f"made.{kind}: refers to base.{kind}" in str(refused(parent, any_dir / "new.qcow2"))


def test_hundreds_of_differencing_neighbours_take_no_time(ext4_dir: Path) -> None:
    """Each is asked for the names and the identity that it states, and for nothing else."""
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    for number in range(300):
        identity = number.to_bytes(16, "little")
        link: dict[str, Any] = {"u32Type": vdi_structs.DIFFERENCING, "uuidCreate": identity, "uuidLinkage": b"\1" * 16}
        (ext4_dir / f"{number}.vdi").write_bytes(build({}, [vdi_structs.UNALLOCATED], **link))
    with time_limit():
        in_place(disk, ext4_dir / "new.qcow2")


def test_overlays_are_seen_in_large_directories(any_dir: Path) -> None:
    disk = make_disk(any_dir / "disk.raw", MIB)
    for number in range(5000):
        (any_dir / f"a{number:05}.txt").touch()
    (any_dir / "zz.qcow2").write_bytes(qcow2_images.empty_overlay("disk.raw"))
    with pytest.raises(PlanError, match=r"zz\.qcow2: refers to disk\.raw"):
        in_place(disk, any_dir / "new.qcow2")


def test_unexamined_neighbours_are_reported(any_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "MOST_SECONDS", -1.0)
    disk = make_disk(any_dir / "disk.raw", MIB)
    (any_dir / "zz.qcow2").write_bytes(qcow2_images.empty_overlay("other.raw"))
    result = api.convert(str(disk), str(any_dir / "new.qcow2"), in_place=True)
    assert "not searched: 1 file," in "\n".join(result.warnings)


# -- what is said at the end


SIGNALLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
from support.crash import OTHERS
from vmconv.inplace.syscalls import Syscalls
from vmconv.cli.main import main

number, at, made = signal.Signals(int(sys.argv[1])), int(sys.argv[2]), 0

def counted(name):
    real = getattr(Syscalls, name)
    def call(*arguments, **more):
        global made
        if made == at:
            os.kill(os.getpid(), number)
        made += 1
        return real(*arguments, **more)
    return call

for name in (*OTHERS, "write"):
    setattr(Syscalls, name, counted(name))
code = main(sys.argv[4:])
print(made, file=sys.stdout)
raise SystemExit(code)
"""


def signalled(number: int, at: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a command to which a signal is sent before call number `at`; the last line says how many there were."""
    own = [str(number), str(at), str(Path(__file__).parents[1]), *map(str, arguments)]
    return subprocess.run(
        [sys.executable, "-c", SIGNALLED, *own], capture_output=True, text=True, check=False, timeout=600
    )


@pytest.mark.parametrize("way", ["ext4", "xfs", "back"])
def test_a_signal_at_any_call_ends_in_the_truth(request: pytest.FixtureRequest, tmp_path: Path, way: str) -> None:
    """All is as it was and that is said, or all is done and that is said."""
    directory: Path = request.getfixturevalue("xfs_dir" if way == "xfs" else "ext4_dir")
    raw = make_disk(tmp_path / "disk.raw", MIB)
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    count, at, seen = 1, 0, set()
    while at < count:
        folder = directory / str(at)
        folder.mkdir()
        disk = folder / "disk.raw"
        disk.write_bytes(raw.read_bytes())
        command: list[str | Path] = ["convert", "--in-place", disk, folder / "new.qcow2"]
        if way == "back":
            in_place(disk, folder / "new.qcow2", keep_undo=True)
            command = ["undo", folder / "new.qcow2"]
        before = contents(folder)
        number = numbers[at % 3]
        done = signalled(number, at, *command)
        count = int(done.stdout.splitlines()[-1])
        if done.returncode == 0:
            seen.add("after")
            assert names(folder) == ({"disk.raw"} if way == "back" else {"new.qcow2"})
            assert "nothing" not in done.stderr
            assert "disk.raw" in done.stdout if way == "back" else "new.qcow2" in done.stdout
        else:
            seen.add("before")
            assert done.returncode == 128 + number, done.stderr
            assert contents(folder) == before, at
            assert ("nothing was changed" if way == "back" else "nothing was created") in done.stderr
            # What comes after the commit is finished.
            assert "after" not in seen
        at += 1
    assert seen == {"before", "after"}


class FailingCalls(Syscalls):
    """Storage that turns read-only at call number `at`."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.made = 0

    def step(self) -> None:
        self.made += 1
        if self.made > self.at:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))


for _name in (*OTHERS, "write"):
    setattr(FailingCalls, _name, _counted(_name))


def test_an_error_of_read_only_storage_says_where_the_disk_is(
    any_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any call: the error names the disk's present name where it is not its own, and recover does the rest."""
    raw = make_disk(tmp_path / "disk.raw", MIB)
    recovered = 0
    for at in range(60):
        folder = any_dir / str(at)
        folder.mkdir()
        disk = folder / "disk.raw"
        disk.write_bytes(raw.read_bytes())
        with monkeypatch.context() as patch:
            for module in ("stay", "share"):
                patch.setattr(f"vmconv.inplace.{module}.Syscalls", lambda at=at: FailingCalls(at))
            try:
                in_place(disk, folder / "new.qcow2")
            except (BackendError, PlanError) as exc:
                error = exc
            else:
                break
        if names(folder) == {"disk.raw"}:
            continue
        recovered += 1
        assert str(error.hint) in (f"vmconv recover {disk}", f"vmconv recover {folder / 'new.qcow2'}")
        now = str(error).partition("the disk is ")[2].removesuffix(" now")
        assert Path(now).exists(), error
        api.recover(str(error.hint).rpartition(" ")[2])
        assert names(folder) in ({"disk.raw"}, {"new.qcow2"})
    assert recovered > 3
    assert at < 59


# -- surroundings


@as_root
@pytest.mark.parametrize("mask", ["0777", "0377", "0277", "0222"])
def test_a_umask_does_not_lock_the_owner_out_of_a_journal(ext4_dir: Path, tmp_path: Path, mask: str) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    before = disk.read_bytes()
    for path in (ext4_dir, disk):
        os.chown(path, NOBODY, NOBODY)
    home = ext4_dir / "home"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    for parent in ext4_dir.parents:
        parent.chmod(parent.stat().st_mode | 0o011)
    code = (
        f"import os; os.umask(0o{mask})\nfrom vmconv.inplace.change import Change\nfrom vmconv.cli.main import main\n"
        "real = Change.complete\nChange.complete = lambda change: os._exit(9)\nimport sys; main(sys.argv[1:])"
    )
    command: list[str | Path] = [
        *another_user(NOBODY),
        sys.executable,
        "-c",
        code,
        "convert",
        "--in-place",
        "--keep-undo",
        disk,
        ext4_dir / "new.qcow2",
    ]
    environment = {"HOME": str(home)}
    killed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)
    assert killed.returncode == 9, killed.stderr
    assert not disk.exists()
    done = as_nobody("recover", disk, environment=environment)
    assert done.returncode == 0, done.stderr
    assert names(ext4_dir) == {"disk.raw", "home"}
    assert disk.read_bytes() == before


@pytest.mark.parametrize("environment", [{}, {"HOME": ""}, {"HOME": "."}, {"HOME": "~"}, {"XDG_STATE_HOME": "state"}])
def test_no_directory_is_made_where_one_stands(
    ext4_dir: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    """A key is kept in a home, and a home has an absolute path that belongs to the user."""
    for name in ("HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ext4_dir)
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError()))
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    result = api.convert(str(disk), str(ext4_dir / "new.qcow2"), in_place=True)
    assert names(ext4_dir) == {"new.qcow2"}
    assert "--trust" in "\n".join(result.warnings)


@as_root
def test_a_home_of_another_user_keeps_no_key(ext4_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after sudo: its owner could exchange the key."""
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    home = ext4_dir / "home"
    home.mkdir()
    os.chown(home, BOB, BOB)
    monkeypatch.setenv("HOME", str(home))
    own = ext4_dir / "root"
    own.mkdir()
    monkeypatch.setattr("pwd.getpwuid", lambda _: type("Entry", (), {"pw_dir": str(own)}))
    assert ownership.can_mark()
    assert names(home) == set()
    assert (own / ".local" / "state" / "vmconv" / "journal.key").exists()


LONG = [200, 227, 228, 240, 241, 255]


@pytest.mark.parametrize("length", LONG)
@pytest.mark.parametrize("character", ["a", "ä"])
def test_names_may_be_as_long_as_the_filesystem_has_them(any_dir: Path, length: int, character: str) -> None:
    disk = any_dir / (character * ((length - 4) // len(character.encode())) + ".raw")
    target = disk.with_suffix(".vmdk").with_name(disk.stem[: (length - 6) // len(character.encode())] + ".qcow2")
    make_disk(disk, MIB)
    before = contents(any_dir)
    in_place(disk, target, keep_undo=True)
    assert names(any_dir) == {target.name, beside(target.name, UNDO)}
    api.undo(str(target))
    assert contents(any_dir) == before
    with pytest.MonkeyPatch.context() as patch:
        for module in ("stay", "share"):
            patch.setattr(f"vmconv.inplace.{module}.Syscalls", lambda: StoppingCalls(4))
        with pytest.raises(Stopped):
            in_place(disk, target)
    assert names(any_dir) != {disk.name}
    done = run_cli("info", disk)
    assert done.returncode == 0, done.stderr
    assert contents(any_dir) == before


def test_shortened_names_are_apart() -> None:
    long = "x" * 250
    assert beside("disk", JOURNAL) == "disk" + JOURNAL
    longest = "x" * (NAME_MAX - len(JOURNAL))
    assert beside(longest, JOURNAL) == longest + JOURNAL
    assert beside(long + "1", JOURNAL) != beside(long + "2", JOURNAL)
    assert len(os.fsencode(beside("ä" * 127, JOURNAL))) <= 255
