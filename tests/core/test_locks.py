"""QEMU's image locks, taken by QEMU's own tools on one side and by us on the other."""

from __future__ import annotations

import contextlib
import socket as socketlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from support import qcow2_images
from support.holders import PATIENCE, qemu_io
from vmconv import api
from vmconv.errors import AccessError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed

# The other tools come with qemu-img.
pytestmark = pytest.mark.usefixtures("qemu_img")


Holder = Callable[..., AbstractContextManager[None]]


def _greets(path: Path) -> bool:
    """True once a server at the socket has its image open: it listens before, and greets after that."""
    with contextlib.suppress(FileNotFoundError, ConnectionRefusedError), socketlib.socket(socketlib.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(path))
        return client.recv(8, socketlib.MSG_WAITALL) == b"NBDMAGIC"
    return False


@contextlib.contextmanager
def qemu_nbd(path: Path, format_name: str, *, writing: bool = True) -> Iterator[None]:
    """Keeps an image open in qemu-nbd."""
    socket = path.with_name("socket")
    mode = [] if writing else ["-r"]
    command = ["qemu-nbd", *mode, "-t", "-k", str(socket), "-f", format_name, str(path)]
    with subprocess.Popen(command) as process:
        try:
            until = time.monotonic() + PATIENCE
            while not _greets(socket):
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.01)
            yield
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                # Seen with QEMU 7.2: a signal that comes while it is still starting is lost.
                process.kill()


