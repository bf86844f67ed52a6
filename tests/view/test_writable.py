"""`mount --writable` and `serve --writable`: writes go to a layer, and the image stays as it is."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import time
from hashlib import sha256
from pathlib import Path

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk, qemu_io
from support.mounting import mounted
from support.nbd import served
from support.requirements import oracle_program
from vmconv.cli.main import main
from vmconv.io.registry import installed
from vmconv_view.overlay_options import SUFFIX

SIZE = 24 * MIB


def image_of(directory: Path, name: str) -> Path:
    """Makes an image in a format; "disk.raw" beside it has its content."""
    raw = make_disk(directory / "source" / "disk.raw", SIZE, pieces=20)
    image = directory / f"disk{installed().format(name).suffixes[0]}"
    vmconv.convert(str(raw), str(image), target_format=name)
    return image


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def layer_of(image: Path) -> Path:
    return image.with_name(image.name + SUFFIX)


def random_commands(seed: int, count: int = 40) -> list[str]:
    """Returns commands of qemu-io that write, zero and discard at random."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        start = rng.randrange(0, SIZE - MIB, 512)
        length = 512 * rng.choice((1, 8, rng.randint(1, 700)))
        kind = rng.choice((f"write -P {rng.randrange(1, 256)}", f"write -f -P {rng.randrange(1, 256)}", "write -z -u"))
        found.append(f"{kind} {start} {length}")
        if rng.random() < 0.1:
            found.append("flush")
    return found


@pytest.mark.parametrize("name", ["raw", "vhdx", "vmdk", "qcow2"])
def test_writes_over_nbd_go_to_a_layer_as_qemu_would_make_it(images: Path, qemu_img: QemuImg, name: str) -> None:
    image = image_of(images, name)
    before = digest(image)
    commands = random_commands(1)
    with served(image, "--writable") as running:
        assert list(running.sizes.values()) == [SIZE]
        subprocess.run(
            ["qemu-io", "-f", "raw", *(part for each in commands for part in ("-c", each)), running.uri],
            check=True,
            capture_output=True,
        )
        code, said = running.end()
    assert code == 0, said
    layer = layer_of(image)
    assert f"{layer} keeps what was written" in said
    assert digest(image) == before
    assert stat.S_IMODE(layer.stat().st_mode) == 0o600
    qemu_img("check", layer)
    facts = json.loads(qemu_img("info", "--output=json", layer).stdout)
    assert facts["backing-filename"] == image.name
    other = images / "qemu.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", "source/disk.raw", "-F", "raw", other)
    qemu_io(other, *commands)
    qemu_img("compare", layer, other)


def test_libnbd_sees_a_disk_that_can_be_written_to_and_fills_it(images: Path, qemu_img: QemuImg) -> None:
    image = image_of(images, "vhdx")
    new = make_disk(images / "new.raw", SIZE, pieces=30, seed=9)
    with served(image, "--writable", "--persistent") as running:
        said = subprocess.run(
            [oracle_program("nbdinfo"), "--json", running.uri], capture_output=True, text=True, check=True
        ).stdout
        (export,) = json.loads(said)["exports"]
        assert export["is_read_only"] is False
        for what in ("flush", "fua", "trim", "zero", "multi_conn"):
            assert export[f"can_{what}"] is True, what
        subprocess.run([oracle_program("nbdcopy"), "--flush", str(new), running.uri], check=True)
        qemu_img("compare", "-f", "raw", "-F", "raw", new, running.uri)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", new, layer_of(image))


def test_writes_to_a_mount_are_read_again(images: Path, point: Path, qemu_img: QemuImg) -> None:
    image = image_of(images, "vmdk")
    before = digest(image)
    model = bytearray((images / "source" / "disk.raw").read_bytes())
    rng = random.Random(3)
    for _ in range(2):
        with mounted(image, point, "--writable"):
            path = point / "disk.raw"
            assert path.stat().st_size == SIZE
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            descriptor = os.open(path, os.O_RDWR)
            try:
                for _ in range(80):
                    start, length = rng.randrange(SIZE - 300_000), rng.randint(1, 300_000)
                    if rng.random() < 0.7:
                        data = rng.randbytes(length)
                        assert os.pwrite(descriptor, data, start) == length
                        model[start : start + length] = data
                    else:
                        subprocess.run(
                            ["fallocate", "--punch-hole", "-o", str(start), "-l", str(length), str(path)], check=True
                        )
                        model[start : start + length] = bytes(length)
                    at = rng.randrange(SIZE - 9999)
                    assert os.pread(descriptor, 9999, at) == model[at : at + 9999]
                os.fsync(descriptor)
                with pytest.raises(OSError, match="No space left"):
                    os.pwrite(descriptor, b"12", SIZE - 1)
                with pytest.raises(PermissionError):
                    os.ftruncate(descriptor, SIZE + 512)
            finally:
                os.close(descriptor)
            assert path.read_bytes() == model
    assert digest(image) == before
    wanted = images / "wanted.raw"
    wanted.write_bytes(model)
    qemu_img("check", layer_of(image))
    qemu_img("compare", "-f", "raw", "-F", "qcow2", wanted, layer_of(image))


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_server_has_kept_what_was_flushed(images: Path, qemu_img: QemuImg, seed: int) -> None:
    image = image_of(images, "vhdx")
    rng = random.Random(seed)
    layer = layer_of(image)
    flushed = [f"write -P {number} {number * 300_000 // 512 * 512} 200k" for number in range(1, 30)]
    later = [f"write -P 200 {rng.randrange(10 * MIB, SIZE - MIB, 512)} 64k" for _ in range(1000)]
    with served(image, "--writable", "--persistent") as running:
        for command in (flushed, ["flush"]):
            given = [part for each in command for part in ("-c", each)]
            subprocess.run(["qemu-io", "-f", "raw", *given, running.uri], check=True, capture_output=True)
        size = layer.stat().st_size
        given = [part for each in later for part in ("-c", each)]
        with subprocess.Popen(["qemu-io", "-f", "raw", *given, running.uri], stdout=subprocess.DEVNULL) as guest:
            # Writes in the middle of which the server ends.
            while layer.stat().st_size < size + 8 * 65536:
                time.sleep(0.001)
            running.process.send_signal(signal.SIGKILL)
            running.process.wait()
            guest.kill()
    done = subprocess.run(["qemu-img", "check", "-q", str(layer)], capture_output=True, text=True, check=False)
    # 3: leaked clusters only.
    assert done.returncode in (0, 3), done.stdout
    for number in range(1, 30):
        qemu_io(layer, f"read -P {number} {number * 300_000 // 512 * 512} 512")
    (images / "nbd.sock").unlink()
    with served(image, "--writable") as running:
        subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "read -P 1 299520 512", running.uri], check=True, capture_output=True
        )
        _, said = running.end()
    assert f"writes go to {layer} (has what was written before)" in said


