"""Sources at http:// and https://: the same disks as local files, few requests, and servers that lie."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import vmconv
from support import qcow2_images
from support.disks import MIB, QemuImg
from support.kits import kit
from support.tls import certified
from support.web import Handler, Server, Spoil, serving, sparse_disk
from vmconv.cli.main import main
from vmconv.errors import AccessError, ImageError, ReadError, UsageError, VmconvError
from vmconv.io import remote
from vmconv.io.registry import installed
from vmconv.io.schemes import connections, http

GIB = 1 << 30


def disk(web: Server, qemu_img: QemuImg, name: str = "disk.qcow2", size: int = 8 * MIB) -> Path:
    """Makes a qcow2 image with some payload in the server's directory; its raw disk lies beside that directory."""
    raw = sparse_disk(web.directory.parent / "disk.raw", size, [(0, 3 * MIB), (size - MIB, MIB)])
    qemu_img("convert", "-O", "qcow2", raw, web.directory / name)
    return raw


@pytest.mark.parametrize("name", sorted(installed().formats))
def test_each_format_is_read_as_from_a_file(web: Server, name: str) -> None:
    local = web.directory / f"disk{installed().formats[name].suffixes[0]}"
    local.write_bytes(kit(name).sample({}))
    url = web.url(local.name)
    secrets = []
    for number, passphrase in enumerate(kit(name).passphrases):
        secrets.append(web.directory.parent / f"secret-{number}")
        secrets[-1].write_bytes(passphrase)
    assert vmconv.compare(url, local, strict=True, secrets=secrets)
    there, here = vmconv.info(url), vmconv.info(local)
    assert {**there, "filename": "", "actual-size": 0} == {**here, "filename": "", "actual-size": 0}
    assert [(row.start, row.length, row.data) for row in vmconv.map_disk(url, secrets=secrets) if row.data] == [
        (row.start, row.length, row.data) for row in vmconv.map_disk(local, secrets=secrets) if row.data
    ]


@pytest.mark.parametrize("target", ["qcow2", "vhdx"])
def test_a_conversion_has_the_bytes_that_qemu_reads(web: Server, qemu_img: QemuImg, target: str) -> None:
    raw = disk(web, qemu_img)
    made = web.directory.parent / f"made.{target}"
    result = vmconv.convert(web.url("disk.qcow2"), made)
    qemu_img("compare", raw, made)
    assert result.totals.copied == 4 * MIB
    assert [copy.reason for copy in result.copies] == ["disk.qcow2 comes over the network"]


def test_the_chain_at_a_url_is_shown(web: Server, qemu_img: QemuImg, capsys: pytest.CaptureFixture[str]) -> None:
    disk(web, qemu_img)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", web.directory / "top.qcow2")
    assert main(["info", "--allow-external", web.url(""), web.url("top.qcow2")]) == 0
    assert f"{web.url('disk.qcow2')} (qcow2, 8 MiB" in capsys.readouterr().out


def test_a_new_file_has_the_rights_of_any_new_file(web: Server, qemu_img: QemuImg) -> None:
    disk(web, qemu_img)
    made, other = web.directory.parent / "made.raw", web.directory.parent / "other"
    vmconv.convert(web.url("disk.qcow2"), made)
    other.touch()
    assert made.stat().st_mode == other.stat().st_mode


def test_info_of_a_large_image_takes_few_requests(web: Server, qemu_img: QemuImg) -> None:
    qemu_img("create", "-f", "qcow2", "-o", "preallocation=metadata", web.directory / "disk.qcow2", "1G")
    vmconv.info(web.url("disk.qcow2"))
    assert len(web.asked) <= 5
    assert web.bytes_sent <= 5 * remote.BLOCK


# VHDX and VMDK have 64 MiB of tables for a terabyte, all zero here.
@pytest.mark.parametrize(("target", "most"), [("qcow2", 8 * MIB), ("vdi", 16 * MIB), ("vhdx", 80 * MIB)])
def test_of_a_sparse_terabyte_only_metadata_and_payload_are_sent(web: Server, target: str, most: int) -> None:
    raw = sparse_disk(web.directory.parent / "disk.raw", 1 << 40, [(5 << 30, MIB), ((1 << 40) - MIB, MIB)])
    image = web.directory / f"disk.{target}"
    vmconv.convert(raw, image)
    made = web.directory.parent / "made.qcow2"
    vmconv.convert(web.url(image.name), made)
    assert vmconv.compare(raw, made)
    assert web.bytes_sent <= most
    assert len(web.asked) <= 40


