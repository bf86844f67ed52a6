"""New files before and while they are named, call by call (`vmconv.backends.temporary`, `naming`, `files`)."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmconv.backends import naming, targets
from vmconv.backends.copy import CopyBackend
from vmconv.backends.files import FileTransaction, unnamed_sources
from vmconv.backends.naming import Named, Set
from vmconv.backends.reflink import ReflinkBackend
from vmconv.backends.temporary import Temporary, is_temporary, is_unnamed, remove_stale, rename, temporary_name
from vmconv.errors import AccessError, BackendError, ImageError
from vmconv.interface.backend import DEFAULT_ACCESS, Access, Capabilities
from vmconv.io import attributes, locks, ownership
from vmconv.io.directory import Directory
from vmconv.model.sources import File
from vmconv.system import linux

NUMBERS = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EMLINK, errno.EXDEV)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    with Directory.at(str(tmp_path)) as found:
        yield found


def failing(number: int) -> Callable[..., Any]:
    def fail(*_arguments: object, **_more: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


@pytest.fixture
def named_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files have to have names."""
    monkeypatch.setattr(Directory, "create_unnamed", failing(errno.EOPNOTSUPP))


# -- temporary names


def test_temporary_names_are_known_by_their_target() -> None:
    name = temporary_name("disk.vmdk")
    assert len(name) == 28
    assert name != temporary_name("disk.vmdk")
    assert name[:16] == temporary_name("disk.vmdk")[:16] != temporary_name("disk.vmdx")[:16]
    assert is_temporary(name)
    assert not any(map(is_temporary, ["x" + name, name + "x", name.upper(), "disk.vmdk", ".vmconv-0.tmp"]))
    assert is_unnamed("/tmp/" + name)
    assert is_unnamed("/tmp/#123 (deleted)")
    assert not any(map(is_unnamed, ["/tmp/disk", "/tmp/#12", "/tmp/#1 (deleted)x", "/tmp/disk (deleted)"]))


def test_only_dead_runs_files_of_these_targets_are_removed(tmp_path: Path, directory: Directory) -> None:
    dead, other, needed, living, link = (temporary_name(each) for each in ("a", "b", "a", "a", "a"))
    for name in (dead, other, needed, living, "a"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / link).symlink_to("a")
    descriptor = os.open(tmp_path / living, os.O_RDWR)
    locks.own(descriptor)
    before = descriptors()
    assert remove_stale(directory, ["a"], [needed]) == [dead]
    assert descriptors() == before
    assert names(tmp_path) == sorted([other, needed, living, link, "a"])
    os.close(descriptor)
    assert sorted(remove_stale(directory, ["c", "a"])) == sorted([needed, living])
    assert remove_stale(directory, ["c"]) == []
    assert remove_stale(directory, ["b"]) == [other]


@pytest.mark.parametrize(
    ("number", "raised"), [(errno.EACCES, False), (errno.EPERM, False), (errno.EBADF, False), (errno.EIO, True)]
)
def test_a_directory_may_not_be_listed(
    directory: Directory, monkeypatch: pytest.MonkeyPatch, number: int, raised: bool
) -> None:
    monkeypatch.setattr(Directory, "names", failing(number))
    for ask in (remove_stale, naming.finish):
        if raised:
            with pytest.raises(OSError, match="error"):
                ask(directory, ["a"])
        else:
            assert ask(directory, ["a"]) == []


def test_a_file_that_another_run_removes_first_is_not_reported_as_removed(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / temporary_name("a")).write_bytes(b"x")
    monkeypatch.setattr(Directory, "unlink", failing(errno.ENOENT))
    assert remove_stale(directory, ["a"]) == []


# -- one file


