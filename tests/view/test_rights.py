"""What `vmconv mount --allow-other` shows to whom: what they could open themselves, and nothing else."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.disks import MIB, QemuImg
from support.mounting import ERRORS, mounted
from support.requirements import missing
from vmconv.errors import BackendError
from vmconv.io.registry import installed
from vmconv_view import jobs, rights
from vmconv_view.jobs import MAX_LATE, Jobs
from vmconv_view.rights import OWN, Rights, RightsOfEverybody, RightsOfUser, User
from vmconv_view.tree import Tree

ALICE, BOB, STAFF = 41001, 41002, 41003
SECRET = b"S"
SIZE = MIB

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="root is needed to act as other users")


@pytest.fixture
def shelf() -> Iterator[Path]:
    """A directory that every user can reach and put files into."""
    directory = Path(tempfile.mkdtemp(prefix="vmconv-shelf-", dir="/tmp"))
    directory.chmod(0o1777)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def tree(shelf: Path) -> Iterator[Tree]:
    tree = Tree(installed(), str(shelf))
    yield tree
    tree.close()


def private(path: Path, *, mode: int = 0o600, group: int = ALICE) -> Path:
    """Makes alice's disk."""
    path.write_bytes(SECRET * SIZE)
    os.chown(path, ALICE, group)
    path.chmod(mode)
    return path


def given(path: Path) -> None:
    """Makes it bob's, for everybody to read."""
    os.chown(path, BOB, BOB)
    path.chmod(0o644)


def bobs(*groups: int) -> Rights:
    return RightsOfUser(User(BOB, BOB, groups))


def shown(tree: Tree, path: str, asking: Rights) -> bytes | None:
    """Returns the first bytes of a view; None where this user is shown no such thing."""
    try:
        held = tree.open(path, asking)
    except OSError as exc:
        assert exc.errno in (errno.ENOENT, errno.EACCES), exc
        return None
    except BackendError as exc:
        if str(exc) != f"{path}: cannot be made":
            raise
        # It is listed before it is planned.
        return None
    try:
        return held.view.read(0, 4)
    finally:
        held.release()


def reason(tree: Tree, image: str, asking: Rights, place: str = "") -> str:
    data = shown_all(tree, f"{image}/{place}{ERRORS}", asking)
    return data.decode(errors="surrogateescape")


def shown_all(tree: Tree, path: str, asking: Rights) -> bytes:
    held = tree.open(path, asking)
    try:
        return held.view.read(0, held.view.size)
    finally:
        held.release()


def overlay(shelf: Path, parent: str, qemu_img: QemuImg) -> None:
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", parent, "-F", "raw", shelf / "bob.qcow2", str(SIZE))
    given(shelf / "bob.qcow2")


def backing_file(shelf: Path, qemu_img: QemuImg) -> str:
    private(shelf / "alice.raw")
    overlay(shelf, "alice.raw", qemu_img)
    return "bob.qcow2"


def backing_file_in_a_private_directory(shelf: Path, qemu_img: QemuImg) -> str:
    (shelf / "home").mkdir()
    private(shelf / "home/alice.raw", mode=0o644)
    os.chown(shelf / "home", ALICE, ALICE)
    (shelf / "home").chmod(0o700)
    overlay(shelf, "home/alice.raw", qemu_img)
    return "bob.qcow2"


def backing_file_by_a_link(shelf: Path, qemu_img: QemuImg) -> str:
    private(shelf / "alice.raw")
    (shelf / "link").symlink_to("alice.raw")
    overlay(shelf, "link", qemu_img)
    return "bob.qcow2"


def backing_file_that_an_acl_denies(shelf: Path, qemu_img: QemuImg) -> str:
    private(shelf / "alice.raw", mode=0o644)
    deny(shelf / "alice.raw", BOB)
    overlay(shelf, "alice.raw", qemu_img)
    return "bob.qcow2"


