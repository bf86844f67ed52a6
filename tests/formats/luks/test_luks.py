"""LUKS: the conformance kit, containers of QEMU and cryptsetup, passphrases, hostile headers."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk
from support.kits.luks import LuksKit
from support.luks_images import (
    PASSPHRASE,
    QUICK1,
    QUICK2,
    QUICK_ARGON,
    changed,
    container,
    cryptsetup,
    encrypted,
    filled,
    key_of,
    payload_of,
    secret,
)
from vmconv.cli.main import main
from vmconv.errors import AccessError, ImageError, SecretError
from vmconv.plugin import UsageError
from vmconv_luks.ciphers import SectorCipher

SIZE = 5 * MIB


class TestLuks(LuksKit):
    """The conformance kit."""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", SIZE, pieces=20)


def by_qemu(disk: Path, qemu_img: QemuImg, *options: str) -> Path:
    """Returns a container that QEMU made of the disk."""
    target = disk.with_suffix(".luks")
    given = ",".join(("key-secret=s", "iter-time=10", *options))
    secrets = ("--object", f"secret,id=s,file={secret(disk.parent)}")
    for last in range(9):
        # QEMU 7.2 measures how fast it is, and fails on a busy machine: "Unable to get accurate CPU usage".
        if not qemu_img(
            "convert", "-O", "luks", *secrets, "-o", given, disk, target, ok=(0, 1) if last < 8 else (0,)
        ).returncode:
            break
    return target


FLAVOURS = [
    (),
    ("cipher-alg=aes-256", "cipher-mode=cbc", "ivgen-alg=essiv", "ivgen-hash-alg=sha256", "hash-alg=sha512"),
]


@pytest.mark.parametrize("options", FLAVOURS, ids=lambda options: "-".join(options) or "default")
def test_what_qemu_encrypts_is_the_disk(disk: Path, qemu_img: QemuImg, options: tuple[str, ...]) -> None:
    image, target = by_qemu(disk, qemu_img, *options), disk.parent / "new.qcow2"
    result = vmconv.convert(image, target, secrets=[secret(disk.parent)])
    assert (result.totals.shared, result.totals.copied) == (0, SIZE)
    assert result.losses == ("its encryption: passphrases, key and cipher",)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", disk, target)
    theirs = json.loads(qemu_img("info", "--output=json", image).stdout)["format-specific"]["data"]
    ours = vmconv.info(image)
    assert ours["encrypted"] is True
    data = ours["format-specific"]["data"]
    assert {name: data[name] for name in theirs if name != "detached-header"} == {
        name: value for name, value in theirs.items() if name != "detached-header"
    }


VOLUMES = [
    (QUICK1, "aes-xts-plain64", 64, 512),
    (QUICK1, "aes-cbc-essiv:sha256", 32, 512),
    (QUICK2, "aes-xts-plain64", 32, 512),
    (QUICK2, "aes-xts-plain64", 64, 4096),
    (QUICK2, "aes-cbc-plain64", 32, 2048),
    (QUICK_ARGON, "aes-xts-plain64", 64, 4096),
    ((*QUICK_ARGON, "--pbkdf", "argon2i"), "aes-cbc-essiv:sha256", 16, 512),
]


@pytest.mark.parametrize(("options", "mode", "length", "sector"), VOLUMES)
def test_a_container_of_cryptsetup_is_decrypted(
    disk: Path, options: tuple[str, ...], mode: str, length: int, sector: int
) -> None:
    key = key_of(length)
    given = (*options, "-c", mode, *(("--sector-size", str(sector)) if options is not QUICK1 else ()))
    image = filled(container(disk.parent, *given, key=key, size=SIZE), disk.read_bytes(), key, mode, sector)
    vmconv.convert(image, disk.parent / "new.raw", secrets=[secret(disk.parent)])
    assert (disk.parent / "new.raw").read_bytes() == disk.read_bytes()
    report = vmconv.check(image)
    assert report
    assert (report.corruption_count, report.errors) == (0, ())
    assert "without a passphrase" in report.doubts[0]
    assert not (vmconv.check(image, secrets=[secret(disk.parent)]) or report).doubts


def test_qemu_and_vmconv_decrypt_the_same(disk: Path, qemu_img: QemuImg) -> None:
    options = (*QUICK1, "--hash", "sha1", "-c", "aes-cbc-plain")
    image = container(disk.parent, *options, key=key_of(16), size=SIZE)
    vmconv.convert(image, disk.parent / "new.raw", secrets=[secret(disk.parent)])
    given = f"driver=luks,key-secret=s,file.filename={image}"
    secrets = ("--object", f"secret,id=s,file={secret(disk.parent)}")
    qemu_img("compare", *secrets, "--image-opts", given, f"driver=raw,file.filename={disk.parent / 'new.raw'}")


@pytest.mark.parametrize("mode", ["aes-xts-plain64", "aes-cbc-plain64", "aes-cbc-essiv:sha256"])
@pytest.mark.parametrize("unit", [512, 4096])
def test_sectors_together_are_sectors_one_by_one(mode: str, unit: int) -> None:
    key, data = key_of(32), os.urandom(5 * 4096)
    cipher = SectorCipher(mode, key, unit)
    packed = encrypted(data, key, mode, unit)
    assert cipher.encrypt(0, data) == packed
    assert cipher.decrypt(0, packed) == data
    assert cipher.decrypt(8, packed[4096:8192]) == data[4096:8192]


def test_sector_numbers_of_plain_have_32_bits() -> None:
    plain, long = (SectorCipher(f"aes-cbc-{name}", key_of(32)) for name in ("plain", "plain64"))
    data = os.urandom(1024)
    assert plain.encrypt(0xFFFFFFFF, data)[:512] == long.encrypt(0xFFFFFFFF, data)[:512]
    assert plain.encrypt(0xFFFFFFFF, data)[512:] == long.encrypt(0, data[512:])


def test_any_key_slot_and_any_secret_is_tried(disk: Path) -> None:
    key = key_of()
    image = filled(container(disk.parent, *QUICK2, key=key, size=SIZE), disk.read_bytes(), key)
    one, two = secret(disk.parent), secret(disk.parent, b"second\n", "two")
    cryptsetup("luksAddKey", *QUICK2[2:6], "-q", "--key-file", one, image, two)
    cryptsetup("luksKillSlot", "--key-file", two, image, "0")
    with pytest.raises(AccessError, match=r"disk\.luks: the passphrase opens none of its 1 key slot$"):
        vmconv.convert(image, disk.parent / "new.raw", secrets=[one])
    vmconv.convert(image, disk.parent / "new.raw", secrets=[one, two])
    assert (disk.parent / "new.raw").read_bytes() == disk.read_bytes()


def test_a_wrong_passphrase_is_one_line_with_a_hint(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = container(disk.parent, *QUICK1, key=key_of(), size=SIZE)
    wrong = secret(disk.parent, PASSPHRASE + b"\n", "wrong")
    assert main(["convert", "--secret", str(wrong), str(image), str(disk.parent / "new.raw")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "vmconv: disk.luks: the passphrase opens none of its 1 key slot",
        "  hint: the secret ends with a line break, which is part of it: printf %s writes none",
    ]
    assert not (disk.parent / "new.raw").exists()


def test_without_a_passphrase_only_the_header_is_read(disk: Path) -> None:
    image = container(disk.parent, *QUICK1, key=key_of(), size=SIZE)
    assert vmconv.info(image)["virtual-size"] == SIZE
    for use in (lambda: vmconv.plan(image, disk.parent / "new.raw"), lambda: vmconv.compare(image, disk)):
        with pytest.raises(SecretError, match=r"disk\.luks: is encrypted, and no passphrase is given") as caught:
            use()
        assert "--secret FILE" in str(caught.value.hint)


@pytest.mark.parametrize("where", ["file", "pipe", "descriptor"])
def test_the_passphrase_is_read_from_a_file_or_a_pipe(disk: Path, where: str) -> None:
    key = key_of()
    image = filled(container(disk.parent, *QUICK1, key=key, size=SIZE), disk.read_bytes(), key)
    read, write = os.pipe()
    os.write(write, PASSPHRASE)
    os.close(write)
    name = {"file": str(secret(disk.parent)), "pipe": "-", "descriptor": f"/dev/fd/{read}"}[where]
    # The secret is for both images.
    command = [sys.executable, "-m", "vmconv", "compare", "--secret", name, str(image), str(image)]
    subprocess.run(command, stdin=read if where == "pipe" else None, pass_fds=[read], check=True)
    os.close(read)


@pytest.mark.parametrize(("typed", "mode"), [(False, 0o640), (True, 0o600)])
def test_what_was_encrypted_is_readable_to_who_can_read_the_secret(disk: Path, typed: bool, mode: int) -> None:
    image, key = container(disk.parent, *QUICK1, key=key_of(), size=SIZE), secret(disk.parent)
    image.chmod(0o644)
    key.chmod(0o640)
    read, write = os.pipe()
    os.write(write, PASSPHRASE)
    os.close(write)
    vmconv.convert(image, disk.parent / "new.raw", secrets=[f"/dev/fd/{read}" if typed else key])
    os.close(read)
    assert stat.S_IMODE((disk.parent / "new.raw").stat().st_mode) == mode


def test_a_pipe_is_not_both_the_source_and_a_secret(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--secret", "-", "-", str(disk.parent / "new.raw")]) == 2
    assert "--secret -: it is the source already" in capsys.readouterr().err


def test_secrets_that_are_none_are_refused_by_name(disk: Path) -> None:
    image, empty = container(disk.parent, *QUICK1, key=key_of(), size=SIZE), secret(disk.parent, b"", "empty")
    for secrets, words in (
        ([empty], "empty: is empty, and a secret was expected"),
        ([disk.parent / "gone"], "gone: cannot be opened as a secret: No such file"),
        (["/dev/zero"], "/dev/zero: has more than 8388608 bytes"),
    ):
        with pytest.raises(AccessError, match=words):
            vmconv.convert(image, disk.parent / "new.raw", secrets=secrets)
    with pytest.raises(UsageError, match="17 files, 16 at most"):
        vmconv.convert(image, disk.parent / "new.raw", secrets=[f"{number}" for number in range(17)])


def test_the_second_header_is_used_if_the_first_is_damaged(disk: Path) -> None:
    key = key_of()
    image = filled(container(disk.parent, *QUICK2, key=key, size=SIZE), disk.read_bytes(), key)
    data = bytearray(image.read_bytes())
    data[5000] ^= 1
    image.write_bytes(data)
    vmconv.convert(image, disk.parent / "new.raw", secrets=[secret(disk.parent)])
    assert (disk.parent / "new.raw").read_bytes() == disk.read_bytes()
    assert any(
        "csum at 0x1c0: does not match; the other header is used" in one for one in vmconv.info(image)["warnings"]
    )
    data[16384 + 5000] ^= 1
    image.write_bytes(data)
    with pytest.raises(ImageError, match="csum at 0x1c0: does not match"):
        vmconv.info(image)


HOSTILE = [
    (
        "keyslots.0.kdf.iterations",
        1 << 27,
        r"keyslots\.0\.kdf\.iterations at 0x1000: Input should",
    ),
    ("keyslots.0.kdf.type", "scrypt", r"keyslots\.0\.kdf\.type"),
    ("keyslots.0.af.stripes", 1 << 30, r"keyslots\.0\.af\.stripes"),
    ("keyslots.0.key_size", 1 << 20, r"keyslots\.0\.key_size"),
    ("keyslots.0.area.offset", "99999999999", r"keyslots\.0\.area at .* outside of the key slots"),
    ("keyslots.0.area.size", "512", r"keyslots\.0\.area\.size at .* 512 bytes"),
    ("keyslots.0.area.size", 512, r"keyslots\.0\.area\.size at .* is not a number as text"),
    ("keyslots.0.area.encryption", "serpent-xts-plain64", r"cipher 'serpent-xts-plain64' is not"),
    ("keyslots.0.type", "reencrypt", "nobody can decrypt"),
    ("segments.0.encryption", "aes-gcm-random", "cipher 'aes-gcm-random' is not supported"),
    ("segments.0.integrity", {}, r"segments\.0 at .* integrity is not supported"),
    ("segments.0.offset", "0", "payload lies in another file"),
    ("segments.0.offset", "9999999999999999999999", r"segments\.0\.offset"),
    ("segments.0.size", "5", "0x5 are no sectors"),
    ("segments.0.type", "linear", "'linear' is not supported"),
    ("segments.1", {"type": "crypt", "offset": "0", "size": "512"}, "0, 1: only one segment"),
    ("digests.0.iterations", 1 << 40, r"digests\.0\.iterations"),
    ("digests.0.digest", "AAAA", r"digests\.0\.digest.*3 bytes are no digest of sha256"),
    ("digests.0.digest", "", "0 bytes are no digest of sha256"),
    ("digests", {}, "none is of the segment"),
    ("config.requirements", {"mandatory": ["online-reencrypt-v2"]}, "'online-reencrypt-v2' is not"),
    ("keyslots", [[[[]]]], "JSON area, keyslots"),
    ("tokens", {str(number): {} for number in range(65)}, "JSON area, tokens"),
]


@pytest.mark.malformed
@pytest.mark.parametrize(("path", "value", "words"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_json_area_is_refused_by_field(disk: Path, path: str, value: object, words: str) -> None:
    image = container(disk.parent, *QUICK2, key=key_of(), size=SIZE)

    def change(area: Any) -> None:
        *names, last = path.split(".")
        for name in names:
            area = area[name]
        area[last] = value

    changed(image, change)
    with pytest.raises(ImageError, match=words):
        vmconv.convert(image, disk.parent / "new.raw", secrets=[secret(disk.parent)])


@pytest.mark.malformed
@pytest.mark.parametrize(
    ("memory", "time", "words"),
    [
        (8 << 20, 4, r"keyslots\.0\.kdf\.memory"),
        (4 << 20, 1000, "1000 passes over 4194304 KiB, 67108864 KiB together at most"),
        (1, 4, r"keyslots\.0\.kdf\.memory"),
    ],
)
def test_argon2_takes_no_more_than_its_limits(disk: Path, memory: int, time: int, words: str) -> None:
    image = container(disk.parent, *QUICK_ARGON, key=key_of(), size=SIZE)

    def change(area: Any) -> None:
        area["keyslots"]["0"]["kdf"] |= {"memory": memory, "time": time}

    changed(image, change)
    with pytest.raises(ImageError, match=words):
        vmconv.info(image)


HEADER1 = [
    (8, b"serpent\0", "cipher 'serpent-xts-plain64' is not supported"),
    (40, b"ecb\0", "cipher 'aes-ecb' is not supported"),
    (72, b"ripemd160\0", "hash 'ripemd160' is not supported"),
    (104, b"\0\0\0\0", "payload lies in another file"),
    (104, b"\xff\xff\xff\xff", "payload_offset at 0x68: 0x1fffffffe00 is past the end of the file"),
    (108, b"\0\0\0\x07", "a key of 7 bytes, aes-xts has 32 or 64"),
    (108, b"\x7f\0\0\0", r"key_bytes at 0x6c: 2130706432 is not in 1\.\.128"),
    (164, b"\xff\xff\xff\xff", "mk_digest_iterations at 0xa4"),
    (208, b"\x12\x34\x56\x78", "key slot 0 at 0xd0: 0x12345678 is neither enabled nor disabled"),
    (212, b"\xff\xff\xff\xff", "key slot 0 at 0xd0: iterations 4294967295 is not in"),
    (248, b"\xff\xff\xff\xff", "key slot 0 at 0xd0: 256000 bytes at 0x1fffffffe00 lie outside"),
    (248, b"\0\0\0\0", "key slot 0 at 0xd0: 256000 bytes at 0x0 lie outside"),
    (252, b"\0\xff\xff\xff", "key slot 0 at 0xd0: stripes 16777215 is not in"),
    (6, b"\0\3", r"version at 0x6: 3 is not in 1\.\.2"),
]


@pytest.mark.malformed
@pytest.mark.parametrize(("offset", "data", "words"), HEADER1, ids=range(len(HEADER1)))
def test_a_hostile_header_is_refused_by_field(disk: Path, offset: int, data: bytes, words: str) -> None:
    image = container(disk.parent, *QUICK1, key=key_of(), size=SIZE)
    with image.open("r+b") as file:
        os.pwrite(file.fileno(), data, offset)
    with pytest.raises(ImageError, match=words):
        vmconv.info(image)


@pytest.mark.malformed
def test_key_slots_of_too_many_iterations_together_are_refused(disk: Path) -> None:
    image = container(disk.parent, *QUICK1, key=key_of(), size=SIZE)
    with image.open("r+b") as file:
        slot = os.pread(file.fileno(), 48, 208)
        for number in range(8):
            os.pwrite(file.fileno(), slot[:4] + (1 << 26).to_bytes(4, "big") + slot[8:], 208 + 48 * number)
    with pytest.raises(ImageError, match="more than 134217728 iterations in all key slots"):
        vmconv.info(image)


def test_parts_that_overlap_are_found_by_the_check(disk: Path) -> None:
    image = container(disk.parent, *QUICK1, key=key_of(), size=SIZE)
    with image.open("r+b") as file:
        os.pwrite(file.fileno(), (payload_of(image) // 512 - 200).to_bytes(4, "big"), 248)
    report = vmconv.check(image)
    assert report
    assert "payload and key slot 0 both lie at" in report.corruptions[0]


def test_a_part_of_a_sector_at_the_end_is_left_out_with_a_warning(disk: Path) -> None:
    image = container(disk.parent, *QUICK1, key=key_of(), size=SIZE + 100)
    assert vmconv.info(image)["virtual-size"] == SIZE
    assert vmconv.info(image)["warnings"] == ["disk.luks: 100 bytes at its end are no sector"]