def test_a_new_file_is_private_and_locked_and_has_no_name(tmp_path: Path, directory: Directory) -> None:
    before = descriptors()
    file = Temporary(directory, "disk")
    assert names(tmp_path) == []
    assert (file.name, file.target, file.known_by) == (None, "disk", "disk")
    assert stat.S_IMODE(os.fstat(file.descriptor).st_mode) == 0o600
    assert file.inode == os.fstat(file.descriptor).st_ino
    again = file.reopened(os.O_RDONLY)
    assert os.fstat(again).st_ino == file.inode
    assert locks.may_be_owned(again)
    assert not os.get_inheritable(again)
    os.close(again)
    file.appear(replace=False)
    assert names(tmp_path) == ["disk"]
    file.remove()
    assert names(tmp_path) == ["disk"]
    file.close()
    assert (file.descriptor, descriptors()) == (-1, before)
    file.close()


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("unnamed", [True, False])
def test_an_existing_name_is_replaced_only_on_request(
    tmp_path: Path, directory: Directory, request: pytest.FixtureRequest, *, replace: bool, unnamed: bool
) -> None:
    if not unnamed:
        request.getfixturevalue("named_only")
    (tmp_path / "disk").write_bytes(b"old")
    file = Temporary(directory, "disk")
    os.write(file.descriptor, b"new")
    if replace:
        file.appear(replace=True)
        assert file.name == "disk"
    else:
        with pytest.raises(FileExistsError):
            file.appear(replace=False)
    file.remove()
    file.close()
    assert names(tmp_path) == ["disk"]
    assert (tmp_path / "disk").read_bytes() == (b"new" if replace else b"old")


def test_a_temporary_name_is_removed_when_the_file_is_named(
    tmp_path: Path, directory: Directory, named_only: None
) -> None:
    file = Temporary(directory, "disk")
    file.appear(replace=False)
    assert (file.name, names(tmp_path)) == ("disk", ["disk"])
    file.close()


def test_a_named_file_is_removed_unless_it_is_left(tmp_path: Path, directory: Directory, named_only: None) -> None:
    for left in (False, True):
        file = Temporary(directory, "disk", known_by="other")
        assert file.name is not None
        assert names(tmp_path) == [file.name]
        assert file.name[:16] == temporary_name("other")[:16]
        assert file.named() == file.name
        assert locks.may_be_owned(os.open(tmp_path / file.name, os.O_RDONLY))
        if left:
            file.leave()
        file.remove()
        assert bool(names(tmp_path)) is left
        file.remove()
        file.close()


def test_a_file_may_have_a_certain_name(tmp_path: Path, directory: Directory) -> None:
    file = Temporary(directory, "disk", "certain")
    assert (file.name, names(tmp_path)) == ("certain", ["certain"])
    (tmp_path / "certain").unlink()
    file.remove()
    file.close()


def test_an_unnamed_file_is_given_a_temporary_name_once(tmp_path: Path, directory: Directory) -> None:
    file = Temporary(directory, "disk", known_by="other")
    name = file.named()
    assert (file.named(), names(tmp_path)) == (name, [name])
    assert name[:16] == temporary_name("other")[:16]
    file.close()


@pytest.mark.parametrize(
    ("number", "raised"),
    [(errno.EOPNOTSUPP, False), (errno.EISDIR, False), (errno.ENOENT, False), (errno.EINVAL, False), (errno.EIO, True)],
)
def test_filesystems_may_have_no_unnamed_files(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch, number: int, raised: bool
) -> None:
    monkeypatch.setattr(Directory, "create_unnamed", failing(number))
    if raised:
        with pytest.raises(OSError, match="error"):
            Temporary(directory, "disk")
        return
    file = Temporary(directory, "disk")
    assert names(tmp_path) == [file.name]
    file.close()


def test_without_proc_files_have_names(tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "exists", lambda path: path != "/proc/self/fd")
    file = Temporary(directory, "disk")
    assert names(tmp_path) == [file.name]
    file.close()