def deny(path: Path, uid: int) -> None:
    """Sets an ACL by which everybody may read, but this user: linux/posix_acl_xattr.h."""
    everybody, nobody = 0xFFFFFFFF, 0
    entries = [(1, 6, everybody), (2, nobody, uid), (4, 4, everybody), (16, 4, everybody), (32, 4, everybody)]
    data = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(path, "system.posix_acl_access", data)
    assert path.stat().st_mode & 0o777 == 0o644


def extent(shelf: Path, qemu_img: QemuImg) -> str:
    private(shelf / "alice.bin")
    (shelf / "bob.vmdk").write_text(
        '# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
        f'RW {SIZE // 512} FLAT "alice.bin" 0\n'
    )
    given(shelf / "bob.vmdk")
    return "bob.vmdk"


def data_file(shelf: Path, qemu_img: QemuImg) -> str:
    data, image = shelf / "alice.bin", shelf / "bob.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", image, str(SIZE))
    private(data)
    given(image)
    return "bob.qcow2"


def second_layer(shelf: Path, qemu_img: QemuImg) -> str:
    private(shelf / "alice.raw")
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "alice.raw", "-F", "raw", shelf / "between.qcow2", str(SIZE))
    given(shelf / "between.qcow2")
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "between.qcow2", "-F", "qcow2", shelf / "bob.qcow2", str(SIZE))
    given(shelf / "bob.qcow2")
    return "bob.qcow2"


def parent_found_by_its_identity(shelf: Path, qemu_img: QemuImg) -> str:
    private(shelf / "alice.raw")
    base = shelf / "alice.vdi"
    vmconv.convert(str(shelf / "alice.raw"), str(base))
    os.chown(base, ALICE, ALICE)
    base.chmod(0o600)
    child = bytearray(base.read_bytes()[:4096])
    # A differencing VDI: type 4, an identifier of its own, its parent's where the link is; no block of its own.
    struct.pack_into("<I", child, 76, 4)
    identifier = bytes(child[392:408])
    child[392:408] = bytes(range(16))
    child[424:440] = identifier
    table, blocks = struct.unpack_from("<I", child, 340)[0], struct.unpack_from("<I", child, 384)[0]
    struct.pack_into("<I", child, 388, 0)
    data = bytes(child).ljust(table, b"\0")[:table] + b"\xff" * (4 * blocks)
    (shelf / "bob.vdi").write_bytes(data.ljust(struct.unpack_from("<I", child, 344)[0], b"\0"))
    given(shelf / "bob.vdi")
    return "bob.vdi"


THIEVES = [
    backing_file,
    backing_file_in_a_private_directory,
    backing_file_by_a_link,
    backing_file_that_an_acl_denies,
    extent,
    data_file,
    second_layer,
    parent_found_by_its_identity,
]


@pytest.mark.parametrize("thief", THIEVES, ids=lambda thief: thief.__name__)
@pytest.mark.parametrize("able", [True, False], ids=["as root", "without root"])
def test_an_image_does_not_show_others_what_only_its_owner_may_read(
    shelf: Path, tree: Tree, qemu_img: QemuImg, thief: Callable[[Path, QemuImg], str], able: bool
) -> None:
    image = thief(shelf, qemu_img)
    asking = bobs() if able else RightsOfEverybody()
    path = f"{image}/raw/bob.raw"
    # Whoever mounted may read it, and what was read for them is not what others are shown.
    assert shown(tree, path, OWN) == SECRET * 4
    assert shown(tree, path, asking) is None
    for place in ("", "raw/", "vhdx/"):
        with contextlib.suppress(FileNotFoundError):
            said = reason(tree, image, asking, place)
            assert any(why in said for why in ("Permission denied", "not shown", "nor another .vdi")), said
    # It is for rights only: alice may, and so may bob once he is allowed.
    if able and thief is not backing_file_that_an_acl_denies:
        assert shown(tree, path, RightsOfUser(User(ALICE, ALICE))) == SECRET * 4
    assert shown(tree, path, OWN) == SECRET * 4


