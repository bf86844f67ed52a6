"""The conformance tests of reading, for formats with a writer and without one."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from types import MappingProxyType
from typing import ClassVar

import pytest

from vmconv.errors import AccessError, VmconvError
from vmconv.interface.format import Format
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry
from vmconv.model.extents import Kind
from vmconv.model.facts import DiskFacts
from vmconv.model.image import Image
from vmconv.model.sources import File
from vmconv.model.usage import overlaps
from vmconv.testing.disks import image_file, random_bytes
from vmconv.testing.malformed import KINDS, Sample, memory_limit, time_limit
from vmconv.testing.memory import MemoryFile
from vmconv.testing.samples import sample_disk, sample_images

_HEAVY = ("numpy", "construct", "pydantic", "zstandard")


class Siblings(Opener):
    """An opener for the files of one image in memory."""

    def __init__(self, registry: Registry, files: Mapping[str, File], passphrases: Sequence[bytes] = ()) -> None:
        super().__init__(registry)
        self._passphrases = tuple(passphrases)
        self._siblings = files
        self.asked: list[str] = []

    def related(self, origin: File, reference: str, role: str, *, moved: bool = False) -> File:
        self.asked.append(reference)
        if reference not in self._siblings:
            return super().related(origin, reference, role, moved=moved)
        return self._siblings[reference]

    def passphrases(self, file: File) -> tuple[bytes, ...]:
        return self._passphrases or super().passphrases(file)

    def companion(self, origin: File, suffixes: Sequence[str], role: str) -> tuple[str, File] | None:
        found = (name for suffix in suffixes for name in self._siblings if name.endswith(suffix))
        return next(((name, self._siblings[name]) for name in found), None)


class ReaderTests:
    """Subclass it for a format without a writer (`can_write = False`), and override `sound`.

    `FormatTests` has all of it: its images come from the writer.
    """

    format: ClassVar[Format]
    variants: ClassVar[Sequence[Mapping[str, str]]] = ({},)
    """What `sound` makes images of; each test that reads runs for each."""
    facts: ClassVar[DiskFacts] = DiskFacts()
    """A value for each fact that the format carries."""
    passphrases: ClassVar[Sequence[bytes]] = ()
    """Those of the images, for a format that is encrypted."""
    has_signature: ClassVar[bool] = True
    """False for a format without a signature."""

    # -- helpers

    def sound(self, variant: Mapping[str, str]) -> Sample:
        """Returns an image in one file, with payload, made by another program; and the ranges of its metadata."""
        raise NotImplementedError(f"{self.format.name}: without a writer, the kit needs an image")

    def sample(self, variant: Mapping[str, str]) -> bytes:
        """Returns the bytes of `sound`."""
        return self.sound(variant).data

    def seal(self, data: bytearray) -> None:
        """Updates the checksums of a modified image; override it for a format with checksums."""

    def open_sample(self, data: bytes) -> Image:
        return self.format.read(image_file(data), self.opener())

    def opener(self, files: Mapping[str, File] = MappingProxyType({})) -> Siblings:
        return Siblings(Registry({self.format.name: self.format}), files, self.passphrases)

    def each_variant(self) -> Iterator[Mapping[str, str]]:
        yield from self.variants

    # -- the plugin

    def test_name_title_and_suffixes_are_usable(self) -> None:
        assert re.fullmatch(r"[a-z][a-z0-9_-]*", self.format.name)
        assert self.format.title
        assert self.format.suffixes
        assert all(re.fullmatch(r"[a-z0-9]*\.[a-z0-9]+", suffix) for suffix in self.format.suffixes)

    def test_importing_the_plugin_imports_nothing_heavy(self) -> None:
        # In a new process, because pytest has imported the heavy modules already.
        module = type(self.format).__module__
        code = f"import sys, {module}; print([m for m in {_HEAVY!r} if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"

    # -- reading

    def test_own_images_are_recognised_and_others_are_not(self) -> None:
        for variant in self.each_variant():
            assert self.format.probe(image_file(self.sample(variant))) is self.has_signature
        for other in (b"", b"\0", b"x" * 100, bytes(8192), random_bytes(8192)):
            assert not self.format.probe(image_file(other))

    def test_the_neutral_description_is_valid(self) -> None:
        for variant in self.each_variant():
            image = self.open_sample(self.sample(variant))
            assert image.disk.size == image.size
            assert isinstance(image.details, Mapping)

    def test_images_that_qemu_made_are_read(self) -> None:
        """Of formats that QEMU writes: a second opinion, without QEMU."""
        images = list(sample_images(self.format.name))
        if not images:
            pytest.skip("QEMU writes no images of this format")
        for one in images:
            assert self.format.probe(image_file(one.data)) is self.has_signature, one.name
            table = self.open_sample(one.data).flat
            assert table.read(0, table.size) == sample_disk(), one.name

    def test_an_unknown_snapshot_is_refused(self) -> None:
        file = image_file(self.sample(self.variants[0]))
        with pytest.raises(VmconvError):
            self.format.read(file, Siblings(Registry(), {}), snapshot="no such snapshot")

    def test_reading_opens_no_other_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = self.sample(self.variants[0])

        def refuse(*arguments: object, **_: object) -> None:
            raise AssertionError(f"the reader opens {arguments}")

        monkeypatch.setattr("os.open", refuse)
        monkeypatch.setattr("builtins.open", refuse)
        self.open_sample(data).flat.total(Kind.DATA)

    def test_a_sound_image_passes_the_check(self) -> None:
        for variant in self.each_variant():
            report = self.format.check(self.open_sample(self.sample(variant)))
            assert report is None or (report.corruption_count, report.leak_count) == (0, 0), (variant, report)

    def test_qemu_incompatibilities_are_one_phrase(self) -> None:
        for variant in self.each_variant():
            said = self.format.qemu_incompatibility(self.open_sample(self.sample(variant)))
            assert said is None or (said and "\n" not in said and not said.endswith("."))

    # -- hostile input

    def outcome(self, file: MemoryFile) -> str:
        """Reads all of an image; returns "read" or the message of the error, which must be one line.

        Fails if payload overlaps without a warning, or the check passes tables that the reader refuses.
        """
        try:
            image = self.format.read(file, self.opener())
        except VmconvError as exc:
            return _message(exc)
        try:
            image.guest  # noqa: B018
        except VmconvError as exc:
            self.found_by_the_check(image, exc)
            return _message(exc)
        try:
            self.read_payload(image)
            twice = overlaps(image.guest, file)
            assert image.warnings or not twice, f"{twice.text(0)}, without a warning"
            self.described(image)
        except VmconvError as exc:
            self.checked(image)
            return _message(exc)
        return self.checked(image) or "read"

    def read_payload(self, image: Image) -> None:
        """Reads some of each row of an image, from its beginning on."""
        table = image.flat
        # A malformed image may claim any size.
        for row in table.window(0, min(table.size, 1 << 22)):
            if row.source is not None and row.offset + row.length <= row.source.size:
                row.source.read(row.offset, min(row.length, 1 << 16))

    def described(self, image: Image) -> None:
        """Fails if an image can be read but not described."""
        try:
            assert image.disk.model_dump(mode="json")
            assert isinstance(image.details, Mapping)
        except VmconvError as exc:
            raise AssertionError(f"can be read but not described: {exc}") from exc

    def checked(self, image: Image) -> str | None:
        """Returns the message of the check if it refuses the image, or None."""
        try:
            self.format.check(image)
        except VmconvError as exc:
            return _message(exc)
        return None

    def found_by_the_check(self, image: Image, refusal: VmconvError) -> None:
        """Fails if the check passes an image whose tables the reader refuses."""
        try:
            report = self.format.check(image)
        except VmconvError:
            return
        # Another file of the image may be missing, which its structure cannot show.
        missed = report is not None and not report.corruption_count and not isinstance(refusal, AccessError)
        assert not missed, f"the check passes what the reader refuses: {refusal}"

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_malformed_image_is_read_or_refused_in_one_line(self, kind: str) -> None:
        if not self.has_signature:
            pytest.skip("any content is an image of this format")
        outcomes = set()
        for seed, variant in enumerate(self.each_variant()):
            sample = self.sound(variant)
            with memory_limit():
                for malformed in KINDS[kind](sample, random.Random(seed), self.seal):
                    with closing(malformed.file()) as file, time_limit():
                        outcomes.add(self.outcome(file))
        assert outcomes - {"read"}, "all were read"


def _message(error: VmconvError) -> str:
    """Returns the message of an error, which must be one phrase."""
    message = str(error)
    assert "\n" not in message
    assert not message.endswith(".")
    return message
