"""Manifests of packages: digests by other programs, damaged ones, and what is read of the package for them."""

from __future__ import annotations

import hashlib
import io
import lzma
import subprocess
import tarfile
from pathlib import Path

import pytest

from support.ovf_packages import with_disk
from support.requirements import CORPUS, missing, oracle_program
from vmconv.errors import AccessError, ImageError
from vmconv.machine.digests import check_manifest
from vmconv.machine.findings import Finding
from vmconv.machine.source import opened
from vmconv.plugin import Manifest

OVF = with_disk()
DISK = bytes(range(256)) * 40
SHA = {name: hashlib.new(name, OVF).hexdigest() for name in ("sha1", "sha256", "sha512")}


def write(directory: Path, files: dict[str, bytes]) -> Path:
    """Makes a descriptor with the files beside it, and returns its path."""
    for name, content in {"web.ovf": OVF, "disk1.vmdk": DISK, **files}.items():
        (directory / name).write_bytes(content)
    return directory / "web.ovf"


def pack(directory: Path, files: dict[str, bytes]) -> Path:
    """Makes an OVA of the descriptor and the files, and returns its path."""
    with tarfile.open(directory / "web.ova", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in {"web.ovf": OVF, "disk1.vmdk": DISK, **files}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return directory / "web.ova"


MADE = pytest.mark.parametrize("make", [write, pack], ids=["ovf", "ova"])


def manifest(path: Path) -> Manifest | None:
    with opened(str(path)) as source:
        return source.manifest


def findings(path: Path) -> list[Finding]:
    with opened(str(path)) as source:
        return list(check_manifest(source))


@MADE
@pytest.mark.parametrize("algorithm", ["sha1", "sha256", "sha512"])
@pytest.mark.parametrize("program", ["openssl", "coreutils"])
def test_digests_of_other_programs_are_compared(make: object, algorithm: str, program: str, tmp_path: Path) -> None:
    write(tmp_path, {})
    command = [oracle_program("openssl"), algorithm] if program == "openssl" else [f"{algorithm}sum", "--tag"]
    done = subprocess.run([*command, "web.ovf", "disk1.vmdk"], cwd=tmp_path, capture_output=True, check=True)
    path = make(tmp_path, {"web.mf": done.stdout})  # type: ignore[operator]
    assert [one.level for one in findings(path)] == ["note"]
    path = make(tmp_path, {"web.mf": done.stdout, "disk1.vmdk": DISK[:-1] + b"x"})  # type: ignore[operator]
    first = findings(path)[0]
    assert (first.level, first.path) == ("error", "disk1.vmdk")
    assert hashlib.new(algorithm, DISK).hexdigest() in first.text
    path = make(tmp_path, {"web.mf": done.stdout, "web.ovf": OVF + b"\n"})  # type: ignore[operator]
    with pytest.raises(ImageError, match=f"{algorithm} of the descriptor web.ovf is"):
        manifest(path)


@pytest.mark.parametrize("number", [1, 2])
def test_manifests_of_virtualbox_are_right(number: int, tmp_path: Path) -> None:
    packed = CORPUS / "machines" / f"virtualbox7-ovf{number}.ova.xz"
    if not packed.exists():
        missing("corpus", f"{packed} is missing")
    (tmp_path / "demo.ova").write_bytes(lzma.decompress(packed.read_bytes()))
    assert findings(tmp_path / "demo.ova") == [
        Finding("note", "manifest", "2 files with the right digest, besides the configuration")
    ]


@MADE
def test_a_package_without_manifest_is_read(make: object, tmp_path: Path) -> None:
    path = make(tmp_path, {"other.txt": b""})  # type: ignore[operator]
    assert manifest(path) is None
    assert [(one.level, one.path) for one in findings(path)] == [("warning", "manifest")]


@MADE
def test_names_have_spaces_brackets_and_bytes_that_are_no_text(make: object, tmp_path: Path) -> None:
    lines = [f"SHA256(a) (b).vmdk)= {SHA['sha256'].upper()}", "", f"sha1 (\udcff) = {SHA['sha1']}", "\t"]
    text = "\r\n".join(lines).encode("utf-8", "surrogateescape")
    found = manifest(make(tmp_path, {"web.mf": b"\xef\xbb\xbf" + text}))  # type: ignore[operator]
    assert found is not None
    assert [tuple(each) for each in found.digests] == [
        ("a) (b).vmdk", "sha256", SHA["sha256"]),
        ("\udcff", "sha1", SHA["sha1"]),
    ]


BAD = {
    "text": (b"nonsense", "line 1: 'nonsense' is no digest"),
    "algorithm": (b"\nMD5(web.ovf)= " + b"0" * 32, r"line 2: 'MD5\(web.ovf\)= 0+' is no digest"),
    "length": (b"SHA1(web.ovf)= " + b"0" * 64, "line 1: .* is no digest"),
    "digits": (b"SHA1(web.ovf)= " + b"g" * 40, "line 1: .* is no digest"),
    "twice": (b"SHA1(a)= %s\nSHA1(a)= %s" % (b"0" * 40, b"1" * 40), "line 2: a second digest of 'a'"),
    "many": (
        b"".join(b"SHA1(%d)= %s\n" % (number, b"0" * 40) for number in range(10_001)),
        "line 10001: has more than 10000 digests",
    ),
    "large": (b" " * (9 << 20), "has 9437184 bytes, a .* has at most 8388608"),
}


@MADE
@pytest.mark.parametrize(("content", "problem"), BAD.values(), ids=BAD)
def test_malformed_manifests_are_refused(make: object, content: bytes, problem: str, tmp_path: Path) -> None:
    path = make(tmp_path, {"web.mf": content})  # type: ignore[operator]
    with pytest.raises(ImageError, match=problem) as caught:
        manifest(path)
    assert "\n" not in str(caught.value)
    assert "web.mf" in str(caught.value)


def test_of_several_manifests_that_of_the_descriptor_counts(tmp_path: Path) -> None:
    line = f"SHA1(disk1.vmdk)= {'0' * 40}".encode()
    found = manifest(pack(tmp_path, {"a.mf": b"nonsense", "web.mf": line}))
    assert found is not None
    assert found.name == "web.mf"
    with pytest.raises(ImageError, match=r"a package has one manifest, this one has 'a.mf', 'b.mf'"):
        manifest(pack(tmp_path, {"a.mf": line, "b.mf": line}))
    found = manifest(pack(tmp_path, {"other.mf": line}))
    assert found is not None
    assert found.name == "other.mf"


def test_a_manifest_in_capitals_counts_and_two_are_refused(tmp_path: Path) -> None:
    wrong = f"SHA256(web.ovf)= {SHA['sha256']}\nSHA256(disk1.vmdk)= {'0' * 64}\n".encode()
    path = write(tmp_path, {"web.MF": wrong})
    found = manifest(path)
    assert found
    assert found.name == "web.MF"
    (tmp_path / "web.mf").write_bytes(wrong)
    with pytest.raises(AccessError, match=r"^web.ovf: both web.mf and web.MF may be its manifest"):
        manifest(path)


@MADE
def test_missing_files_and_disks_without_digest_are_found(make: object, tmp_path: Path) -> None:
    line = f"SHA1(gone.iso)= {'0' * 40}".encode()
    gone, without, note = findings(make(tmp_path, {"web.mf": line}))  # type: ignore[operator]
    assert (gone.level, gone.path) == ("error", "gone.iso")
    assert (without.level, without.path) == ("warning", "disks[0]")
    assert note.text.startswith("0 files")


def test_a_manifest_names_no_file_outside_the_package(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "package").mkdir()
    for name in ("../secret", str(tmp_path / "secret")):
        line = f"SHA1({name})= {hashlib.sha1(b'secret').hexdigest()}".encode()
        for make in (write, pack):
            found = findings(make(tmp_path / "package", {"web.mf": line}))[0]
            assert (found.level, found.path) == ("error", name)
    (tmp_path / "package/web.mf").unlink()
    (tmp_path / "package/web.mf").symlink_to(tmp_path / "secret")
    with pytest.raises(AccessError, match="lies outside the image's directory"):
        manifest(tmp_path / "package/web.ovf")


@MADE
def test_the_certificate_is_named(make: object, tmp_path: Path) -> None:
    line = f"SHA512(web.ovf)= {SHA['sha512']}".encode()
    found = manifest(make(tmp_path, {"web.mf": line, "web.cert": b"-"}))  # type: ignore[operator]
    assert found == Manifest("web.mf", (), "web.cert")
