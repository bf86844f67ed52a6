"""Where a target goes, what is refused there before any work, and who may open what is made."""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support import qcow2_images
from support.disks import MIB, make_disk
from vmconv import api
from vmconv.backends import targets
from vmconv.backends.files import FileOutput
from vmconv.errors import AccessError, PlanError, UsageError, VmconvError
from vmconv.io.directory import Directory

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users")

STRANGER = 54321
OLD = b"what was here before"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    (tmp_path / "own").mkdir(0o755)
    return make_disk(tmp_path / "own" / "disk.raw", MIB)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory in which anybody may make files, as /tmp."""
    path = tmp_path / "shared"
    path.mkdir()
    path.chmod(0o1777)
    return path


def strangers_link(path: Path, leads: Path) -> Path:
    path.symlink_to(leads)
    os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
    return path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def untouched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that grows with each write."""
    written: list[int] = []

    def noted(self: FileOutput, offset: int, data: bytes) -> None:
        written.append(offset)

    monkeypatch.setattr(FileOutput, "write", noted)
    return written


# Links of strangers


@pytest.mark.parametrize("through", ["itself", "directory", "middle", "another link"])
def test_a_strangers_link_in_a_shared_directory_is_not_followed(
    disk: Path, shared: Path, tmp_path: Path, through: str
) -> None:
    secret = tmp_path / "secret"
    (secret / "below").mkdir(parents=True)
    paths: dict[str, Callable[[], Path]] = {
        "itself": lambda: strangers_link(shared / "t.qcow2", secret / "made.qcow2"),
        "directory": lambda: strangers_link(shared / "d", secret) / "made.qcow2",
        "middle": lambda: strangers_link(shared / "d", secret) / "below" / "made.qcow2",
        "another link": lambda: linked(tmp_path / "t.qcow2", strangers_link(shared / "u", secret / "made.qcow2")),
    }
    path = paths[through]()
    for run in (api.convert, api.plan):
        with pytest.raises(AccessError, match=f"symbolic link of user {STRANGER}"):
            run(str(disk), str(path), target_format="qcow2")
    assert not list(secret.rglob("*.qcow2"))


def linked(path: Path, leads: Path) -> Path:
    path.symlink_to(leads)
    return path


@pytest.mark.parametrize("owner", ["user", "directory's owner"])
def test_other_links_in_a_shared_directory_are_followed(disk: Path, shared: Path, tmp_path: Path, owner: str) -> None:
    leads = tmp_path / "elsewhere"
    leads.mkdir()
    link = linked(shared / "t.qcow2", leads / "made.qcow2")
    if owner != "user":
        for path in (shared, link, leads):
            os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
    api.convert(str(disk), str(link))
    assert (leads / "made.qcow2").is_file()


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o1755, 0o1775, 0o1777, 0o1703])
@pytest.mark.parametrize("owner", [0, STRANGER])
def test_links_count_as_planted_where_the_kernel_takes_them_for_it(shared: Path, mode: int, owner: int) -> None:
    """In directories that are sticky and writable by anybody, if neither this user nor the directory's made them."""
    leads = shared / "leads"
    leads.mkdir()
    os.chown(leads, STRANGER, STRANGER)
    link = strangers_link(shared / "d", leads)
    os.chown(shared, owner, owner)
    shared.chmod(mode)
    if mode in (0o1777, 0o1703) and owner == 0:
        with pytest.raises(AccessError, match="in a world-writable directory"):
            targets.locate(str(link / "t.qcow2"))
        return
    directory, name = targets.locate(str(link / "t.qcow2"))
    with directory:
        assert (directory.path, name) == (str(leads), "t.qcow2")