def test_long_payload_is_asked_for_in_large_ranges(web: Server) -> None:
    sparse_disk(web.directory / "disk.raw", 64 * MIB, [(0, 64 * MIB)])
    vmconv.convert(web.url("disk.raw"), web.directory.parent / "made.qcow2")
    assert len(web.asked) <= 64 // 4 + 4
    assert vmconv.compare(web.directory / "disk.raw", web.directory.parent / "made.qcow2")


def test_compressed_images_and_downloads_are_decoded(web: Server, qemu_img: QemuImg) -> None:
    raw = sparse_disk(web.directory.parent / "disk.raw", 8 * MIB, [(0, MIB)])
    qemu_img("convert", "-c", "-O", "qcow2", raw, web.directory / "packed.qcow2")
    subprocess.run(["gzip", "-k", web.directory / "packed.qcow2"], check=True)
    for number, (name, decompress) in enumerate([("packed.qcow2", False), ("packed.qcow2.gz", True)]):
        made = web.directory.parent / f"made{number}.raw"
        vmconv.convert(web.url(name), made, decompress=decompress)
        assert made.read_bytes() == raw.read_bytes()


# -- servers that lie


def short(handler: Handler, first: int, last: int) -> bool:
    handler.part(handler.server.directory / "disk.qcow2", first, last - 1)
    return True


def other_place(handler: Handler, first: int, last: int) -> bool:
    handler.part(handler.server.directory / "disk.qcow2", first, last, Content_Range=f"bytes 1-{last + 1}/99999999")
    return True


def whole(handler: Handler, first: int, last: int) -> bool:
    handler.answer(200, {}, (handler.server.directory / "disk.qcow2").read_bytes())
    return True


def status(number: int) -> Spoil:
    def answer(handler: Handler, first: int, last: int) -> bool:
        handler.answer(number, {}, b"")
        return True

    return answer


def with_headers(**headers: str) -> Spoil:
    def answer(handler: Handler, first: int, last: int) -> bool:
        handler.part(handler.server.directory / "disk.qcow2", first, last, **headers)
        return True

    return answer


def many_headers(handler: Handler, first: int, last: int) -> bool:
    handler.answer(206, {f"X-{number}": "x" * 1000 for number in range(500)}, b"")
    return True