def qemu_opens_for_writing(path: Path, format_name: str) -> bool:
    """True when QEMU can write to the image now."""
    command = ["qemu-io", "-f", format_name, "-c", "write -P 7 0 512", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "lock" in done.stderr, done.stderr
    return done.returncode == 0


HOLDERS: dict[str, Holder] = {"qemu-io": qemu_io, "qemu-nbd": qemu_nbd}
each_holder = pytest.mark.parametrize("holder", HOLDERS)
each_format = pytest.mark.parametrize("format_name", ["raw", "qcow2"])


@pytest.fixture
def disk(tmp_path: Path) -> Callable[[str], Path]:
    """Makes an image of a format and returns its path."""

    def make(format_name: str) -> Path:
        path = tmp_path / f"disk.{format_name}"
        path.write_bytes(qcow2_images.image() if format_name == "qcow2" else b"\x21" * (1 << 20))
        return path

    return make


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target.raw"


@each_holder
@each_format
def test_a_source_that_qemu_is_writing_is_refused(
    disk: Callable[[str], Path], target: Path, holder: str, format_name: str
) -> None:
    source = disk(format_name)
    with HOLDERS[holder](source, format_name), pytest.raises(AccessError) as caught:
        api.convert(str(source), str(target))
    assert source.name in str(caught.value)
    assert "open for writing" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "--force-share" in (caught.value.hint or "")
    assert not target.exists()


@each_holder
@each_format
def test_a_source_that_qemu_is_writing_can_be_forced(
    disk: Callable[[str], Path], target: Path, holder: str, format_name: str
) -> None:
    source = disk(format_name)
    with HOLDERS[holder](source, format_name):
        api.convert(str(source), str(target), force_share=True)
    assert target.exists()


@each_holder
@each_format
def test_a_source_that_qemu_is_only_reading_is_no_obstacle(
    disk: Callable[[str], Path], target: Path, holder: str, format_name: str
) -> None:
    source = disk(format_name)
    with HOLDERS[holder](source, format_name, writing=False):
        api.convert(str(source), str(target))
    assert target.exists()


@each_format
def test_a_source_can_be_converted_once_qemu_has_closed_it(
    disk: Callable[[str], Path], target: Path, format_name: str
) -> None:
    source = disk(format_name)
    with qemu_io(source, format_name):
        pass
    api.convert(str(source), str(target))
    assert target.exists()


@each_format
def test_qemu_cannot_write_to_an_image_while_we_have_it_open(disk: Callable[[str], Path], format_name: str) -> None:
    source = disk(format_name)
    with Opener(installed()) as opener:
        opener.image(str(source))
        assert not qemu_opens_for_writing(source, format_name)


@each_format
def test_qemu_can_write_to_an_image_that_we_have_closed(disk: Callable[[str], Path], format_name: str) -> None:
    source = disk(format_name)
    with Opener(installed()) as opener:
        opener.image(str(source))
    assert qemu_opens_for_writing(source, format_name)


def test_a_forced_reader_does_not_keep_qemu_from_writing(disk: Callable[[str], Path]) -> None:
    source = disk("qcow2")
    with Opener(installed(), force_share=True) as opener:
        opener.image(str(source))
        assert qemu_opens_for_writing(source, "qcow2")


def test_qemu_can_read_an_image_while_we_have_it_open(disk: Callable[[str], Path]) -> None:
    source = disk("qcow2")
    with Opener(installed()) as opener:
        opener.image(str(source))
        with qemu_io(source, "qcow2", writing=False):
            pass


def test_two_of_us_can_read_one_image(disk: Callable[[str], Path], target: Path) -> None:
    source = disk("qcow2")
    with Opener(installed()) as opener:
        opener.image(str(source))
        api.convert(str(source), str(target))
    assert target.exists()


def test_info_on_an_image_that_qemu_is_writing_is_refused(disk: Callable[[str], Path]) -> None:
    source = disk("qcow2")
    with qemu_io(source, "qcow2"), pytest.raises(AccessError):
        api.info(str(source))


# Chains: a guest writes its top layer only


@pytest.fixture
def overlay(disk: Callable[[str], Path], tmp_path: Path) -> Path:
    """An image on top of disk.raw."""
    disk("raw")
    path = tmp_path / "overlay.qcow2"
    path.write_bytes(qcow2_images.empty_overlay("disk.raw", cluster_bits=16))
    return path


def test_a_layer_that_qemu_is_writing_is_refused_below_an_image_that_it_is_not(overlay: Path, target: Path) -> None:
    with qemu_io(overlay.with_name("disk.raw"), "raw"), pytest.raises(AccessError, match=r"disk\.raw"):
        api.convert(str(overlay), str(target))
    assert not target.exists()


def test_the_backing_file_of_an_image_that_qemu_is_writing_can_be_converted(overlay: Path, target: Path) -> None:
    with qemu_io(overlay, "qcow2"):
        api.convert(str(overlay.with_name("disk.raw")), str(target))
    assert target.exists()


def test_qemu_cannot_write_to_a_backing_file_while_we_have_the_chain_open(overlay: Path) -> None:
    with Opener(installed()) as opener:
        list(opener.image(str(overlay)).chain())
        assert not qemu_opens_for_writing(overlay.with_name("disk.raw"), "raw")


def test_qemu_cannot_write_to_a_data_file_while_we_have_its_image_open(tmp_path: Path) -> None:
    (tmp_path / "data.raw").write_bytes(b"\x21" * (1 << 20))
    (tmp_path / "disk.qcow2").write_bytes(qcow2_images.with_data_file("data.raw"))
    with Opener(installed()) as opener:
        opener.image(str(tmp_path / "disk.qcow2"))
        assert not qemu_opens_for_writing(tmp_path / "data.raw", "raw")


def test_the_command_line_reports_a_lock_in_one_line_with_a_hint(disk: Callable[[str], Path], target: Path) -> None:
    source = disk("qcow2")
    command = [sys.executable, "-c", "from vmconv.cli.main import main; raise SystemExit(main())"]
    with qemu_io(source, "qcow2"):
        done = subprocess.run(
            [*command, "convert", str(source), str(target)], capture_output=True, text=True, check=False
        )
    assert done.returncode == AccessError.exit_code
    error, hint = done.stderr.splitlines()
    assert error.startswith("vmconv: disk.qcow2: is open for writing")
    assert hint.startswith("  hint: ")