@pytest.mark.parametrize("through", ["itself", "directory"])
def test_a_strangers_link_does_not_lead_to_directories_of_others(disk: Path, tmp_path: Path, through: str) -> None:
    own, secret = tmp_path / "bob", tmp_path / "secret"
    for path in (own, secret):
        path.mkdir()
    os.chown(own, STRANGER, STRANGER)
    (secret / "made.qcow2").write_bytes(OLD)
    path = (
        strangers_link(own / "t.qcow2", secret / "made.qcow2")
        if through == "itself"
        else strangers_link(own / "d", secret) / "made.qcow2"
    )
    for force in (False, True):
        with pytest.raises(AccessError, match=f"user {STRANGER}, and leads to a directory of user 0"):
            api.convert(str(disk), str(path), target_format="qcow2", force=force)
    with pytest.raises(AccessError, match="leads to a directory"):
        api.fanout(str(disk), ["vdi"], directory=str(strangers_link(own / "e", secret)))
    assert [(each.name, each.read_bytes()) for each in secret.iterdir()] == [("made.qcow2", OLD)]


@pytest.mark.parametrize("path", ["loop.qcow2", "gone/t.qcow2", "disk.raw/t.qcow2"])
def test_a_target_path_that_leads_nowhere_is_a_plan_error(disk: Path, path: str) -> None:
    (disk.parent / "loop.qcow2").symlink_to("loop.qcow2")
    with pytest.raises(PlanError):
        api.convert(str(disk), str(disk.parent / path))


@pytest.mark.parametrize("spelling", ["{0}/x/../t.qcow2", "{0}//./t.qcow2", "{0}/x/./../t.qcow2"])
def test_a_path_is_resolved_as_the_kernel_does(disk: Path, spelling: str) -> None:
    (disk.parent / "x").mkdir()
    directory, name = targets.locate(spelling.format(disk.parent))
    with directory:
        assert (directory.path, name) == (str(disk.parent), "t.qcow2")