def garbage(handler: Handler, first: int, last: int) -> bool:
    handler.wfile.write(b"\0" * 200 + b"\r\n\r\n")
    handler.close_connection = True
    return True


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (short, ReadError, "asked for"),
        (other_place, ReadError, "the server sends 'bytes 1-"),
        (whole, AccessError, "its server sends no ranges"),
        (status(403), AccessError, "the server answers 403"),
        (status(503), ReadError, "the server answers 503"),
        (status(302), AccessError, "redirects"),
        (with_headers(Content_Length="1"), ReadError, "Content-Length 1 for"),
        (with_headers(Content_Encoding="gzip"), ReadError, "Content-Encoding 'gzip'"),
        (with_headers(Content_Range="bytes 0-9/*"), ReadError, "asked for"),
        (with_headers(Content_Range=f"bytes 0-262143/{1 << 63}"), ReadError, "asked for"),
        (many_headers, ReadError, "headers"),
        (garbage, ReadError, "cannot be read at 0x0"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_wrong_answer_is_an_error_in_one_line(
    web: Server, qemu_img: QemuImg, spoil: Spoil, error: type[VmconvError], said: str
) -> None:
    disk(web, qemu_img)
    web.spoil = spoil
    made = web.directory.parent / "made.raw"
    with pytest.raises(error, match=said) as caught:
        vmconv.convert(web.url("disk.qcow2") + "?signature=secret", made)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not made.exists()


def once(spoil: Callable[[Handler, int, int], None]) -> Spoil:
    """Spoils each range on its first request."""
    seen: set[int] = set()

    def answer(handler: Handler, first: int, last: int) -> bool:
        if first in seen:
            return False
        seen.add(first)
        spoil(handler, first, last)
        return True

    return answer


def half(handler: Handler, first: int, last: int) -> None:
    """Ends the connection in the middle of the body."""
    path = handler.server.directory / "disk.qcow2"
    size = path.stat().st_size
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {first}-{last}/{size}")
    handler.send_header("Content-Length", str(last - first + 1))
    status = path.stat()
    handler.send_header("ETag", f'"{status.st_mtime_ns:x}-{status.st_size:x}"')
    handler.end_headers()
    handler.wfile.write(path.read_bytes()[first : (first + last) // 2])
    handler.close_connection = True
    handler.connection.close()


def drops(handler: Handler, first: int, last: int) -> bool:
    """Ends the connection after a few bytes, each time."""
    path = handler.server.directory / "disk.qcow2"
    headers = {"Content-Range": f"bytes {first}-{last}/{path.stat().st_size}", "Content-Length": str(last - first + 1)}
    handler.answer(206, headers, path.read_bytes()[first : min(last, first + 99) + 1])
    handler.close_connection = True
    return True


def test_a_server_whose_answers_have_a_few_bytes_is_an_error(web: Server, qemu_img: QemuImg) -> None:
    disk(web, qemu_img)
    web.etags = False
    web.spoil = drops
    with pytest.raises(ReadError, match="answers end after a few bytes"):
        vmconv.info(web.url("disk.qcow2"))
    assert len(web.asked) < 100


@pytest.mark.parametrize("host", ["a..b", "a" * 64, "\u00fc" * 60, ".example", "\u3002\u3002"])
@pytest.mark.parametrize("scheme", ["http", "nbd", "s3", "ssh"])
def test_a_name_that_no_host_has_is_an_error(scheme: str, host: str) -> None:
    with pytest.raises(UsageError, match=r"is not the name of a host|is not s3://"):
        vmconv.info(f"{scheme}://{host}/disk.raw")


def silent(handler: Handler, first: int, last: int) -> None:
    time.sleep(0.3)
    handler.close_connection = True


def busy(handler: Handler, first: int, last: int) -> None:
    handler.answer(503, {"Retry-After": "0"}, b"")


@pytest.mark.parametrize("spoil", [half, silent, busy])
def test_a_request_that_fails_is_repeated(
    web: Server, qemu_img: QemuImg, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Handler, int, int], None]
) -> None:
    monkeypatch.setattr(connections, "SILENCE", 0.1)
    raw = disk(web, qemu_img)
    web.spoil = once(spoil)
    made = web.directory.parent / "made.raw"
    vmconv.convert(web.url("disk.qcow2"), made)
    assert made.read_bytes() == raw.read_bytes()


def test_a_server_that_drips_is_too_slow(web: Server, qemu_img: QemuImg, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SILENCE", 0.2)
    monkeypatch.setattr(connections, "SLOWEST", 1 << 30)
    monkeypatch.setattr(http, "TRIES", 2)
    disk(web, qemu_img)

    def drip(handler: Handler, first: int, last: int) -> bool:
        handler.close_connection = True
        handler.wfile.write(b"HTTP/1.1 206 Partial Content\r\nX-Long: ")
        for _ in range(20):
            handler.wfile.write(b"x")
            time.sleep(0.05)
        return True

    web.spoil = drip
    with pytest.raises(ReadError, match="silent, or too slow"):
        vmconv.info(web.url("disk.qcow2"))


@pytest.mark.parametrize("etags", [True, False], ids=["etag", "size"])
def test_a_source_that_changes_is_an_error(web: Server, qemu_img: QemuImg, etags: bool) -> None:
    disk(web, qemu_img)
    web.etags = etags
    path = web.directory / "disk.qcow2"

    def change(handler: Handler, first: int, last: int) -> bool:
        if first:
            with path.open("ab") as file:
                file.write(bytes(512))
        return False

    web.spoil = change
    made = web.directory.parent / "made.raw"
    with pytest.raises(AccessError, match="changed while it was being read: " + ("ETag" if etags else "size")):
        vmconv.convert(web.url("disk.qcow2"), made)
    assert not made.exists()


def test_conditions_make_the_server_refuse_another_version(web: Server, qemu_img: QemuImg) -> None:
    disk(web, qemu_img)
    vmconv.convert(web.url("disk.qcow2"), web.directory.parent / "made.raw")
    assert "If-Match" not in web.headers[0]
    status = (web.directory / "disk.qcow2").stat()
    assert {sent["If-Match"] for sent in web.headers[1:]} == {f'"{status.st_mtime_ns:x}-{status.st_size:x}"'}

    def refuse(handler: Handler, first: int, last: int) -> bool:
        if "If-Match" in handler.headers:
            handler.answer(412, {}, b"")
        return "If-Match" in handler.headers

    web.spoil = refuse
    with pytest.raises(AccessError, match="changed while it was being read: the server answers 412"):
        vmconv.convert(web.url("disk.qcow2"), web.directory.parent / "other.raw")


# -- redirects and credentials


def to(url: str) -> Spoil:
    def answer(handler: Handler, first: int, last: int) -> bool:
        handler.answer(302, {"Location": url}, b"")
        return True

    return answer


def test_a_redirect_is_followed_without_credentials(web: Server, qemu_img: QemuImg, tmp_path: Path) -> None:
    raw = disk(web, qemu_img)
    with serving(tmp_path) as front:
        (tmp_path / "disk.qcow2").touch()
        front.spoil = to(web.url("disk.qcow2"))
        made = tmp_path / "made.raw"
        url = front.url("disk.qcow2").replace("//", "//joe:p%40ss@")
        vmconv.convert(url, made)
        assert made.read_bytes() == raw.read_bytes()
        assert {sent.get("Authorization") for sent in front.headers} == {"Basic am9lOnBAc3M="}
        assert {sent.get("Authorization") for sent in web.headers} == {None}
        # Later requests go where the first one was led.
        assert len(front.headers) == 1


@pytest.mark.parametrize("where", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://", "http://[x/", "disk.qcow2"])
def test_a_redirect_elsewhere_is_refused(web: Server, qemu_img: QemuImg, where: str) -> None:
    disk(web, qemu_img)
    web.spoil = to(where)
    with pytest.raises(AccessError, match="redirect"):
        vmconv.info(web.url("disk.qcow2"))
    assert len(web.asked) <= http.MAX_REDIRECTS + 1


def test_tls_is_verified_and_never_left(
    web: Server, qemu_img: QemuImg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = disk(web, qemu_img)
    made = tmp_path / "cert.pem"
    with serving(web.directory) as secure:
        secure.socket = certified(made).wrap_socket(secure.socket, server_side=True)
        url = secure.url("disk.qcow2", "https")
        with pytest.raises(AccessError, match="certificate is refused") as caught:
            vmconv.info(url)
        assert "SSL_CERT_FILE" in (caught.value.hint or "")
        monkeypatch.setenv("SSL_CERT_FILE", str(made))
        vmconv.convert(url, tmp_path / "made.raw")
        assert (tmp_path / "made.raw").read_bytes() == raw.read_bytes()
        secure.spoil = to(web.url("disk.qcow2"))
        with pytest.raises(AccessError, match="which is not encrypted"):
            vmconv.info(url)
    assert not web.asked


def test_a_proxy_of_the_environment_is_used(web: Server, qemu_img: QemuImg, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = disk(web, qemu_img)
    seen = []

    class Proxy(Handler):
        def parse_request(self) -> bool:
            found = super().parse_request()
            seen.append((self.path, self.headers["Host"]))
            self.path = self.path.removeprefix("http://nowhere.invalid")
            return found

    web.RequestHandlerClass = Proxy
    monkeypatch.setenv("http_proxy", web.url(""))
    vmconv.convert("http://nowhere.invalid/disk.qcow2", web.directory.parent / "made.raw")
    assert (web.directory.parent / "made.raw").read_bytes() == raw.read_bytes()
    assert set(seen) == {("http://nowhere.invalid/disk.qcow2", "nowhere.invalid")}


def test_a_proxy_that_drips_is_too_slow(web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SILENCE", 0.2)
    monkeypatch.setattr(http, "TRIES", 2)

    class Proxy(Handler):
        def do_CONNECT(self) -> None:  # noqa: N802
            self.close_connection = True
            self.wfile.write(b"HTTP/1.0 200 OK\r\n")
            for number in range(30):
                self.wfile.write(b"X: %d\r\n" % number)
                time.sleep(0.05)

    web.RequestHandlerClass = Proxy
    monkeypatch.setenv("https_proxy", web.url(""))
    with pytest.raises(ReadError, match="silent, or too slow"):
        vmconv.info("https://nowhere.invalid/disk.qcow2")


# -- what images name, and what is not read from a URL


def test_an_image_on_disk_never_names_a_url(web: Server, tmp_path: Path) -> None:
    image = tmp_path / "top.qcow2"
    image.write_bytes(qcow2_images.empty_overlay(web.url("disk.raw")))
    (web.directory / "disk.raw").write_bytes(bytes(MIB))
    for allowed in ([], [web.url("")]):
        with pytest.raises(AccessError, match="is not a plain file name"):
            vmconv.convert(image, tmp_path / "made.raw", allow_external=allowed)
    assert not web.headers


@pytest.mark.parametrize("backing", ["base.raw", "./base.raw"])
def test_an_image_at_a_url_names_one_beside_it_if_the_user_allows_it(web: Server, backing: str) -> None:
    (web.directory / "base.raw").write_bytes(b"x" * MIB)
    (web.directory / "top.qcow2").write_bytes(qcow2_images.empty_overlay(backing))
    url, made = web.url("top.qcow2"), web.directory.parent / "made.raw"
    with pytest.raises(AccessError, match="at a URL that you did not name") as caught:
        vmconv.convert(url, made)
    assert caught.value.hint == f"if you trust the image, --allow-external {web.url('')}"
    vmconv.convert(url, made, allow_external=[web.url("")])
    size = vmconv.info(url)["virtual-size"]
    assert made.read_bytes() == (b"x" * MIB)[:size].ljust(size, b"\0")


@pytest.mark.parametrize("backing", ["../base.raw", "/etc/passwd", "sub/base.raw", "http://other/base.raw", ".."])
def test_an_image_at_a_url_names_nothing_else(web: Server, backing: str) -> None:
    (web.directory / "top.qcow2").write_bytes(qcow2_images.empty_overlay(backing))
    with pytest.raises(AccessError, match="is not a name in the directory"):
        vmconv.convert(web.url("top.qcow2"), web.directory.parent / "made.raw", allow_external=[web.url(""), "/"])


def test_a_loop_of_images_at_urls_is_refused(web: Server) -> None:
    (web.directory / "a.qcow2").write_bytes(qcow2_images.empty_overlay("b.qcow2", "qcow2"))
    (web.directory / "b.qcow2").write_bytes(qcow2_images.empty_overlay("a.qcow2", "qcow2"))
    with pytest.raises(ImageError, match="loop"):
        vmconv.convert(web.url("a.qcow2"), web.directory.parent / "made.raw", allow_external=[web.url("")])


def test_what_needs_a_local_file_refuses_a_url(web: Server, qemu_img: QemuImg, tmp_path: Path) -> None:
    disk(web, qemu_img)
    url = web.url("disk.qcow2")
    with pytest.raises(UsageError, match="--in-place"):
        vmconv.convert(url, tmp_path / "made.raw", in_place=True)
    with pytest.raises(AccessError, match="only a local file"):
        vmconv.resize(url, 16 * MIB)
    with pytest.raises(AccessError, match="a sync reads local files"):
        vmconv.sync(url, tmp_path / "made.raw")
    with pytest.raises(VmconvError, match="images refer to local files only"):
        vmconv.convert(url, tmp_path / "made.qcow2", options={"subformat": "reference"})
    with pytest.raises(UsageError, match="no file that QEMU can open"):
        vmconv.convert(url, tmp_path / "made.raw", verify="qemu")


def test_a_confined_opener_reads_no_url(web: Server, tmp_path: Path) -> None:
    from vmconv.io.opener import Opener

    with (
        Opener(installed(), allow_external=[str(tmp_path)], confined=True, remote=True) as opener,
        pytest.raises(AccessError, match="only a local file"),
    ):
        opener.image(web.url("disk.qcow2"))
    assert not web.headers


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("gopher://host/x", "gopher:// is not installed"),
        ("http:///x", "has no host"),
        ("http://host:99999/x", "port 99999"),
        ("http://u:secret@host:x/", "is not a URL"),
        ("http://host/a b", "is not a URL"),
        ("http://host/a#b", "is not a URL"),
        ("http://host/\r\nX: y", "is not a URL"),
        ("http://host/" + "x" * 9000, "is not a URL"),
    ],
    ids=lambda value: value[:24],
)
def test_a_url_without_meaning_is_refused(url: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        vmconv.info(url)
    assert "secret" not in str(caught.value)


def test_a_file_whose_name_is_like_a_url_is_named_by_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "http:" / "host").mkdir(parents=True)
    sparse_disk(tmp_path / "http:" / "host" / "disk.raw", MIB, [(0, 512)])
    monkeypatch.chdir(tmp_path)
    assert vmconv.info("./http://host/disk.raw")["virtual-size"] == MIB