@pytest.mark.parametrize("unnamed", [True, False])
def test_a_file_that_cannot_be_locked_is_removed(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch, unnamed: bool
) -> None:
    if not unnamed:
        monkeypatch.setattr(Directory, "create_unnamed", failing(errno.EINVAL))
    monkeypatch.setattr(locks, "own", failing(errno.ENOLCK))
    before = descriptors()
    with pytest.raises(OSError, match="lock"):
        Temporary(directory, "disk")
    assert (names(tmp_path), descriptors()) == ([], before)
    if not unnamed:
        monkeypatch.setattr(Directory, "unlink", failing(errno.EIO))
        with pytest.raises(OSError, match="lock"):
            Temporary(directory, "disk")
        assert descriptors() == before


def test_a_file_that_was_removed_before_it_was_locked_is_made_again(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch, named_only: None
) -> None:
    own, made = locks.own, []

    def removing(descriptor: int) -> None:
        made.append(descriptor)
        if len(made) == 1:
            for name in names(tmp_path):
                (tmp_path / name).unlink()
        own(descriptor)

    monkeypatch.setattr(locks, "own", removing)
    before = descriptors()
    file = Temporary(directory, "disk")
    assert len(made) == 2
    assert names(tmp_path) == [file.name]
    file.close()
    assert descriptors() == before


def test_a_trial_shows_whether_files_can_be_renamed(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch, named_only: None
) -> None:
    monkeypatch.setattr(Directory, "rename", failing(errno.EACCES))
    with pytest.raises(OSError, match="denied"):
        Temporary(directory, "disk")
    assert names(tmp_path) == []


# -- other names


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("links", [True, False])
def test_without_an_atomic_rename_another_way_keeps_existing_files(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch, number: int, links: bool
) -> None:
    real = Directory.rename

    def renamed(self: Directory, old: str, new: str, *, replace: bool) -> None:
        if not replace:
            raise OSError(number, os.strerror(number))
        real(self, old, new, replace=True)

    monkeypatch.setattr(Directory, "rename", renamed)
    if not links:
        monkeypatch.setattr(Directory, "link", failing(number))
    (tmp_path / "old").write_bytes(b"old")
    rename(directory, "old", "new", replace=False)
    assert names(tmp_path) == ["new"]
    (tmp_path / "old").write_bytes(b"other")
    with pytest.raises(FileExistsError) as caught:
        rename(directory, "old", "new", replace=False)
    assert links or (caught.value.errno, caught.value.filename) == (errno.EEXIST, str(tmp_path / "new"))
    assert (tmp_path / "new").read_bytes() == b"old"
    rename(directory, "old", "new", replace=True)
    assert (names(tmp_path), (tmp_path / "new").read_bytes()) == (["new"], b"other")


