"""The schemes that core knows; what a scheme needs is imported when a URL of it is opened."""

from __future__ import annotations

from vmconv.interface.scheme import Remote, Scheme, Url


class Http(Scheme):
    """Ranges of HTTP (RFC 9110, section 14), with or without TLS."""

    def __init__(self, name: str, title: str) -> None:
        self.name, self.title = name, title

    def open(self, url: Url) -> Remote:
        from vmconv.io.schemes.http import HttpObject

        return HttpObject(url)


class Nbd(Scheme):
    """Network block devices, by TCP, with or without TLS, or by a Unix socket."""

    def __init__(self, name: str, title: str) -> None:
        self.name, self.title = name, title

    def open(self, url: Url) -> Remote:
        from vmconv.io.schemes.nbd import NbdExport

        return NbdExport(url)


class Ssh(Scheme):
    """A file of another machine, by SFTP through the system's ssh program."""

    def __init__(self, name: str) -> None:
        self.name, self.title = name, "file of another machine, by the ssh program"

    def open(self, url: Url) -> Remote:
        from vmconv.io.schemes.sftp import SftpFile

        return SftpFile(url)


class S3(Scheme):
    """Objects of S3; needs the extra `s3` of the distribution."""

    name = "s3"
    title = "object of S3"

    def open(self, url: Url) -> Remote:
        from vmconv.io.schemes.s3 import opened

        return opened(url)


SCHEMES = (
    Http("http", "web server with ranges"),
    Http("https", "web server with ranges, by TLS"),
    Nbd("nbd", "network block device"),
    Nbd("nbds", "network block device, by TLS"),
    Nbd("nbd+unix", "network block device on a Unix socket"),
    Ssh("ssh"),
    Ssh("sftp"),
    S3(),
)
