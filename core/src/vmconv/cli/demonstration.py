"""What `vmconv demo` shows: each way to convert, tried on one disk in one directory, with the proof.

A proof compares the physical addresses of the payload, from FIEMAP. In place there is no second file: the addresses
before and after are compared.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

from vmconv.api import convert
from vmconv.cli.output import size_text
from vmconv.conversion.request import Result
from vmconv.errors import VmconvError, os_errors
from vmconv.inplace.undo import undo
from vmconv.inspect.comparison import compare_images
from vmconv.inspect.proof import Proof, prove_images, prove_tables
from vmconv.io.known import RAW_NAME
from vmconv.io.opener import Opener
from vmconv.io.physical import PhysicalMap
from vmconv.io.registry import installed
from vmconv.model.extents import Extents
from vmconv.model.image import Image

PART = 4 << 20
NOT_ASKED = "-"


class Row(NamedTuple):
    """One conversion: bytes copied and written, as text, and whether a guest sees the same bytes."""

    way: str
    conversion: str
    copied: str
    written: str
    seconds: str
    same_bytes: bool
    same_blocks: str


class Demonstration:
    """Converts one disk in a directory in every way; collects the reasons for copies and for ways left out."""

    def __init__(self, directory: Path, size: int) -> None:
        self.directory = directory
        self.disk = make_disk(directory / "disk.raw", size)
        self.shares = installed().backends["reflink"].capabilities(os.fspath(directory)).usable
        self.copied_because: dict[str, None] = {}
        self.left_out: list[str] = []

    def rows(self) -> Iterator[Row]:
        """Yields the conversions as they are done. A way that is impossible here is left out, with its reason."""
        ways: tuple[Callable[[], Iterator[Row]], ...] = (
            self._in_place,
            self._by_reference,
            self._as_view,
            self._by_sharing,
            self._by_qemu,
        )
        for way in ways:
            yield from way()

    def _in_place(self) -> Iterator[Row]:
        mine = make_disk(self.directory / "mine.raw", self.disk.stat().st_size)
        before = _digest(mine, RAW_NAME)
        for name, suffix in _formats():
            target = self.directory / f"mine{suffix}"
            places = PhysicalMap(encoded=True)
            old = _places(mine, RAW_NAME, places)
            try:
                result = convert(
                    mine, target, source_format=RAW_NAME, target_format=name, in_place=True, keep_undo=True
                )
            except VmconvError as exc:
                self.left_out.append(f"raw -> {name} in place: {exc}")
                continue
            proof = prove_tables(old, _places(target, name, places))
            yield _row("in place", f"raw -> {name}", result, _digest(target, name) == before, proof)
            yield self._undone(target, name, before, (old, places))
        mine.unlink()

    def _undone(self, target: Path, name: str, before: bytes, old: tuple[Extents, PhysicalMap]) -> Row:
        began = time.perf_counter()
        restored = Path(undo(os.fspath(target)))
        seconds = time.perf_counter() - began
        proof = prove_tables(old[0], _places(restored, RAW_NAME, old[1]))
        same = _digest(restored, RAW_NAME) == before
        return Row("  undo", f"{name} -> raw", NOT_ASKED, NOT_ASKED, f"{seconds:.3f}", same, _shared(proof))

    def _by_reference(self) -> Iterator[Row]:
        for name, suffix in _formats():
            if "reference" not in _subformats(name):
                continue
            target = self.directory / f"reference{suffix}"
            options = {"subformat": "reference"}
            result = convert(self.disk, target, source_format=RAW_NAME, target_format=name, options=options)
            yield self._compared("reference", f"raw -> {name}", result, target, name)

    def _as_view(self) -> Iterator[Row]:
        shelf, shown = self.directory / "shelf", self.directory / "shown"
        for path in (shelf, shown):
            path.mkdir()
        os.link(self.disk, shelf / "disk.raw")
        mount = _vmconv("mount", "--fork", shelf, shown)
        if mount.returncode:
            self.left_out.append(f"view: {_last_line(mount.stderr)}")
            return
        try:
            yield from self._views(shown / "disk.raw")
        finally:
            subprocess.run(["fusermount3", "-u", shown], check=True)

    def _views(self, shown: Path) -> Iterator[Row]:
        for name, suffix in _formats():
            began = time.perf_counter()
            found = next((path for path in sorted(shown.glob(f"{name}*/disk{suffix}")) if path.stat().st_size), None)
            seconds = time.perf_counter() - began
            if found is not None:
                same = _same(self.disk, found, name)
                yield Row("view", f"raw -> {name}", "0 B", "0 B", f"{seconds:.3f}", same, "read from disk.raw")

    def _by_sharing(self) -> Iterator[Row]:
        if not self.shares:
            return
        back = self.directory / "back.raw"
        for name, suffix in _formats():
            target = self.directory / f"disk{suffix}"
            result = convert(self.disk, target, source_format=RAW_NAME, target_format=name)
            yield self._compared("shared", f"raw -> {name}", result, target, name)
            result = convert(target, back, source_format=name, target_format=RAW_NAME, force=True)
            yield self._compared("shared", f"{name} -> raw", result, back, RAW_NAME)

    def _by_qemu(self) -> Iterator[Row]:
        target = self.directory / "by-qemu-img.qcow2"
        command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", os.fspath(self.disk), os.fspath(target)]
        began = time.perf_counter()
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return
        with target.open("rb") as file:
            # As vmconv does before it names a file.
            os.fsync(file.fileno())
        seconds = f"{time.perf_counter() - began:.3f}"
        size = target.stat().st_blocks * 512
        same = _same(self.disk, target, "qcow2")
        yield Row("qemu-img", "raw -> qcow2", size_text(size), NOT_ASKED, seconds, same, "0 B")

    def _compared(self, way: str, conversion: str, result: Result, target: Path, name: str) -> Row:
        self.copied_because.update(dict.fromkeys(copy.reason for copy in result.copies))
        with _images((self.disk, RAW_NAME), (target, name)) as (left, right):
            return _row(way, conversion, result, bool(compare_images(left, right)), prove_images(left, right))


def make_disk(path: Path, size: int) -> Path:
    """Writes a sparse disk of `size` bytes with payload in every second part, and a boot sector's signature."""
    with os_errors("cannot be written", where=os.fspath(path)), path.open("xb") as file:
        file.truncate(size)
        for at in range(0, size, 2 * PART):
            file.seek(at)
            file.write(os.urandom(min(PART, size - at)))
        file.seek(510)
        file.write(b"\x55\xaa")
        file.flush()
        os.fsync(file.fileno())
    return path