def test_files_readable_by_a_group_are_hidden_from_others(shelf: Path, tree: Tree, qemu_img: QemuImg) -> None:
    private(shelf / "alice.raw", mode=0o640, group=STAFF)
    overlay(shelf, "alice.raw", qemu_img)
    assert shown(tree, "bob.qcow2/raw/bob.raw", bobs(STAFF)) == SECRET * 4
    assert shown(tree, "bob.qcow2/raw/bob.raw", bobs()) is None
    assert shown(tree, "bob.qcow2/raw/bob.raw", bobs(STAFF)) == SECRET * 4


@pytest.mark.parametrize("change", ["mode of the file", "mode of the directory", "another file"])
def test_an_image_is_not_shown_after_access_was_revoked(
    shelf: Path, tree: Tree, qemu_img: QemuImg, change: str
) -> None:
    (shelf / "sub").mkdir()
    os.chown(shelf / "sub", ALICE, ALICE)
    parent = private(shelf / "sub/alice.raw", mode=0o644)
    overlay(shelf, "sub/alice.raw", qemu_img)
    assert shown(tree, "bob.qcow2/raw/bob.raw", bobs()) == SECRET * 4
    if change == "mode of the file":
        parent.chmod(0o600)
    elif change == "mode of the directory":
        (shelf / "sub").chmod(0o700)
    else:
        private(shelf / "sub/new.raw").rename(parent)
    assert shown(tree, "bob.qcow2/raw/bob.raw", bobs()) is None
    assert shown(tree, "bob.qcow2/raw/bob.raw", OWN) == SECRET * 4


def test_why_an_image_is_not_shown_tells_no_names_that_the_user_could_not_see(
    shelf: Path, tree: Tree, qemu_img: QemuImg
) -> None:
    (shelf / "home").mkdir()
    (shelf / "home/link").symlink_to("/srv/secret-name")
    private(shelf / "home/there.raw")
    (shelf / "home").chmod(0o700)
    said = []
    for parent in ("home/link", "home/there.raw", "home/not-there.raw"):
        overlay(shelf, parent, qemu_img)
        assert shown(tree, "bob.qcow2/raw/bob.raw", bobs()) is None
        said.append(reason(tree, "bob.qcow2", bobs(), "raw/").replace(parent, "X"))
        (shelf / "bob.qcow2").unlink()
    assert len(set(said)) == 1
    assert "secret-name" not in said[0]


def test_an_image_that_a_user_cannot_reach_is_not_shown(shelf: Path, qemu_img: QemuImg) -> None:
    inner = shelf / "home/images"
    inner.mkdir(parents=True)
    private(inner / "open.raw", mode=0o644)
    (shelf / "home").chmod(0o700)
    tree = Tree(installed(), str(inner))
    for asking in (bobs(), RightsOfEverybody()):
        with pytest.raises(PermissionError):
            list(tree.node("", asking).names())
        with pytest.raises(PermissionError):
            tree.node("open.raw", asking)
        assert shown(tree, "open.raw/raw/open.raw", asking) is None
    (shelf / "home").chmod(0o711)
    for asking in (bobs(), RightsOfEverybody()):
        assert shown(tree, "open.raw/raw/open.raw", asking) == SECRET * 4
    tree.close()


