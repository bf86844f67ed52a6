"""qcow2 that vmconv encrypts by LUKS: QEMU and the own reader see the disk, wrong results and requests are refused."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk
from support.luks_images import PASSPHRASE, secret
from vmconv.cli.main import main
from vmconv.errors import AccessError, PlanError, UsageError, VerifyError, ZeroCopyError
from vmconv.interface.arguments import Verify
from vmconv.plugin import Encrypted, Encryptor, Extents, File, Source
from vmconv_luks import writer
from vmconv_luks.keys import merged
from vmconv_qcow2.writer import _Tables, _Writer

SIZE = 9 * MIB + 512


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passphrases that are quick to derive a key from."""
    monkeypatch.setattr(writer, "iterations", lambda: 1000)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", SIZE, pieces=9)


def opened(image: Path, passphrase: Path) -> tuple[str, ...]:
    """Returns the arguments by which qemu-img opens an encrypted image."""
    given = f"driver=qcow2,encrypt.key-secret=s,file.filename={image}"
    return "--object", f"secret,id=s,file={passphrase}", "--image-opts", given


FLAVOURS: list[dict[str, str]] = [
    {},
    {"cluster_size": "512"},
    {"cluster_size": "2M", "compat": "0.10"},
    {"extended_l2": "on"},
    {"refcount_bits": "1", "lazy_refcounts": "on"},
]


@pytest.mark.parametrize("options", FLAVOURS, ids=lambda one: "-".join(one) or "default")
@pytest.mark.parametrize("passphrase", [PASSPHRASE, "Ärger\n".encode()], ids=["plain", "with a line break"])
def test_qemu_and_vmconv_read_the_disk(
    disk: Path, tmp_path: Path, qemu_img: QemuImg, options: dict[str, str], passphrase: bytes
) -> None:
    known, image = secret(tmp_path, passphrase), tmp_path / "new.qcow2"
    result = vmconv.convert(disk, image, options=options, target_secret=known, verify="bytes")
    (copied,) = result.copies
    assert copied.reason == "the new image is encrypted"
    assert result.totals.shared == 0
    qemu_img("compare", *opened(image, known), f"driver=raw,file.filename={disk}")
    qemu_img("check", *opened(image, known))
    report = vmconv.check(image, secrets=[known])
    assert report
    assert (report.corruptions, report.leaks, report.errors, report.doubts) == ((), (), (), ())
    vmconv.convert(image, tmp_path / "back.raw", secrets=[known])
    assert (tmp_path / "back.raw").read_bytes() == disk.read_bytes()


def test_another_passphrase_opens_nothing(disk: Path, tmp_path: Path, qemu_img: QemuImg) -> None:
    known, image = secret(tmp_path), tmp_path / "new.qcow2"
    vmconv.convert(disk, image, target_secret=known)
    wrong = secret(tmp_path, PASSPHRASE + b"\n", "wrong")
    with pytest.raises(AccessError, match=r"new\.qcow2: the passphrase opens none of its 1 key slot"):
        vmconv.convert(image, tmp_path / "back.raw", secrets=[wrong])
    refused = qemu_img("compare", *opened(image, wrong), f"driver=raw,file.filename={disk}", ok=(2,))
    assert "Invalid password" in refused.stderr


def test_nothing_of_the_disk_or_of_the_passphrase_is_in_the_image(tmp_path: Path) -> None:
    disk, image = tmp_path / "disk.raw", tmp_path / "new.qcow2"
    disk.write_bytes(b"plain text of 32 bytes, repeated" * 8192)
    vmconv.convert(disk, image, target_secret=secret(tmp_path))
    data = image.read_bytes()
    assert b"plain text" not in data
    assert PASSPHRASE not in data
    # Equal sectors differ when they are encrypted.
    sectors = [data[at : at + 512] for at in range(0, len(data), 512)]
    payload = [one for one in sectors if one.count(0) < 64]
    assert len(payload) > 500
    assert len(set(payload)) == len(payload)