@pytest.mark.parametrize("call", ["rename", "link"])
def test_other_errors_of_naming_are_errors(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    (tmp_path / "old").write_bytes(b"old")
    monkeypatch.setattr(Directory, "rename", failing(errno.EINVAL))
    monkeypatch.setattr(Directory, call, failing(errno.EIO))
    monkeypatch.setattr(Directory, "has", lambda *_arguments: pytest.fail("went on"))
    with pytest.raises(OSError, match="error"):
        rename(directory, "old", "new", replace=False)
    assert names(tmp_path) == ["old"]


# -- several files


def made(directory: Directory, *targets: str) -> list[Temporary]:
    files = [Temporary(directory, target) for target in targets]
    for file in files:
        os.write(file.descriptor, file.target.encode())
    return files


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("replace", [True, False])
def test_a_set_gets_its_names(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch, durable: bool, replace: bool
) -> None:
    assert ownership.can_mark()
    log: list[str] = []
    for owner, call in ((os, "fsync"), (Directory, "sync"), (Directory, "unlink")):
        real = getattr(owner, call)

        def noted(*arguments: Any, call: str = call, real: Callable[..., Any] = real) -> Any:
            log.append(call + (f" {arguments[1]}" if call == "unlink" and arguments[1] in "abc" else ""))
            return real(*arguments)

        monkeypatch.setattr(owner, call, noted)
    if replace:
        for name in "abc":
            (tmp_path / name).write_bytes(b"old")
    before = descriptors()
    files = made(directory, *"abc")
    naming.commit(directory, files, replace=replace, durable=durable)
    assert names(tmp_path) == ["a", "b", "c"]
    assert [(tmp_path / name).read_bytes() for name in "abc"] == [b"a", b"b", b"c"]
    assert all(file.name is None for file in files)
    for file in files:
        file.close()
    assert descriptors() == before
    # Directory.sync calls fsync.
    sync = ["sync", "fsync"] if durable else []
    old = ["unlink c", "unlink b", *sync] if replace else []
    assert log == [*(["fsync"] if durable else []), *sync, *old, *sync, "unlink"]


def test_a_taken_name_is_refused_before_anything_is_done(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").write_bytes(b"old")
    files = made(directory, *"ab")
    monkeypatch.setattr(naming, "_journal", lambda *_arguments, **_more: pytest.fail("begun"))
    with pytest.raises(BackendError, match="b: already exists"):
        naming.commit(directory, files, replace=False, durable=True)
    assert names(tmp_path) == ["b"]
    for file in files:
        file.close()


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("number", [errno.EIO, errno.EEXIST])
def test_a_failed_set_is_rolled_back_or_can_be_completed(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch, *, replace: bool, at: int, number: int
) -> None:
    real, left = rename, [at]

    def renamed(place: Directory, old: str, new: str, *, replace: bool) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise OSError(number, os.strerror(number))
        real(place, old, new, replace=replace)

    files = made(directory, *"abc")
    monkeypatch.setattr(naming, "rename", renamed)
    if replace or number == errno.EEXIST:
        with pytest.raises(
            BackendError, match="new files under their final names: " if replace else "c: already exists"
        ):
            naming.commit(directory, files, replace=replace, durable=False)
    else:
        with pytest.raises(OSError, match="error"):
            naming.commit(directory, files, replace=replace, durable=False)
    for file in files:
        file.remove()
        file.close()
    if not replace:
        assert names(tmp_path) == []
        return
    there = ["a", "b", "c"][:at]
    assert [name for name in names(tmp_path) if name in "abc"] == there
    assert len(naming.needed(directory)) == 3
    assert naming.finish(directory, ["x"]) == []
    assert naming.finish(directory, ["x", "b"]) == ["a", "b", "c"]
    assert names(tmp_path) == ["a", "b", "c"]
    assert naming.needed(directory) == set()
    assert naming.finish(directory, ["b"]) == []


def test_a_failed_rollback_can_be_completed(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_names: list[str] = []

    def renamed(place: Directory, old: str, new: str, *, replace: bool) -> None:
        if made_names:
            raise OSError(errno.EIO, "broken")
        made_names.append(new)
        rename(place, old, new, replace=replace)

    files = made(directory, *"ab")
    monkeypatch.setattr(naming, "rename", renamed)
    with pytest.raises(BackendError, match="new files under their final names: a, missing: b: broken"):
        naming.commit(directory, files, replace=False, durable=False)
    monkeypatch.undo()
    for file in files:
        file.remove()
        file.close()
    assert naming.finish(directory, ["a"]) == ["a", "b"]
    assert names(tmp_path) == ["a", "b"]


def test_a_journal_that_may_not_survive_is_removed(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = made(directory, *"ab")
    assert ownership.can_mark()
    monkeypatch.setattr(Directory, "sync", failing(errno.EIO))
    with pytest.raises(OSError, match="error"):
        naming.commit(directory, files, replace=False, durable=True)
    for file in files:
        assert file.name is not None
        file.remove()
        file.close()
    assert names(tmp_path) == []


def journal(directory: Directory, wanted: Set, **changed: bytes) -> Path:
    """Writes the journal of a set; parts of it may be changed."""
    data = bytearray(naming._with_head(directory, wanted.encoded()))
    for part, place in (("magic", 0), ("digest", 64), ("mark", 96)):
        if part in changed:
            data[place : place + 1] = changed[part]
    path = Path(directory.path, ".vmconv-0123456789abcdef.names")
    path.write_bytes(bytes(data))
    path.chmod(0o600)
    return path


def set_of(place: Path, *targets: str, replace: bool = False) -> Set:
    files = []
    for target in targets:
        name = temporary_name(target)
        (place / name).write_bytes(os.fsencode(target))
        files.append(Named(name, (place / name).stat().st_ino, target))
    return Set(tuple(files), replace)


@pytest.mark.parametrize("replace", [True, False])
def test_a_set_is_read_as_it_was_written(tmp_path: Path, directory: Directory, replace: bool) -> None:
    wanted = set_of(tmp_path, "a", "\udcff", replace=replace)
    assert naming._parse(wanted.encoded()) == wanted
    assert wanted.names == ["a", "\udcff"]
    before = descriptors()
    journal(directory, wanted)
    assert naming.needed(directory) == {file.temporary for file in wanted.files}
    assert naming.finish(directory, ["a"]) == ["a", "\udcff"]
    assert sorted(map(os.fsencode, os.listdir(tmp_path))) == [b"a", b"\xff"]
    assert descriptors() == before


@pytest.mark.parametrize("part", ["magic", "digest"])
def test_an_invalid_journal_is_left_alone(tmp_path: Path, directory: Directory, part: str) -> None:
    path = journal(directory, set_of(tmp_path, "a"), **{part: b"?"})
    assert naming.finish(directory, ["a"], trust=True) == []
    assert naming.needed(directory) == set()
    path.write_bytes(path.read_bytes()[:127])
    assert naming.finish(directory, ["a"], trust=True) == []


def test_a_journal_without_the_users_mark_must_be_trusted(tmp_path: Path, directory: Directory) -> None:
    journal(directory, set_of(tmp_path, "a"), mark=b"?")
    with pytest.raises(AccessError, match="lacks the mark of this user's vmconv"):
        naming.finish(directory, ["a"])
    assert naming.finish(directory, ["b"]) == []
    assert naming.finish(directory, ["a"], trust=True) == ["a"]


def test_a_journal_writable_by_others_must_be_trusted(tmp_path: Path, directory: Directory) -> None:
    path = journal(directory, set_of(tmp_path, "a"))
    for number in range(8):
        (tmp_path / f".vmconv-{number:016x}.names").symlink_to("nowhere")
    path.chmod(0o602)
    before = descriptors()
    assert naming.finish(directory, ["a"]) == []
    assert naming.needed(directory) == set()
    assert descriptors() == before
    assert naming.finish(directory, ["a"], trust=True) == ["a"]


def test_a_set_that_is_being_made_is_waited_for(tmp_path: Path, directory: Directory) -> None:
    path = journal(directory, set_of(tmp_path, "a"))
    descriptor = os.open(path, os.O_RDWR)
    locks.own(descriptor)
    with pytest.raises(AccessError, match="another process is writing it"):
        naming.finish(directory, ["a"])
    os.close(descriptor)


def test_journals_are_bounded(tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    path = journal(directory, set_of(tmp_path, "a"))
    monkeypatch.setattr(naming, "_MAX_SIZE", path.stat().st_size - 1)
    assert naming.finish(directory, ["a"]) == []
    monkeypatch.setattr(naming, "_MAX_SIZE", path.stat().st_size)
    assert naming.finish(directory, ["a"]) == ["a"]


# Of a fixed number: the names of the tests are the same in every process.
TEMPORARY = temporary_name("a")[:-12].encode() + b"01234567.tmp"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"new",
        b"old\0" + TEMPORARY + b"\0001\0a\0",
        b"new\0" + TEMPORARY + b"\0001\0",
        b"new\0" + TEMPORARY + b"\0001\0\0",
        b"new\0" + TEMPORARY + b"\0001\0.\0",
        b"new\0" + TEMPORARY + b"\0001\0..\0",
        b"new\0" + TEMPORARY + b"\0001\0a/b\0",
        b"new\0" + TEMPORARY + b"\000-1\0a\0",
        b"new\0" + TEMPORARY + b"\000x\0a\0",
        b"new\0disk\0001\0a\0",
    ],
)
def test_invalid_bytes_are_no_set(body: bytes) -> None:
    assert naming._parse(body) is None


def test_fields_of_a_set() -> None:
    found = naming._parse(b"replace\0" + TEMPORARY + b"\0007\0a\0")
    assert found == Set((Named(TEMPORARY.decode(), 7, "a"),), True)
    assert naming._parse(b"new\0") == Set((), False)


def test_missing_files_are_reported(tmp_path: Path, directory: Directory) -> None:
    wanted = set_of(tmp_path, "a", "b")
    journal(directory, wanted)
    (tmp_path / wanted.files[1].temporary).unlink()
    with pytest.raises(ImageError, match="b: is missing from the images"):
        naming.finish(directory, ["a"])


def test_an_exchanged_file_gets_no_name(tmp_path: Path, directory: Directory) -> None:
    wanted = set_of(tmp_path, "a", "b")
    wrong = Set((wanted.files[0]._replace(inode=1), wanted.files[1]), False)
    journal(directory, wrong)
    with pytest.raises(ImageError, match="a: is missing"):
        naming.finish(directory, ["a"])
    assert not (tmp_path / "a").exists()


def test_files_that_appeared_meanwhile_are_kept(tmp_path: Path, directory: Directory) -> None:
    journal(directory, set_of(tmp_path, "a", "b"))
    (tmp_path / "b").write_bytes(b"old")
    with pytest.raises(BackendError, match="b: was created before"):
        naming.finish(directory, ["a"])
    assert (tmp_path / "b").read_bytes() == b"old"


# -- transactions


@pytest.mark.parametrize("mode", [0o640, 0o4755, None])
def test_a_new_file_has_the_access_it_is_given(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch, mode: int | None
) -> None:
    confined: list[tuple[int, list[int]]] = []
    monkeypatch.setattr(attributes, "confine", lambda place, sources, _new: confined.append((place, sources)))
    (tmp_path / "source").write_bytes(b"")
    source = File("source", os.open(tmp_path / "source", os.O_RDONLY))
    transaction = FileTransaction(directory, force=False, durable=False, access=Access((source,), mode))
    transaction.create("disk", 5, [])
    found = stat.S_IMODE(os.fstat(transaction._outputs[0].descriptor).st_mode)
    assert found == (0o600 if mode is None else mode & 0o777)
    assert confined == ([(directory.descriptor, [source.descriptor])] if mode is None else [])
    transaction.abort()
    source.close()


@pytest.mark.parametrize("mode", [None, 0o640])
@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_a_file_that_replaces_another_carries_its_attributes(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch, *, mode: int | None, force: bool, there: bool
) -> None:
    carried: list[int] = []

    def carry(old: int, _new: int, _others: Iterable[int] = ()) -> tuple[str, ...]:
        carried.append(os.fstat(old).st_ino)
        return ("label",)

    monkeypatch.setattr(attributes, "carry", carry)
    if there:
        (tmp_path / "disk").write_bytes(b"old")
    before = descriptors()
    transaction = FileTransaction(directory, force=force, durable=False, access=Access(mode=mode))
    transaction.create("disk", 5, [])
    assert carried == ([(tmp_path / "disk").stat().st_ino] if force and there else [])
    if mode is not None:
        assert stat.S_IMODE(os.fstat(transaction._outputs[0].descriptor).st_mode) == mode
    transaction.abort()
    assert descriptors() == before


@pytest.mark.parametrize("why", [None, PermissionError(), AccessError("a link"), "moved"], ids=str)
def test_sources_that_the_user_did_not_name_are_others(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch, why: Exception | str | None
) -> None:
    files = []
    for name in ("top", "base", "foreign"):
        (tmp_path / name).write_bytes(b"")
        files.append(File(str(tmp_path / name), os.open(tmp_path / name, os.O_RDONLY)))
    if os.geteuid() == 0:
        os.chown(tmp_path / "foreign", 4711, -1)
    if isinstance(why, str):
        os.rename(tmp_path / "base", tmp_path / "top")
    elif why:
        monkeypatch.setattr(targets, "locate", raising(why))
    transaction = FileTransaction(directory, force=True, durable=False, access=Access(tuple(files)))
    # Of an image that the user named, all is his that has the same owner.
    others = ["foreign"] if os.geteuid() == 0 else []
    found = [file.name for file in unnamed_sources(transaction.access.sources)]
    assert found == (["top", "base", "foreign"] if why else others)
    assert unnamed_sources(DEFAULT_ACCESS.sources) == []
    for file in files:
        file.close()


def raising(error: Exception) -> Callable[..., None]:
    def call(*_arguments: object) -> None:
        raise error

    return call


def test_an_aborted_transaction_leaves_nothing(tmp_path: Path, directory: Directory, named_only: None) -> None:
    before = descriptors()
    transaction = FileTransaction(directory, force=False, durable=True)
    for name in "ab":
        transaction.create(name, 5, [])
    assert len(names(tmp_path)) == 2
    transaction.abort()
    assert (names(tmp_path), descriptors(), transaction._outputs) == ([], before, [])


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_transaction_gives_all_files_their_names(tmp_path: Path, directory: Directory, count: int) -> None:
    before = descriptors()
    transaction = FileTransaction(directory, force=False, durable=True)
    for name in "ab"[:count]:
        transaction.create(name, 5, [])
    transaction.commit()
    assert (names(tmp_path), descriptors(), transaction._outputs) == (list("ab"[:count]), before, [])


@pytest.mark.parametrize("force", [True, False])
def test_a_name_that_may_not_be_durable_is_removed(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    monkeypatch.setattr(Directory, "sync", failing(errno.EIO))
    transaction = FileTransaction(directory, force=force, durable=True)
    transaction.create("disk", 5, [])
    with pytest.raises(BackendError, match="cannot be renamed to its final name"):
        transaction.commit()
    assert names(tmp_path) == (["disk"] if force else [])
    transaction = FileTransaction(directory, force=force, durable=False)
    transaction.create("other", 5, [])
    transaction.commit()
    assert "other" in names(tmp_path)


def test_a_target_that_appeared_is_kept(tmp_path: Path, directory: Directory) -> None:
    transaction = FileTransaction(directory, force=False, durable=False)
    transaction.create("disk", 5, [])
    (tmp_path / "disk").write_bytes(b"old")
    with pytest.raises(BackendError, match="disk: already exists"):
        transaction.commit()
    assert (tmp_path / "disk").read_bytes() == b"old"


@pytest.mark.parametrize("kind", ["ceph", "cifs", "nfs", "nfs4", "smb3", "ext4", "xfs"])
@pytest.mark.parametrize("shares", [True, False])
def test_servers_copy_where_they_do_not_share(
    directory: Directory, monkeypatch: pytest.MonkeyPatch, kind: str, shares: bool
) -> None:
    monkeypatch.setattr(linux, "mount_of", lambda _path: linux.Mount(kind, "/"))
    monkeypatch.setattr(ReflinkBackend, "capabilities", lambda *_arguments: Capabilities(usable=True, shares=shares))
    transaction = CopyBackend().begin(directory)
    assert isinstance(transaction, FileTransaction)
    assert transaction.kernel_copies == (kind not in ("ext4", "xfs") and not shares)
    assert (transaction.force, transaction.durable) == (False, True)


@pytest.mark.parametrize("writable", [True, False])
def test_copies_can_be_made_where_files_can(monkeypatch: pytest.MonkeyPatch, writable: bool) -> None:
    monkeypatch.setattr(os, "access", lambda path, how: writable and (path, how) == ("/place", os.W_OK))
    found = CopyBackend().capabilities("/place")
    assert (found.usable, found.shares, found.reason is None) == (writable, False, writable)