def _formats() -> list[tuple[str, str]]:
    """Returns the name and suffix of each disk format but raw that is read and written."""
    found = sorted(installed().formats.items())
    return [(name, one.suffixes[0]) for name, one in found if one.can_read and one.can_write and name != RAW_NAME]


def _subformats(name: str) -> tuple[str, ...]:
    hints = get_type_hints(installed().formats[name].options())
    return get_args(hints.get("subformat"))


def _row(way: str, conversion: str, result: Result, same: bool, proof: Proof) -> Row:
    totals = result.totals
    seconds = f"{result.seconds:.3f}"
    return Row(way, conversion, size_text(totals.copied), size_text(totals.written), seconds, same, _shared(proof))


def _shared(proof: Proof) -> str:
    if proof:
        return f"all {size_text(proof.shared)}"
    if not proof.shared + proof.apart:
        return "not reported by the filesystem"
    return f"{size_text(proof.shared)} of {size_text(proof.shared + proof.apart + proof.unknown)}"


@contextlib.contextmanager
def _images(*named: tuple[Path, str]) -> Iterator[list[Image]]:
    with Opener(installed()) as opener:
        yield [opener.image(os.fspath(path), name) for path, name in named]


def _same(disk: Path, target: Path, name: str) -> bool:
    with _images((disk, RAW_NAME), (target, name)) as (left, right):
        return bool(compare_images(left, right))


def _places(path: Path, name: str, places: PhysicalMap) -> Extents:
    with _images((path, name)) as (image,):
        return places.apply(image.flat)


def _digest(path: Path, name: str) -> bytes:
    """Returns a digest of what a guest reads."""
    import hashlib

    digest = hashlib.sha256()
    with _images((path, name)) as (image,):
        for at in range(0, image.size, PART):
            digest.update(image.flat.read(at, min(PART, image.size - at)))
    return digest.digest()


def _vmconv(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vmconv", *arguments], capture_output=True, text=True, check=False)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["vmconv mount failed without a message"])[-1]