def test_each_image_has_its_own_key(disk: Path, tmp_path: Path) -> None:
    known = secret(tmp_path)
    for name in ("one.qcow2", "two.qcow2"):
        vmconv.convert(disk, tmp_path / name, target_secret=known)
    one, two = ((tmp_path / name).read_bytes() for name in ("one.qcow2", "two.qcow2"))
    assert len(one) == len(two)
    at = len(one) - 65536
    assert one[at:] != two[at:]
    facts = [vmconv.info(tmp_path / name)["format-specific"]["data"]["encrypt"] for name in ("one.qcow2", "two.qcow2")]
    assert facts[0]["uuid"] != facts[1]["uuid"]


def test_its_facts_are_those_of_qemu(disk: Path, tmp_path: Path, qemu_img: QemuImg) -> None:
    image = tmp_path / "new.qcow2"
    vmconv.convert(disk, image, target_secret=secret(tmp_path))
    theirs = json.loads(qemu_img("info", "--output=json", image).stdout)["format-specific"]["data"]["encrypt"]
    ours = vmconv.info(image)["format-specific"]["data"]["encrypt"]
    assert {name: ours[name] for name in theirs if name != "detached-header"} == {
        name: value for name, value in theirs.items() if name != "detached-header"
    }
    assert (ours["cipher-alg"], ours["cipher-mode"], ours["ivgen-alg"]) == ("aes-256", "xts", "plain64")
    # QEMU lays out its header so.
    assert ours["payload-offset"] == 2068480


def test_qemu_goes_on_writing(disk: Path, tmp_path: Path, qemu_img: QemuImg) -> None:
    """A changed image of QEMU decrypts for vmconv, too."""
    known, image = secret(tmp_path), tmp_path / "new.qcow2"
    vmconv.convert(disk, image, target_secret=known)
    given = f"driver=qcow2,encrypt.key-secret=s,file.filename={image}"
    command = ["qemu-io", "--object", f"secret,id=s,file={known}", "-c", "write -P 7 1M 64k", "--image-opts", given]
    subprocess.run(command, check=True, capture_output=True)
    qemu_img("check", *opened(image, known))
    vmconv.convert(image, tmp_path / "back.raw", secrets=[known])
    wanted = bytearray(disk.read_bytes())
    wanted[MIB : MIB + 65536] = b"\7" * 65536
    assert (tmp_path / "back.raw").read_bytes() == bytes(wanted)


def test_an_encrypted_source_gets_another_key(disk: Path, tmp_path: Path, qemu_img: QemuImg) -> None:
    first, second = secret(tmp_path), secret(tmp_path, b"second", "second")
    vmconv.convert(disk, tmp_path / "one.qcow2", target_secret=first)
    vmconv.convert(tmp_path / "one.qcow2", tmp_path / "two.qcow2", secrets=[first], target_secret=second)
    qemu_img("compare", *opened(tmp_path / "two.qcow2", second), f"driver=raw,file.filename={disk}")


@pytest.mark.parametrize("layers", [1, 2])
def test_a_chain_becomes_one_encrypted_image(disk: Path, tmp_path: Path, qemu_img: QemuImg, layers: int) -> None:
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", disk, "-F", "raw", top)
    if layers == 2:
        qemu_img("create", "-f", "qcow2", "-b", top, "-F", "qcow2", tmp_path / "higher.qcow2")
        top = tmp_path / "higher.qcow2"
    subprocess.run(["qemu-io", "-c", "write -P 9 3M 70k", str(top)], check=True, capture_output=True)
    known, image = secret(tmp_path), tmp_path / "new.qcow2"
    vmconv.convert(top, image, target_secret=known)
    qemu_img("compare", *opened(image, known), f"driver=qcow2,file.filename={top}")