def test_a_layer_is_used_by_one_process_only(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = image_of(images, "vhdx")
    layer = layer_of(image)
    with served(image, "--writable", "--persistent"):
        assert main(["serve", "--writable", "--socket", str(images / "other.sock"), str(image)]) != 0
        assert f"{layer.name}: is open in another process" in capsys.readouterr().err
        done = subprocess.run(["qemu-io", "-c", "write 0 512", str(layer)], capture_output=True, text=True, check=False)
        assert "lock" in done.stderr
        # The image is locked against writers, too.
        done = subprocess.run(["qemu-io", "-c", "write 0 512", str(image)], capture_output=True, text=True, check=False)
        assert "lock" in done.stderr


def test_other_files_are_no_layer(images: Path, qemu_img: QemuImg, capsys: pytest.CaptureFixture[str]) -> None:
    image = image_of(images, "vhdx")
    other = images / "other.raw"
    other.write_bytes(bytes(SIZE))
    layer = images / "other.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", other.name, "-F", "raw", layer)
    before = digest(layer)
    for named, said in (
        (layer, "is no layer on"),
        (other, "no qcow2 signature"),
        (images, "Is a directory"),
    ):
        assert main(["serve", "--writable", "--overlay", str(named), str(image)]) != 0
        assert said in capsys.readouterr().err
    os.chown(layer, 12345, 12345)
    assert main(["serve", "--writable", "--overlay", str(layer), str(image)]) != 0
    assert "is no file of this user" in capsys.readouterr().err
    assert digest(layer) == before


def test_a_layer_elsewhere_names_its_image_by_its_whole_path(images: Path, qemu_img: QemuImg) -> None:
    image = image_of(images, "vhdx")
    elsewhere = images / "elsewhere"
    elsewhere.mkdir()
    layer = elsewhere / "changes.qcow2"
    with served(image, "--writable", "--overlay", str(layer)) as running:
        subprocess.run(["qemu-io", "-f", "raw", "-c", "write -P 7 0 512", running.uri], check=True, capture_output=True)
        running.end()
    assert not layer_of(image).exists()
    qemu_io(layer, "read -P 7 0 512", f"read {SIZE - 512} 512")


@pytest.mark.parametrize("end", ["--commit", "--discard"])
def test_the_end_is_what_the_user_says(images: Path, qemu_img: QemuImg, end: str) -> None:
    image = image_of(images, "vhdx")
    with served(image, "--writable", end) as running:
        subprocess.run(["qemu-io", "-f", "raw", "-c", "write -P 7 0 1M", running.uri], check=True, capture_output=True)
        code, said = running.end()
    assert code == 0, said
    assert not layer_of(image).exists()
    wanted = bytearray((images / "source" / "disk.raw").read_bytes())
    if end == "--commit":
        wanted[:MIB] = bytes([7]) * MIB
    found = images / "found.raw"
    qemu_img("convert", "-O", "raw", image, found)
    assert found.read_bytes() == wanted


def test_the_verb_commit_brings_a_layer_into_its_image(images: Path, qemu_img: QemuImg) -> None:
    image = image_of(images, "vmdk")
    with served(image, "--writable") as running:
        subprocess.run(["qemu-io", "-f", "raw", "-c", "write -P 9 1M 1M", running.uri], check=True, capture_output=True)
        running.end()
    assert main(["commit", "-q", str(layer_of(image))]) == 0
    qemu_io(image, "read -P 9 1M 1M")


def test_an_image_that_changes_below_its_layer_ends_the_server(images: Path) -> None:
    image = image_of(images, "raw")
    with served(image, "--writable", "--force-share") as running:
        with image.open("r+b") as file:
            file.write(b"changed")
        done = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "write 512 512", running.uri], capture_output=True, text=True, check=False
        )
        assert "Input/output error" in done.stdout + done.stderr
        code, said = running.end()
    assert code == 1
    assert "changed while it was being viewed" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--commit"], "--commit needs --writable"),
        (["--writable", "--as", "vhdx"], "exports the guest's disk, as raw"),
        (["--writable", "--commit", "--discard"], "not allowed with"),
    ],
)
def test_contradictions_are_refused(
    images: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "disk.raw").write_bytes(bytes(MIB))
    try:
        code = main(["serve", *flags, str(images / "disk.raw")])
    except SystemExit as exc:
        code = int(str(exc.code))
    assert code == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in images.iterdir() if path.is_file()] == ["disk.raw"]
