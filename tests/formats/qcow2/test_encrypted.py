"""qcow2 with LUKS: images of QEMU, chains, what is refused."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from pathlib import Path

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk
from support.luks_images import secret
from vmconv.cli.main import main
from vmconv.errors import ImageError, SecretError

SIZE = 3 * MIB + 512
ENCRYPTED = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, qemu_img: QemuImg) -> Path:
    """A directory with a disk, and an encrypted image of it, which QEMU makes slowly."""
    folder = tmp_path_factory.mktemp("encrypted")
    disk = make_disk(folder / "disk.raw", SIZE, pieces=9)
    given = ("--object", f"secret,id=s,file={secret(folder)}", "-O", "qcow2", "-o", ENCRYPTED)
    for last in range(9):
        # QEMU 7.2 measures how fast it is, and fails on a busy machine: "Unable to get accurate CPU usage".
        if not qemu_img("convert", *given, disk, folder / "disk.qcow2", ok=(0, 1) if last < 8 else (0,)).returncode:
            break
    return folder


def test_what_qemu_encrypts_is_the_disk(made: Path, tmp_path: Path, qemu_img: QemuImg) -> None:
    target = tmp_path / "new.vhdx"
    result = vmconv.convert(made / "disk.qcow2", target, secrets=[made / "secret"])
    assert result.totals.shared == 0
    assert "its encryption: passphrases, key and cipher" in result.losses
    qemu_img("compare", "-f", "raw", "-F", "vhdx", made / "disk.raw", target)


def test_its_facts_need_no_passphrase(made: Path, qemu_img: QemuImg) -> None:
    theirs = json.loads(qemu_img("info", "--output=json", made / "disk.qcow2").stdout)
    ours = vmconv.info(made / "disk.qcow2")
    assert ours["encrypted"] is theirs["encrypted"] is True
    found, wanted = (said["format-specific"]["data"]["encrypt"] for said in (ours, theirs))
    assert {name: found[name] for name in wanted if name != "detached-header"} == {
        name: value for name, value in wanted.items() if name != "detached-header"
    }
    with pytest.raises(SecretError, match=r"disk\.qcow2: is encrypted"):
        vmconv.convert(made / "disk.qcow2", made / "new.raw")


def test_its_structure_is_checked_without_a_passphrase(made: Path) -> None:
    report = vmconv.check(made / "disk.qcow2")
    assert report
    assert (report.corruptions, report.leaks, report.errors) == ((), (), ())
    assert "without a passphrase" in report.doubts[0]


@pytest.mark.parametrize("name", ["top", "base"])
def test_layers_of_a_chain_are_decrypted(made: Path, tmp_path: Path, qemu_img: QemuImg, name: str) -> None:
    """The encrypted image on a plain base, and a plain layer on the encrypted image."""
    whole = tmp_path / "disk.qcow2"
    whole.write_bytes((made / "disk.qcow2").read_bytes())
    object_ = f"secret,id=s,file={made / 'secret'}"
    if name == "top":
        base = make_disk(tmp_path / "base.raw", SIZE, pieces=5, seed=7)
        top, stated = whole, ["driver=qcow2", "encrypt.key-secret=s", f"file.filename={whole}", "backing.driver=raw"]
        qemu_img("rebase", "-u", "-b", base, "-F", "raw", "--object", object_, *_opened(whole))
    else:
        top = tmp_path / "top.qcow2"
        qemu_img("create", "-u", "-f", "qcow2", "-b", whole, "-F", "qcow2", top, str(SIZE))
        stated = ["driver=qcow2", f"file.filename={top}", "backing.driver=qcow2", "backing.encrypt.key-secret=s"]
    below = tmp_path / "base.raw" if name == "top" else whole
    stated.append(f"backing.file.filename={below}")
    theirs = tmp_path / "theirs.raw"
    qemu_img("convert", "--object", object_, "--image-opts", ",".join(stated), "-O", "raw", theirs)
    vmconv.convert(top, tmp_path / "ours.raw", secrets=[made / "secret"])
    assert (tmp_path / "ours.raw").read_bytes() == theirs.read_bytes()


def _opened(path: Path) -> tuple[str, ...]:
    return "--image-opts", f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"


@pytest.mark.parametrize(
    "command",
    [
        ("resize", "disk.qcow2", "8M"),
        ("rebase", "-u", "-b", "", "disk.qcow2"),
        ("snapshot", "-c", "now", "disk.qcow2"),
        ("check", "-r", "all", "disk.qcow2"),
        ("convert", "--in-place", "--secret", "secret", "disk.qcow2", "new.vhdx"),
        ("convert", "-n", "disk.raw", "disk.qcow2"),
        ("sync", "disk.raw", "disk.qcow2"),
    ],
    ids=lambda command: command[0],
)
def test_an_encrypted_image_is_never_written(
    made: Path, tmp_path: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("disk.raw", "disk.qcow2", "secret"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "disk.qcow2").read_bytes()
    code = main(list(command))
    assert (tmp_path / "disk.qcow2").read_bytes() == before
    # There is nothing to repair.
    assert bool(code) is (command[0] != "check")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.qcow2", "disk.raw", "secret"]


def test_the_legacy_encryption_is_refused_by_name(tmp_path: Path, qemu_img: QemuImg, made: Path) -> None:
    del made
    image = tmp_path / "old.qcow2"
    qemu_img("create", "-f", "qcow2", image, "1M")
    data = bytearray(image.read_bytes())
    data[35] = 1
    image.write_bytes(data)
    with pytest.raises(ImageError, match="crypt_method at 0x20: AES encryption is not supported") as caught:
        vmconv.info(image)
    assert "qemu-img" in str(caught.value.hint)


@pytest.mark.parametrize("line", ["snapshot -c one {}", "rebase -u -b '' {}", "bitmap --add {} b0", "resize {} 20M"])
def test_a_command_without_passphrases_names_no_option_for_them(
    line: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes((made / "disk.qcow2").read_bytes())
    command, *_ = words = shlex.split(line.format(path))
    capsys.readouterr()
    with contextlib.suppress(SystemExit):
        main([command, "--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert options
    main(words)
    said = capsys.readouterr().err
    assert "is encrypted" in said
    for sentence in said.splitlines():
        assert "--secret" not in sentence or "--secret" in options or "vmconv convert --secret" in sentence, options