def test_bitmaps_are_carried(tmp_path: Path, qemu_img: QemuImg) -> None:
    source, image, known = tmp_path / "source.qcow2", tmp_path / "new.qcow2", secret(tmp_path)
    qemu_img("create", "-f", "qcow2", source, "40M")
    qemu_img("bitmap", "--add", source, "b0")
    subprocess.run(["qemu-io", "-c", "write -P 5 3M 1M", str(source)], check=True, capture_output=True)
    vmconv.convert(source, image, target_secret=known, bitmaps=True)
    qemu_img("check", *opened(image, known))
    qemu_img("compare", *opened(image, known), f"driver=qcow2,file.filename={source}")
    (bitmap,) = json.loads(qemu_img("info", "--output=json", image).stdout)["format-specific"]["data"]["bitmaps"]
    assert bitmap["name"] == "b0"


def test_disks_are_joined_into_an_encrypted_one(disk: Path, tmp_path: Path, qemu_img: QemuImg) -> None:
    known, image, joined = secret(tmp_path), tmp_path / "new.qcow2", tmp_path / "joined.raw"
    vmconv.convert(disk, image, more_sources=[disk], target_secret=known)
    joined.write_bytes(disk.read_bytes() * 2)
    qemu_img("compare", *opened(image, known), f"driver=raw,file.filename={joined}")


@pytest.mark.parametrize("size", [0, 512])
def test_a_disk_of_zeros(tmp_path: Path, qemu_img: QemuImg, size: int) -> None:
    disk, image, known = tmp_path / "disk.raw", tmp_path / "new.qcow2", secret(tmp_path)
    disk.write_bytes(bytes(size))
    vmconv.convert(disk, image, target_secret=known)
    qemu_img("check", *opened(image, known))
    assert vmconv.info(image)["encrypted"] is True


REFUSED = [
    ({"in_place": True}, "--in-place"),
    ({"chain": True}, "--chain"),
    ({"no_create": True}, "-n"),
    ({"compress": True}, "-c"),
    ({"backing_file": "base.qcow2"}, "-B"),
    ({"target_format": "vhdx"}, "vmconv does not encrypt vhdx"),
    ({"target_secret": "-"}, "is read from a file"),
    ({"options": {"data_file": "disk.raw"}}, "data_file"),
    ({"options": {"subformat": "reference"}}, "subformat=reference"),
    ({"options": {"compress": "on"}}, "compressed clusters"),
    ({"options": {"preallocation": "full"}}, "preallocated"),
]


