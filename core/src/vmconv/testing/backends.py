"""What every storage backend has to pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from vmconv.directory import Directory
from vmconv.errors import BackendError
from vmconv.planner import ShareSteps
from vmconv.sources import File
from vmconv.storage import Backend, Output, Transaction
from vmconv.testing.disks import random_bytes

OpenFile = Callable[[str], File]


class BackendTests:
    """Subclass it, make a `backend`, and override the fixture `directory` where it needs a certain filesystem."""

    backend: ClassVar[Backend]
    shares: ClassVar[bool]
    """Whether the backend must be able to share in `directory`."""

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Iterator[str]:
        """An empty directory that the backend can be used in."""
        yield str(tmp_path)

    @pytest.fixture
    def open_file(self) -> Iterator[OpenFile]:
        """Opens a file by its path, for reading."""
        with ExitStack() as stack:

            def opened(path: str) -> File:
                file = File(path, os.open(path, os.O_RDONLY))
                stack.callback(file.close)
                return file

            yield opened

    def read_back(self, path: str) -> bytes:
        """Returns the content of a file that was committed."""
        return Path(path).read_bytes()

    def names(self, directory: str) -> list[str]:
        """Returns all that a directory holds."""
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
        """Returns a transaction for an open directory, which is closed at the end of the test."""
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
        return max(self.backend.ability(directory).unit, 512)

    # -- abilities

    def test_it_says_whether_it_can_be_used_and_shares(self, directory: str) -> None:
        ability = self.backend.ability(directory)
        assert ability.usable
        assert ability.shares is self.shares
        assert ability.unit >= 1

    def test_asking_leaves_nothing_behind(self, directory: str, source: File) -> None:
        before = self.names(directory)
        self.backend.ability(directory)
        self.backend.survey(directory, [source])
        assert self.names(directory) == before

    def test_a_survey_refuses_no_source_when_it_shares_and_every_one_when_not(
        self, directory: str, source: File
    ) -> None:
        refusals = self.backend.survey(directory, [source]).refusals
        assert (id(source) in refusals) is not self.shares
        assert all(refusals.values())

    # -- outputs

    def test_what_was_written_is_there_after_commit(self, directory: str) -> None:
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

    def test_what_was_not_written_reads_as_zero(self, directory: str) -> None:
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