def test_an_interrupted_change_is_not_recovered_for_another_user(
    shelf: Path, tree: Tree, qemu_img: QemuImg, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovered: list[str] = []
    monkeypatch.setattr("vmconv.inplace.settling._settle", recovered.append)
    overlay(shelf, "gone.raw", qemu_img)
    for asking in (bobs(), RightsOfEverybody()):
        assert shown(tree, "bob.qcow2/raw/bob.raw", asking) is None
        assert not recovered
    assert shown(tree, "bob.qcow2/raw/bob.raw", OWN) is None
    assert recovered == [str(shelf / "gone.raw")]


def test_the_mode_shown_is_the_strictest_of_all_files(shelf: Path, tree: Tree, qemu_img: QemuImg) -> None:
    image = backing_file(shelf, qemu_img)
    assert tree.node(f"{image}/raw/bob.raw", OWN).mode & 0o777 == 0o600
    assert tree.node(image, OWN).mode & 0o777 == 0o644


def test_one_link_that_cannot_be_followed_hides_no_image(shelf: Path, tree: Tree) -> None:
    private(shelf / "good.raw", mode=0o644)
    (shelf / "loop.raw").symlink_to("loop.raw")
    (shelf / "home").mkdir(0o700)
    private(shelf / "home/hidden.raw", mode=0o644)
    (shelf / "hidden.raw").symlink_to("home/hidden.raw")
    (shelf / "long.raw").symlink_to("x" * 300)
    (shelf / "through.raw").symlink_to("good.raw/none")
    os.mkfifo(shelf / "pipe.raw")
    os.mknod(shelf / "null.raw", 0o20666, os.makedev(1, 3))
    names = [os.fsencode(name) for name in (shelf / "good.raw").parent.iterdir()]
    assert len(names) == 8
    with contextlib.closing(socket_at(shelf / "socket.raw")):
        assert list(tree.node("", bobs()).names()) == ["good.raw"]
        assert list(tree.node("", OWN).names()) == ["good.raw", "hidden.raw"]
        for name in ("loop.raw", "hidden.raw", "long.raw", "through.raw", "pipe.raw", "null.raw", "socket.raw"):
            with pytest.raises(OSError, match=name.partition(".")[0]):
                tree.node(name, bobs())


def socket_at(path: Path) -> Any:
    import socket

    bound = socket.socket(socket.AF_UNIX)
    bound.bind(str(path))
    return bound


def test_rights_are_taken_on_by_one_thread_for_a_moment() -> None:
    def credentials() -> list[str]:
        status = Path("/proc/thread-self/status").read_text().splitlines()
        return [line for line in status if line.startswith(("Uid", "Gid", "Groups", "CapEff"))]

    before, there, out = credentials(), threading.Event(), threading.Event()
    inside: list[list[str]] = []

    def act() -> None:
        with bobs(STAFF, 7).acting():
            inside.append(credentials())
            there.set()
            out.wait(20)
        inside.append(credentials())

    thread = threading.Thread(target=act)
    thread.start()
    assert there.wait(20)
    assert credentials() == before
    out.set()
    thread.join()
    assert inside[0][0].split()[1:] == ["0", "0", "0", str(BOB)]
    assert inside[0][1].split()[1:] == ["0", "0", "0", str(BOB)]
    assert set(inside[0][2].split()[1:]) == {str(STAFF), "7"}
    assert not int(inside[0][3].split()[1], 16) & 7
    assert inside[1] == before
    with pytest.raises(ZeroDivisionError), bobs().acting():
        raise ZeroDivisionError
    assert credentials() == before


def test_groups_are_those_of_the_requesting_process() -> None:
    command = ["sleep", "30"]
    with subprocess.Popen(command, user=BOB, group=BOB, extra_groups=[STAFF, 9]) as process:
        assert set(rights.groups_of(BOB, BOB, process.pid)) == {STAFF, 9}
        # Somebody else's process by now: the number was used again.
        assert rights.groups_of(ALICE, BOB, process.pid) == ()
        assert rights.groups_of(BOB, STAFF, process.pid) == ()
        process.terminate()
    assert rights.groups_of(BOB, BOB, 0) == rights.groups_of(BOB, BOB, process.pid) == ()


def test_without_means_to_act_for_a_user_only_what_is_open_to_all_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rights.rights_of(0, 0, 1) is rights.rights_of(os.geteuid(), 5, 1) is OWN
    assert rights.rights_of(BOB, BOB, 0) == bobs() != OWN
    monkeypatch.setattr(rights, "can_act", lambda: False)
    assert rights.rights_of(BOB, BOB, 0) == RightsOfEverybody()


# Real mounts


@pytest.mark.parametrize("thief", [backing_file, extent], ids=lambda thief: thief.__name__)
def test_bob_does_not_read_through_a_mount_what_he_could_not_open(
    shelf: Path, point: Path, qemu_img: QemuImg, thief: Callable[[Path, QemuImg], str]
) -> None:
    fuse()
    image = thief(shelf, qemu_img)
    private(shelf / "group.raw", mode=0o640, group=STAFF)
    private(shelf / "open.raw", mode=0o644)
    with mounted(shelf, point, "--allow-other") as running:
        path = point / image / "raw/bob.raw"
        for _ in range(2):
            assert path.read_bytes()[:4] == SECRET * 4
            assert asked(["head", "-c4", path]) == (1, b"")
            assert asked(["head", "-c4", point / "open.raw/vhd/open.vhd"])[0] == 0
            assert asked(["head", "-c4", point / "group.raw/raw/group.raw"]) == (1, b"")
            assert asked(["head", "-c4", point / "group.raw/raw/group.raw"], STAFF) == (0, SECRET * 4)
        assert asked(["ls", point])[1].decode().split() == sorted({*os.listdir(shelf)} - {"alice.bin"})
        code, said = asked(["cat", point / image / "raw" / ERRORS])
        if code:
            said = asked(["cat", point / image / ERRORS])[1]
        assert b"Permission denied" in said
        assert SECRET * 4 not in said
    assert "Traceback" not in running.said


def fuse() -> None:
    if not (os.path.exists("/dev/fuse") and shutil.which("fusermount3")):
        missing("fuse", "FUSE cannot be used: /dev/fuse or fusermount3 is not there")


def asked(command: list[Any], *groups: int) -> tuple[int, bytes]:
    """Runs a command as bob."""
    done = subprocess.run(
        list(map(str, command)), user=BOB, group=BOB, extra_groups=groups, capture_output=True, check=False, timeout=600
    )
    return done.returncode, done.stdout


# Images that take too long


def test_an_image_that_hangs_does_not_block_the_others(
    shelf: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "PATIENCE", 0.3)
    for name in ("good.raw", "slow.raw"):
        private(shelf / name, mode=0o644)
    kind, free = type(installed().formats["raw"]), threading.Event()
    read = kind.read

    def waits(self: Any, file: Any, opener: Any, **options: Any) -> Any:
        if file.name == "slow.raw":
            free.wait(600)
        return read(self, file, opener, **options)

    monkeypatch.setattr(kind, "read", waits)
    with pytest.raises(BackendError, match=r"slow.raw: takes longer than 0.3 seconds"):
        tree.open("slow.raw/raw/slow.raw")
    # It would wait until the image can be read, if it waited at all.
    monkeypatch.setattr(jobs, "PATIENCE", 600)
    with pytest.raises(BackendError, match="takes longer"):
        tree.open("slow.raw/vhd/slow.vhd")
    assert list(tree.node("").names()) == ["good.raw", "slow.raw"]
    assert tree.node("slow.raw").status.st_size == SIZE
    assert shown(tree, "good.raw/raw/good.raw", OWN) == SECRET * 4
    free.set()
    until = time.monotonic() + 600
    while True:
        with contextlib.suppress(BackendError):
            assert shown(tree, "slow.raw/raw/slow.raw", OWN) == SECRET * 4
            break
        assert time.monotonic() < until
        time.sleep(0.01)


def test_one_owner_does_not_begin_ever_more_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PATIENCE", 0.01)
    running, free = Jobs(), threading.Event()
    for number in range(MAX_LATE):
        with pytest.raises(BackendError, match="takes longer"):
            running.result(number, "bob", "slow", lambda: free.wait(600))
    with pytest.raises(BackendError, match="8 others take too long"):
        running.result("more", "bob", "slow", lambda: 1)
    monkeypatch.setattr(jobs, "PATIENCE", 600)
    assert running.result("more", "alice", "quick", lambda: 1) == 1
    free.set()