@pytest.mark.parametrize(("given", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_what_cannot_be_encrypted_is_refused_in_one_line(
    disk: Path, tmp_path: Path, given: dict[str, object], named: str
) -> None:
    before = sorted([*tmp_path.iterdir(), secret(tmp_path)])
    kept = disk.read_bytes()
    asked = {"target_secret": tmp_path / "secret", **given}
    with pytest.raises((UsageError, PlanError)) as caught:
        vmconv.convert(disk, tmp_path / "new.qcow2", **asked)  # type: ignore[arg-type]
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before
    assert disk.read_bytes() == kept


def test_nothing_is_shared(disk: Path, tmp_path: Path) -> None:
    with pytest.raises(ZeroCopyError, match="because the new image is encrypted"):
        vmconv.convert(disk, tmp_path / "new.qcow2", target_secret=secret(tmp_path), zero_copy="require")


SECRETS = [
    (b"", "is empty, and a secret was expected"),
    (b"a" * ((8 << 20) + 1), "has more than 8388608 bytes"),
    (b"hidden\0part", "has a NUL byte"),
    (b"hidden\xff", "is not UTF-8"),
]


@pytest.mark.parametrize(("passphrase", "named"), SECRETS, ids=[named for _, named in SECRETS])
def test_a_bad_passphrase_is_refused_and_not_shown(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], passphrase: bytes, named: str
) -> None:
    known = secret(tmp_path, passphrase)
    assert main(["convert", "--target-secret", str(known), str(disk), str(tmp_path / "new.qcow2")]) == 1
    said = capsys.readouterr()
    assert named in said.err
    assert "hidden" not in said.err + said.out
    assert not (tmp_path / "new.qcow2").exists()


@pytest.mark.parametrize("passphrase", [b"hidden\0part", b"hidden\xff"])
def test_qemu_takes_no_such_passphrase(tmp_path: Path, qemu_img: QemuImg, passphrase: bytes) -> None:
    known = secret(tmp_path, passphrase)
    given = ("--object", f"secret,id=s,file={known}", "-o", "encrypt.format=luks,encrypt.key-secret=s")
    assert "UTF-8" in qemu_img("create", *given, "-f", "qcow2", tmp_path / "theirs.qcow2", "1M", ok=(1,)).stderr


# What is verified


def _not_encrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(_name: str, _file: File, plain: Extents, _encryptor: Encryptor) -> Source:
        return plain.sources[0]

    monkeypatch.setattr("vmconv_qcow2.writer.Encrypted", plain)


def _by_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmconv_luks.writer.key_name", lambda name, _key: f"{name} of another key")


def _as_another_sector(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Encrypted.__init__

    def shifted(self: Encrypted, name: str, file: File, plain: Extents, encryptor: Encryptor) -> None:
        encrypt = encryptor.encrypt
        other = Encryptor(b"", 0, encryptor.cipher, lambda number, data: encrypt(number + 1, data), b"")
        begin(self, name, file, plain, other)

    monkeypatch.setattr(Encrypted, "__init__", shifted)


def _said_to_be_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    build = _Writer._header

    def without(self: _Writer, tables: _Tables) -> bytes:
        head = bytearray(build(self, tables))
        head[35] = 0
        return bytes(head)

    monkeypatch.setattr(_Writer, "_header", without)


@pytest.mark.parametrize(
    ("broken", "mode", "said"),
    [
        (_not_encrypted, "metadata", "differs from the source at guest address"),
        (_by_another_key, "metadata", "is not encrypted as it was planned"),
        (_as_another_sector, "bytes", "differs from the source at guest address"),
        (_said_to_be_plain, "metadata", "cannot be read back"),
    ],
)
def test_a_wrong_result_is_found(
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: Callable[[pytest.MonkeyPatch], None],
    mode: Verify,
    said: str,
) -> None:
    known = secret(tmp_path)
    broken(monkeypatch)
    with pytest.raises(VerifyError, match=said):
        vmconv.convert(disk, tmp_path / "new.qcow2", target_secret=known, verify=mode)
    assert not (tmp_path / "new.qcow2").exists()


# Key material


def test_stripes_are_the_key_and_each_is_needed() -> None:
    key = bytes(range(64))
    stripes = writer.split(key, 40, "sha256")
    assert merged(stripes, 64, "sha256") == key
    assert key not in stripes
    for at in range(0, len(stripes), 64):
        assert merged(stripes[:at] + bytes([stripes[at] ^ 1]) + stripes[at + 1 :], 64, "sha256") != key


def test_a_passphrase_takes_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert writer.LEAST_ITERATIONS <= writer.iterations() <= writer.MOST_ITERATIONS
    # A machine whose clock stands still, and one that is too slow to count.
    monkeypatch.setattr("vmconv_luks.writer.time.thread_time", lambda: 0.0)
    assert writer.iterations() == writer.MOST_ITERATIONS
    times = iter([0.0, 1000.0])
    monkeypatch.setattr("vmconv_luks.writer.time.thread_time", lambda: next(times))
    assert writer.iterations() == writer.LEAST_ITERATIONS


def test_an_encryptor_shows_no_secret() -> None:
    made = writer.encryptor(PASSPHRASE)
    assert PASSPHRASE.decode() not in repr(made)
    assert PASSPHRASE not in made.header