def test_a_directory_that_is_exchanged_meanwhile_gets_nothing_elsewhere(disk: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    place = tmp_path / "place"
    place.mkdir()
    moved = tmp_path / "moved"

    def exchange(_plan: object) -> None:
        place.rename(moved)
        place.symlink_to(elsewhere)

    api.convert(str(disk), str(place / "t.qcow2"), announce=exchange)
    assert [path.name for path in moved.iterdir()] == ["t.qcow2"]
    assert not list(elsewhere.iterdir())


# What cannot be replaced


@contextmanager
def flagged(path: Path, flag: str) -> Iterator[None]:
    if subprocess.run(["chattr", f"+{flag}", path], capture_output=True, check=False).returncode:
        pytest.skip(f"this filesystem has no flag {flag}")
    try:
        yield
    finally:
        subprocess.run(["chattr", f"-{flag}", path], check=True)


@contextmanager
def mounted(path: Path) -> Iterator[None]:
    """Makes a file a mount point of its own, as containers do with single files."""
    other = path.with_name("other")
    other.write_bytes(OLD)
    if subprocess.run(["mount", "--bind", other, path], capture_output=True, check=False).returncode:
        pytest.skip("cannot mount")
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


@contextmanager
def in_a_loop_device(path: Path, *arguments: str) -> Iterator[None]:
    os.truncate(path, MIB)
    done = subprocess.run(["losetup", "-f", "--show", *arguments, path], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no loop device")
    try:
        yield
    finally:
        subprocess.run(["losetup", "-d", done.stdout.strip()], check=True)


@contextmanager
def open_for_writing(path: Path) -> Iterator[None]:
    with path.open("r+b"):
        yield


@contextmanager
def in_use_by_us(path: Path) -> Iterator[None]:
    """Another vmconv that reads it."""
    from vmconv.io.opener import Opener
    from vmconv.io.registry import installed

    with Opener(installed()) as opener:
        opener.file(str(path))
        yield


STATES: dict[str, Callable[[Path], Any]] = {
    "immutable": lambda path: flagged(path, "i"),
    "append-only": lambda path: flagged(path, "a"),
    "mount point": mounted,
    "/dev/loop|another process": in_a_loop_device,
    "/dev/loop": lambda path: in_a_loop_device(path, "--read-only"),
    "open in another process": open_for_writing,
    "another process": in_use_by_us,
}


@pytest.mark.parametrize("words", STATES)
def test_an_irreplaceable_target_is_refused_before_any_work(
    disk: Path, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = disk.with_name("t.qcow2")
    target.write_bytes(OLD)
    written, inode = untouched(monkeypatch), target.stat().st_ino
    with STATES[words](target):
        before = set(os.listdir(disk.parent))
        for share in (False, True):
            with pytest.raises(VmconvError, match=words):
                api.convert(str(disk), str(target), force=True, force_share=share)
        assert set(os.listdir(disk.parent)) == before
    assert target.stat().st_ino == inode
    assert not written


@pytest.mark.parametrize("words", ["immutable", "append-only"])
def test_a_plan_reports_it_too(disk: Path, words: str) -> None:
    target = disk.with_name("t.qcow2")
    target.write_bytes(OLD)
    with STATES[words](target), pytest.raises(VmconvError, match=words):
        api.plan(str(disk), str(target), force=True)


def test_swap_space_is_not_replaced(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = disk.with_name("t.qcow2")
    target.write_bytes(OLD)
    text = targets._text

    def swaps(path: str) -> str:
        return f"Filename Type Size Used Priority\n{target} file 1 0 -2\n" if path == "/proc/swaps" else text(path)

    monkeypatch.setattr(targets, "_text", swaps)
    with pytest.raises(AccessError, match="in use as swap"):
        api.convert(str(disk), str(target), force=True)


@pytest.mark.parametrize(("flag", "words"), [("i", "immutable"), ("a", "append-only")])
def test_a_directory_that_cannot_be_changed_is_refused_before_any_work(
    disk: Path, flag: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = disk.with_name("t.qcow2")
    target.write_bytes(OLD)
    written = untouched(monkeypatch)
    with flagged(disk.parent, flag), pytest.raises(VmconvError, match=words):
        api.convert(str(disk), str(target), force=True)
    assert not written


def as_user(action: Callable[[], None]) -> None:
    """Does something as another user, in a process of its own."""
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setgroups([])
            os.setgid(STRANGER)
            os.setuid(STRANGER)
            action()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A directory that every user reaches: pytest keeps its own ones from others."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def test_another_users_file_in_a_sticky_directory_is_refused_before_any_work(reachable: Path) -> None:
    shared = reachable / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "t.qcow2").write_bytes(OLD)
    (shared / "t.qcow2").chmod(0o666)

    def refused() -> None:
        with (
            Directory.at(str(shared)) as directory,
            pytest.raises(PlanError, match="sticky"),
            targets.claim_for_replacement(directory, "t.qcow2"),
        ):
            raise AssertionError

    def claimed() -> None:
        with Directory.at(str(shared)) as directory, targets.claim_for_replacement(directory, "t.qcow2"):
            pass

    as_user(refused)
    claimed()
    shared.chmod(0o777)
    as_user(claimed)
    shared.chmod(0o1777)
    os.chown(shared / "t.qcow2", STRANGER, STRANGER)
    as_user(claimed)


def test_a_directory_without_standard_input_is_left_behind(tmp_path: Path) -> None:
    """It may have any number, that of a closed stream too."""
    kept = os.dup(0)
    try:
        os.close(0)
        assert os.open(tmp_path, os.O_PATH) == 0
        os.close(targets._enter(".", 0, leave=0))
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(0)
    finally:
        os.dup2(kept, 0)
        os.close(kept)


def test_a_directory_that_may_not_be_listed_gets_images(reachable: Path) -> None:
    disk = make_disk(reachable / "disk.raw", MIB)
    box = reachable / "box"

    def make() -> None:
        api.fanout(str(disk), ["vmdk", "vdi"], directory=str(box))
        for force in (False, True):
            api.convert(str(disk), str(box / "t.qcow2"), force=force)

    # As root first: the other user may not be able to import from where the modules are.
    box.mkdir()
    make()
    for path in box.iterdir():
        path.unlink()
    os.chown(box, STRANGER, STRANGER)
    box.chmod(0o300)
    as_user(make)
    assert sorted(os.listdir(box)) == ["disk.vdi", "disk.vmdk", "t.qcow2"]


# Who may open what is made


@pytest.mark.parametrize(
    ("source", "mask", "made"),
    [(0o644, 0o022, 0o644), (0o600, 0o022, 0o600), (0o640, 0o022, 0o640), (0o666, 0o002, 0o664), (0o644, 0o077, 0o600)],
)
@pytest.mark.parametrize("unnamed", [True, False])
def test_a_new_image_is_never_readable_by_more_people_than_its_source(
    disk: Path, monkeypatch: pytest.MonkeyPatch, source: int, mask: int, made: int, unnamed: bool
) -> None:
    if not unnamed:

        def refuse(_self: Directory) -> int:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(Directory, "create_unnamed", refuse)
    disk.chmod(source)
    before = os.umask(mask)
    try:
        api.convert(str(disk), str(disk.with_name("t.qcow2")))
        api.fanout(str(disk), ["vmdk", "vdi"], directory=str(disk.parent))
    finally:
        os.umask(before)
    assert {mode(disk.with_name(name)) for name in ("t.qcow2", "disk.vmdk", "disk.vdi")} == {made}


def test_the_strictest_layer_counts(disk: Path) -> None:
    from support import qcow2_images

    overlay = disk.with_name("overlay.qcow2")
    overlay.write_bytes(qcow2_images.empty_overlay("disk.raw", cluster_bits=16))
    disk.chmod(0o600)
    overlay.chmod(0o644)
    api.convert(str(overlay), str(disk.with_name("t.raw")))
    assert mode(disk.with_name("t.raw")) == 0o600


def test_a_group_that_is_not_the_sources_gets_no_more_than_everybody(disk: Path) -> None:
    disk.chmod(0o640)
    os.chown(disk, 0, STRANGER)
    api.convert(str(disk), str(disk.with_name("t.qcow2")))
    assert mode(disk.with_name("t.qcow2")) == 0o600


def test_a_replaced_image_keeps_its_owner_and_mode(disk: Path) -> None:
    target = disk.with_name("t.qcow2")
    target.write_bytes(OLD)
    os.chown(target, STRANGER, STRANGER)
    target.chmod(0o640)
    os.setxattr(target, "user.note", b"kept")
    api.convert(str(disk), str(target), force=True)
    status = target.stat()
    assert (status.st_uid, status.st_gid, mode(target)) == (STRANGER, STRANGER, 0o640)
    assert os.getxattr(target, "user.note") == b"kept"


def others_base(shared: Path) -> Path:
    """Returns an overlay of a stranger's on a private disk that is this user's."""
    base = make_disk(shared / "private.raw", MIB)
    base.chmod(0o600)
    overlay = shared / "overlay.qcow2"
    overlay.write_bytes(qcow2_images.empty_overlay(base.name))
    os.chown(overlay, STRANGER, STRANGER)
    return overlay


def planted(path: Path, owner: int) -> Path:
    path.write_bytes(OLD)
    os.chown(path, owner, owner)
    path.chmod(0o666)
    return path


@pytest.mark.parametrize("options", [{}, {"subformat": "monolithicFlat"}])
def test_a_private_base_is_not_copied_into_a_file_of_a_user_without_access(
    shared: Path, options: dict[str, str]
) -> None:
    overlay, target = others_base(shared), planted(shared / "t.vmdk", STRANGER)
    planted(shared / "t-flat.vmdk", STRANGER)
    with pytest.raises(AccessError, match=f"user {STRANGER}, who may not read .*private.raw"):
        api.convert(str(overlay), str(target), force=True, options=options)
    assert target.read_bytes() == OLD
    assert not list(shared.glob(".vmconv-*"))
    api.convert(str(overlay), str(target), force=True, mode=0o600, options=options)
    assert (target.stat().st_uid, mode(target)) == (STRANGER, 0o600)


def test_a_private_base_makes_a_replaced_image_private(shared: Path) -> None:
    overlay, target = others_base(shared), planted(shared / "t.qcow2", os.geteuid())
    api.convert(str(overlay), str(target), force=True)
    assert mode(target) == 0o600


def test_the_target_of_a_strangers_link_counts_as_the_strangers(shared: Path) -> None:
    secret = make_disk(shared.parent / "secret.raw", MIB)
    secret.chmod(0o600)
    target = planted(shared / "t.qcow2", STRANGER)
    os.chown(shared, STRANGER, STRANGER)
    with pytest.raises(AccessError, match="who may not read"):
        api.convert(str(strangers_link(shared / "d.raw", secret)), str(target), force=True)
    assert target.read_bytes() == OLD


@pytest.mark.parametrize("force", [False, True])
def test_the_mode_can_be_requested(disk: Path, force: bool) -> None:
    target = disk.with_name("t.qcow2")
    if force:
        target.write_bytes(OLD)
    disk.chmod(0o600)
    api.convert(str(disk), str(target), force=force, mode=0o664)
    assert mode(target) == 0o664


@pytest.mark.parametrize("wrong", [0o1777, -1, "0644"])
def test_a_mode_is_permission_bits(disk: Path, wrong: Any) -> None:
    with pytest.raises(UsageError):
        api.convert(str(disk), str(disk.with_name("t.qcow2")), mode=wrong)


def test_an_umask_that_takes_everything_does_not_stop_a_conversion(disk: Path) -> None:
    before = os.umask(0o777)
    try:
        api.fanout(str(disk), ["qcow2", "vmdk"], directory=str(disk.parent))
        api.convert(str(disk), str(disk.with_name("disk.vdi")), mode=0o600)
    finally:
        os.umask(before)
    assert mode(disk.with_name("disk.vdi")) == 0o600
    assert not mode(disk.with_name("disk.qcow2")) & 0o077


# Btrfs: what is copied on write and what is not


def chattr(path: Path, flag: str) -> None:
    subprocess.run(["chattr", flag, path], check=True)


def nocow_disk(path: Path) -> Path:
    path.touch()
    chattr(path, "+C")
    with path.open("r+b") as file:
        file.write(os.urandom(MIB))
    return path


@pytest.mark.parametrize("nocow_source", [True, False])
@pytest.mark.parametrize("place", ["plain", "nocow", "compressed"])
def test_payload_is_shared_between_directories_that_are_not_alike(
    btrfs_dir: Path, nocow_source: bool, place: str
) -> None:
    pool = btrfs_dir / "pool"
    pool.mkdir()
    if place == "nocow":
        chattr(pool, "+C")
    elif place == "compressed":
        chattr(pool, "+c")
    source = btrfs_dir / "disk.raw"
    if nocow_source:
        nocow_disk(source)
    else:
        source.write_bytes(os.urandom(MIB))
    result = api.convert(str(source), str(pool / "disk.qcow2"), zero_copy="require")
    assert result.totals.shared == MIB
    assert api.prove(str(source), str(pool / "disk.qcow2"))


def test_a_mixed_source_is_explained(btrfs_dir: Path) -> None:
    nocow_disk(btrfs_dir / "b.raw")
    (btrfs_dir / "a.raw").write_bytes(os.urandom(4 * MIB))
    flat = "\n".join(
        [
            "# Disk DescriptorFile",
            "version=1",
            "CID=12345678",
            "parentCID=ffffffff",
            'createType="twoGbMaxExtentFlat"',
            f'RW {4 * MIB // 512} FLAT "a.raw" 0',
            f'RW {MIB // 512} FLAT "b.raw" 0',
        ]
    )
    (btrfs_dir / "both.vmdk").write_text(flat + "\n")
    plan = api.plan(str(btrfs_dir / "both.vmdk"), str(btrfs_dir / "t.qcow2"))
    (copy,) = plan.copies
    assert copy.bytes == MIB
    assert "b.raw is not copied on write (chattr +C) and most payload is copied on write" in copy.reason


@pytest.mark.parametrize("trust", [False, True])
def test_a_file_of_no_set_is_not_completed(tmp_path: Path, trust: bool) -> None:
    (tmp_path / "disk").write_bytes(b"disk")
    for path in ("disk", "none", "none/disk"):
        assert not targets.finish_set(str(tmp_path / path), trust=trust)
    assert os.listdir(tmp_path) == ["disk"]
