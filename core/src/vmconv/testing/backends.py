"""The conformance tests of storage backends."""

from __future__ import annotations

import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from vmconv.backends.targets import clean
from vmconv.backends.temporary import PREFIX
from vmconv.errors import BackendError
from vmconv.interface.backend import Access, Backend, Output, Transaction
from vmconv.io.directory import Directory
from vmconv.model.plan import ShareSteps
from vmconv.model.sources import File
from vmconv.testing.disks import random_bytes

OpenFile = Callable[[str], File]


class BackendTests:
    """Subclass it, set `backend`, and override the fixture `directory` if the backend needs a certain filesystem."""

    backend: ClassVar[Backend]
    shares: ClassVar[bool]
    """Whether the backend shares in `directory`."""

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Iterator[str]:
        """An empty directory in which the backend is usable."""
        yield str(tmp_path)

    @pytest.fixture
    def open_file(self) -> Iterator[OpenFile]:
        """Opens files by path, for reading."""
        with ExitStack() as stack:

            def opened(path: str) -> File:
                file = File(path, os.open(path, os.O_RDONLY))
                stack.callback(file.close)
                return file

            yield opened

    def read_back(self, path: str) -> bytes:
        """Returns the content of a committed file."""
        return Path(path).read_bytes()

    def names(self, directory: str) -> list[str]:
        """Returns the names in a directory, sorted."""
        return sorted(os.listdir(directory))

    def no_steps(self) -> ShareSteps:
        empty = np.empty(0, dtype=np.int64)
        return ShareSteps((), np.empty(0, dtype=np.int32), empty, empty, empty)

    def steps(self, source: File, *rows: tuple[int, int, int]) -> ShareSteps:
        columns = np.array(rows, dtype=np.int64).reshape(-1, 3)
        index = np.zeros(len(columns), dtype=np.int32)
        return ShareSteps((source,), index, columns[:, 0], columns[:, 1], columns[:, 2])

    @pytest.fixture(autouse=True)
    def _opened(self) -> Iterator[None]:
        self._stack = ExitStack()
        with self._stack:
            yield

    def begin(self, directory: str, **options: Any) -> Transaction:
        """Returns a transaction in a directory, which is closed at the end of the test."""
        return self.backend.begin(self._stack.enter_context(Directory.at(directory)), **options)

    def start(self, transaction: Transaction, name: str, size: int) -> Output:
        output = transaction.create(name, size, [])
        output.share(self.no_steps())
        return output

    @pytest.fixture
    def source(self, directory: str, open_file: OpenFile) -> File:
        path = os.path.join(directory, "source")
        Path(path).write_bytes(random_bytes(10 * 65536 + 1234))
        return open_file(path)

    def unit(self, directory: str) -> int:
        return max(self.backend.capabilities(directory).unit, 512)

    # -- capabilities

    def test_the_backend_reports_whether_it_is_usable_and_shares(self, directory: str) -> None:
        capabilities = self.backend.capabilities(directory)
        assert capabilities.usable
        assert capabilities.shares is self.shares
        assert capabilities.unit >= 1

    def test_asking_leaves_nothing_behind(self, directory: str, source: File) -> None:
        before = self.names(directory)
        self.backend.capabilities(directory)
        self.backend.survey(directory, [source])
        assert self.names(directory) == before

    def test_a_survey_refuses_no_source_when_it_shares_and_every_one_when_not(
        self, directory: str, source: File
    ) -> None:
        refusals = self.backend.survey(directory, [source]).refusals
        assert (id(source) in refusals) is not self.shares
        assert all(refusals.values())

    # -- outputs

    def test_written_data_is_there_after_commit(self, directory: str) -> None:
        transaction = self.begin(directory)
        output = self.start(transaction, "target", 10000)
        output.write(100, b"hello")
        output.write(9995, b"world")
        output.finish()
        transaction.commit()
        data = self.read_back(os.path.join(directory, "target"))
        assert len(data) == 10000
        assert data[100:105] == b"hello"
        assert data[9995:] == b"world"

    def test_unwritten_ranges_read_as_zero(self, directory: str) -> None:
        transaction = self.begin(directory)
        self.start(transaction, "target", 3 << 20).finish()
        transaction.commit()
        assert self.read_back(os.path.join(directory, "target")) == bytes(3 << 20)

    def test_a_finished_output_can_be_read_before_commit(self, directory: str) -> None:
        transaction = self.begin(directory)
        output = self.start(transaction, "target", 4096)
        output.write(1, b"x")
        assert output.finish().read(0, 3) == b"\0x\0"
        transaction.abort()

    def test_copying_copies_the_bytes_of_a_source(self, directory: str, source: File) -> None:
        transaction = self.begin(directory)
        output = self.start(transaction, "target", source.size)
        output.copy(source, 777, 1, 65536)
        output.finish()
        transaction.commit()
        assert self.read_back(os.path.join(directory, "target"))[1:65537] == source.read(777, 65536)

    def test_threads_may_write_at_once(self, directory: str) -> None:
        transaction = self.begin(directory)
        output = self.start(transaction, "target", 64 * 5000)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: output.write(n * 5000, bytes([n + 1]) * 5000), range(64)))
        output.finish()
        transaction.commit()
        data = self.read_back(os.path.join(directory, "target"))
        assert data == b"".join(bytes([n + 1]) * 5000 for n in range(64))

    # -- sharing

    def test_shared_ranges_have_the_bytes_of_the_source(self, directory: str, source: File) -> None:
        if not self.shares:
            pytest.skip("this backend shares nothing")
        unit = self.unit(directory)
        transaction = self.begin(directory)
        output = transaction.create("target", 8 * unit, [source])
        output.share(self.steps(source, (3 * unit, 2 * unit, 0), (0, unit, 5 * unit)))
        output.write(4 * unit, b"own")
        output.finish()
        transaction.commit()
        data = self.read_back(os.path.join(directory, "target"))
        assert data[: 2 * unit] == source.read(3 * unit, 2 * unit)
        assert data[5 * unit : 6 * unit] == source.read(0, unit)
        assert data[4 * unit : 4 * unit + 4] == b"own\0"

    def test_the_incomplete_last_block_of_a_source_can_end_the_target(self, directory: str, source: File) -> None:
        if not self.shares:
            pytest.skip("this backend shares nothing")
        unit = self.unit(directory)
        first = source.size // unit * unit
        transaction = self.begin(directory)
        output = transaction.create("target", 2 * unit + source.size - first, [source])
        output.share(self.steps(source, (0, unit, unit), (first, source.size - first, 2 * unit)))
        output.finish()
        transaction.commit()
        data = self.read_back(os.path.join(directory, "target"))
        assert data == bytes(unit) + source.read(0, unit) + source.read(first, source.size - first)

    def test_writing_to_a_shared_range_leaves_the_source_alone(self, directory: str, source: File) -> None:
        if not self.shares:
            pytest.skip("this backend shares nothing")
        unit, before = self.unit(directory), source.read(0, source.size)
        transaction = self.begin(directory)
        output = transaction.create("target", unit, [source])
        output.share(self.steps(source, (0, unit, 0)))
        output.write(0, b"changed")
        output.finish()
        transaction.commit()
        assert source.read(0, source.size) == before

    # -- transactions

    def test_nothing_has_its_name_before_commit(self, directory: str) -> None:
        transaction = self.begin(directory)
        self.start(transaction, "target", 10).finish()
        assert "target" not in self.names(directory)
        transaction.abort()

    def test_abort_leaves_nothing(self, directory: str) -> None:
        before = self.names(directory)
        transaction = self.begin(directory)
        self.start(transaction, "one", 10)
        self.start(transaction, "two", 10).finish()
        transaction.abort()
        assert self.names(directory) == before

    def test_abort_after_commit_changes_nothing(self, directory: str) -> None:
        transaction = self.begin(directory)
        self.start(transaction, "target", 10).finish()
        transaction.commit()
        transaction.abort()
        assert self.read_back(os.path.join(directory, "target")) == bytes(10)

    def commit_two(self, directory: str, content: bytes, *, force: bool) -> None:
        transaction = self.begin(directory, force=force)
        try:
            for name in ("one", "two"):
                output = self.start(transaction, name, len(content))
                output.write(0, content)
                output.finish()
            transaction.commit()
        finally:
            transaction.abort()

    def test_several_outputs_appear_together(self, directory: str) -> None:
        self.commit_two(directory, b"content", force=False)
        assert self.read_back(os.path.join(directory, "one")) == b"content"
        assert self.read_back(os.path.join(directory, "two")) == b"content"

    def test_an_existing_target_is_not_replaced_and_no_other_appears(self, directory: str) -> None:
        transaction = self.begin(directory)
        self.start(transaction, "two", 3).finish()
        transaction.commit()
        with pytest.raises(BackendError, match="already exists"):
            self.commit_two(directory, b"content", force=False)
        assert self.read_back(os.path.join(directory, "two")) == bytes(3)
        assert "one" not in self.names(directory)

    def test_force_replaces_an_existing_target(self, directory: str) -> None:
        self.commit_two(directory, b"old", force=False)
        self.commit_two(directory, b"new content", force=True)
        assert self.read_back(os.path.join(directory, "two")) == b"new content"

    # -- durability, permissions, crashes

    def on_storage(self, directory: str, name: str = "target") -> str:
        """Returns the path of a committed file; skips the test for a backend that stores nothing in a directory."""
        path = os.path.join(directory, name)
        if not os.path.exists(path):
            pytest.skip("this backend keeps nothing on storage")
        return path

    def commit_one(self, directory: str, **options: Any) -> None:
        transaction = self.begin(directory, **options)
        try:
            output = self.start(transaction, "target", 3)
            output.write(0, b"new")
            output.finish()
            transaction.commit()
        finally:
            transaction.abort()

    def test_committed_files_were_synced(self, directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
        synced: list[tuple[int, bool]] = []

        def noted(real: Callable[[int], None]) -> Callable[[int], None]:
            def sync(descriptor: int) -> None:
                inode = os.fstat(descriptor).st_ino
                synced.append((inode, "target" in os.listdir(directory)))
                real(descriptor)

            return sync

        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, noted(getattr(os, name)))
        self.commit_one(directory)
        path = self.on_storage(directory)
        assert (os.stat(path).st_ino, False) in synced, "the file was not synced before it was renamed"
        assert (os.stat(directory).st_ino, True) in synced, "the directory was not synced after that"

    def test_open_descriptors_keep_reading_the_replaced_file(self, directory: str) -> None:
        self.commit_one(directory)
        path = self.on_storage(directory)
        Path(path).write_bytes(b"old content")
        with open(path, "rb") as reader:
            self.commit_one(directory, force=True)
            assert reader.read() == b"old content"
        assert self.read_back(path) == b"new"

    def test_a_new_file_grants_no_more_access_than_its_sources(self, directory: str, source: File) -> None:
        before = os.umask(0o022)
        try:
            for mode in (0o600, 0o644):
                os.chmod(source.path, mode)
                self.commit_one(directory, force=True, access=Access([source]))
                path = self.on_storage(directory)
                assert stat.S_IMODE(os.stat(path).st_mode) == mode
                os.unlink(path)
        finally:
            os.umask(before)

    def test_a_requested_mode_is_set(self, directory: str) -> None:
        self.commit_one(directory, access=Access(mode=0o604))
        path = self.on_storage(directory)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o604

    def test_a_replaced_file_passes_its_mode_on(self, directory: str) -> None:
        self.commit_one(directory)
        path = self.on_storage(directory)
        os.chmod(path, 0o640)
        self.commit_one(directory, force=True)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o640

    @pytest.mark.parametrize("force", [False, True])
    def test_a_set_of_a_killed_process_is_complete_or_absent(self, directory: str, force: bool) -> None:
        names = ("one", "two", "three")
        # Creates the user's key, with which journals are authenticated.
        self._killed(directory, names, force=force, at=-1)
        self._refuse_halves(directory, names)
        for at in range(_MOST_STEPS):
            ended = self._killed(directory, names, force=force, at=at)
            self._clean(directory, names)
            self._refuse_halves(directory, names)
            if ended:
                return
        raise AssertionError(f"commit takes more than {_MOST_STEPS} steps")

    def _clean(self, directory: str, names: Sequence[str]) -> None:
        """Ends what a killed run began. Its locks may outlive it for a moment: FUSE releases files late."""
        deadline = time.monotonic() + _LOCKED
        while True:
            with Directory.at(directory) as place:
                clean(place, names)
            left = [name for name in self.names(directory) if name.startswith(PREFIX)]
            if not left or time.monotonic() > deadline:
                return
            time.sleep(0.05)

    def _refuse_halves(self, directory: str, names: Sequence[str]) -> None:
        """Fails if only some of the files exist; removes them."""
        there = [name for name in names if name in self.names(directory)]
        assert there in ([], list(names)), f"only {there} of {names} exist after a kill"
        for name in there:
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(directory, name))
        assert not [name for name in self.names(directory) if name.startswith(PREFIX)], "the killed process left a file"

    def _killed(self, directory: str, names: Sequence[str], *, force: bool, at: int) -> bool:
        """Commits files in a process that is killed at step `at`; returns whether it finished before that."""
        child = os.fork()
        if not child:
            try:
                transaction = self.begin(directory, force=force)
                for name in names:
                    output = self.start(transaction, name, 3)
                    output.write(0, b"new")
                    output.finish()
                if at >= 0:
                    sys.addaudithook(_killing(at))
                transaction.commit()
            finally:
                # Not pytest's exit handlers, which belong to the parent.
                os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


_MOST_STEPS = 200
_LOCKED = 10.0
"""Seconds."""
_STEPS = frozenset({"ctypes.dlsym", "open", "os.link", "os.remove", "os.rename", "os.truncate"})
"""Audit events before changes of names (PEP 578); ctypes is for system calls that Python lacks."""


def _killing(at: int) -> Callable[[str, Any], None]:
    """Returns an audit hook that kills the process at step `at`."""
    left = [at]

    def hook(event: str, _arguments: Any) -> None:
        if event in _STEPS:
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    return hook
