"""The conformance tests of formats on real storage, with QEMU as the oracle."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from vmconv import api
from vmconv.interface.format import Format

MIB = 1 << 20

QemuImg = Callable[..., subprocess.CompletedProcess[str]]
"""Runs qemu-img; `ok` are the exit codes that pass."""


def make_disk(path: Path, size: int, pieces: int = 20, unit: int = 4096, seed: int = 0) -> Path:
    """Writes a sparse disk with random payload in some pieces of whole units, the first and last unit among them."""
    rng = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        starts = [0, (size - 1) // unit * unit, *(rng.randrange(size) // unit * unit for _ in range(pieces))]
        for start in starts:
            file.seek(start)
            file.write(rng.randbytes(min(rng.randrange(1, 40) * unit, size - start)))
    return path


def qemu_io(image: Path, *commands: str, format_name: str | None = None) -> None:
    """Writes to an image with QEMU."""
    named = ["-f", format_name] if format_name else []
    arguments = [argument for command in commands for argument in ("-c", command)]
    done = subprocess.run(["qemu-io", *named, *arguments, str(image)], capture_output=True, text=True, check=True)
    assert "failed" not in done.stdout + done.stderr, done.stdout + done.stderr


def scribble(
    image: Path, size: int, seed: int, count: int = 20, unit: int = 512, format_name: str | None = None
) -> None:
    """Writes, zeroes and discards random ranges of an image with QEMU."""
    rng = random.Random(seed)
    commands = []
    for _ in range(count):
        offset, length = rng.randrange(size) // unit * unit, rng.randrange(1, 300) * unit
        length = min(length, size - offset)
        what = rng.random()
        if what < 0.2:
            commands.append(f"write -z {offset} {length}")
        elif what < 0.3:
            commands.append(f"discard {offset} {length}")
        else:
            commands.append(f"write -P {rng.randrange(1, 255)} {offset} {length}")
    qemu_io(image, *commands, format_name=format_name)


def title(options: Mapping[str, str]) -> str:
    """Returns options as a test id."""
    return ",".join(f"{key}={value}" for key, value in options.items()) or "default"


def same_bytes(one: Path, other: Path) -> bool:
    """True if two files have the same content. To read them whole takes five times as long, for new memory."""
    with one.open("rb", buffering=0) as left, other.open("rb", buffering=0) as right:
        while (piece := left.read(MIB)) == right.read(MIB):
            if not piece:
                return True
    return False


class StorageFormatTests:
    """Subclass it, set `format`, and override the fixture `directory` with one on a filesystem with reflinks.

    The images are made from raw disks by `vmconv.api`, so the plugins of the format and of raw must be installed.
    """

    format: ClassVar[Format]
    qemu_name: ClassVar[str] = ""
    """QEMU's name of the format, if different."""
    variants: ClassVar[Sequence[Mapping[str, str]]] = ({},)
    """Options of images that share all payload with a raw disk."""
    sizes: ClassVar[Sequence[int]] = (40 * MIB,)
    written_by_qemu: ClassVar[Sequence[Mapping[str, str]]] = ({},)
    """Options of images that QEMU can write to."""
    made_by_qemu: ClassVar[Sequence[Mapping[str, str]]] = ({},)
    """Options of `qemu-img convert`; empty if QEMU has no writer for the format."""
    in_place: ClassVar[Sequence[Mapping[str, str]]] = ()
    """Options of images that a raw disk can become in place."""
    shares_qemu_s: ClassVar[bool] = True
    """Whether a raw disk can share all payload of QEMU's images."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for name in ("variants", "written_by_qemu", "made_by_qemu", "in_place"):
            if f"{name}_options" in metafunc.fixturenames:
                metafunc.parametrize(f"{name}_options", list(getattr(self, name)), ids=title)
        if "size" in metafunc.fixturenames:
            metafunc.parametrize("size", list(self.sizes))

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        """An empty directory on a filesystem that shares blocks."""
        return tmp_path

    @pytest.fixture
    def qemu_img(self) -> QemuImg:
        program = shutil.which("qemu-img")
        if program is None:
            pytest.skip("qemu-img is not installed")

        def run(*arguments: str | Path, ok: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
            done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
            assert done.returncode in ok, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
            return done

        return run

    @property
    def _qemu_s(self) -> str:
        return self.qemu_name or self.format.name

    def _image(self, directory: Path, stem: str = "image") -> Path:
        return directory / f"{stem}{self.format.suffixes[0]}"

    def _convert(self, source: Path, target: Path, **arguments: Any) -> api.Result:
        return api.convert(str(source), str(target), **arguments)

    def _same(self, qemu_img: QemuImg, raw: Path, image: Path) -> None:
        """Fails unless QEMU reads the same disk in both, and its check, if it has one, finds no errors."""
        qemu_img("compare", "-f", "raw", "-F", self._qemu_s, raw, image)
        qemu_img("check", "-f", self._qemu_s, image, ok=(0, 63))

    def test_all_payload_is_shared_with_a_raw_disk_and_back(
        self, directory: Path, qemu_img: QemuImg, variants_options: Mapping[str, str], size: int
    ) -> None:
        raw, image, back = make_disk(directory / "disk.raw", size), self._image(directory), directory / "back.raw"
        named: dict[str, Any] = {"target_format": self.format.name, "options": variants_options}
        there = self._convert(raw, image, zero_copy="require", **named)
        again = self._convert(image, back, source_format=self.format.name, zero_copy="require")
        # A partial last block may be copied.
        assert there.totals.copied < 4096
        assert again.totals.copied < 4096
        assert there.totals.shared > 0
        assert again.totals.shared > 0
        self._same(qemu_img, raw, image)
        assert same_bytes(raw, back)
        for result, name in ((image, self.format.name), (back, "raw")):
            proof = api.prove(str(raw), str(result), right_format=name)
            assert proof
            assert proof.shared >= there.totals.shared // 2

    def test_qemu_can_write_to_the_image(
        self, directory: Path, qemu_img: QemuImg, written_by_qemu_options: Mapping[str, str]
    ) -> None:
        raw, image = make_disk(directory / "disk.raw", 20 * MIB, pieces=2), self._image(directory)
        self._convert(raw, image, target_format=self.format.name, options=written_by_qemu_options)
        for disk, name in ((raw, "raw"), (image, self._qemu_s)):
            scribble(disk, 20 * MIB, 5, format_name=name)
        self._same(qemu_img, raw, image)
        back = directory / "back.raw"
        self._convert(image, back, source_format=self.format.name)
        assert same_bytes(raw, back)

    def test_images_of_qemu_are_read(
        self, directory: Path, qemu_img: QemuImg, made_by_qemu_options: Mapping[str, str]
    ) -> None:
        raw, image, back = directory / "disk.raw", self._image(directory), directory / "back.raw"
        make_disk(raw, 20 * MIB + 4096)
        chosen = ["-o", title(made_by_qemu_options)] if made_by_qemu_options else []
        qemu_img("convert", "-f", "raw", "-O", self._qemu_s, *chosen, raw, image)
        scribble(image, 20 * MIB, 1, format_name=self._qemu_s)
        policy = "require" if self.shares_qemu_s else "auto"
        result = self._convert(image, back, source_format=self.format.name, zero_copy=policy)
        assert result.totals.shared > 0 or not self.shares_qemu_s
        qemu_img("convert", "-f", self._qemu_s, "-O", "raw", image, directory / "theirs.raw")
        assert same_bytes(directory / "theirs.raw", back)

    def test_in_place_and_undone(
        self, directory: Path, qemu_img: QemuImg, in_place_options: Mapping[str, str], tmp_path: Path
    ) -> None:
        disk, image = make_disk(directory / "disk.raw", 12 * MIB, pieces=6), self._image(directory, "new")
        before = (tmp_path / "before.raw").write_bytes(disk.read_bytes())
        result = self._convert(
            disk, image, target_format=self.format.name, options=in_place_options, in_place=True, keep_undo=True
        )
        assert result.backend == "in-place"
        assert not disk.exists()
        self._same(qemu_img, tmp_path / "before.raw", image)
        api.undo(str(image))
        assert [path.name for path in directory.iterdir()] == ["disk.raw"]
        assert disk.stat().st_size == before
        assert same_bytes(tmp_path / "before.raw", disk)
