"""`vmconv serve`."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from vmconv.plugin import Command, access, add_access, add_format, add_options, printable

if TYPE_CHECKING:
    import socket

    from vmconv.api import View
    from vmconv.plugin import Opener


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="image to export; never changed")
    add_format(parser)
    parser.add_argument(
        "--as",
        dest="target_format",
        metavar="FMT",
        help="what to export: the file that FILE would be in this format (default: raw, the guest's disk, or ram)",
    )
    add_options(parser, "that format")
    parser.add_argument("-l", "--snapshot", metavar="NAME", help="export this internal snapshot (id or name)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("-k", "--socket", metavar="PATH", help="listen on a new Unix socket, removed at exit")
    where.add_argument("-p", "--port", type=int, metavar="PORT", help="listen on this TCP port (default: 10809)")
    parser.add_argument(
        "-b",
        "--bind",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1; no encryption, no authentication)",
    )
    parser.add_argument("-t", "--persistent", action="store_true", help="keep running after the last client")
    parser.add_argument("--fork", action="store_true", help="go to the background once clients can connect")
    add_access(parser)


def _run(options: argparse.Namespace) -> int:
    from vmconv.api import installed, settle
    from vmconv.plugin import Opener
    from vmconv_view.background import ended_by_signals

    with (
        Opener(installed(), **access(options), settle=settle) as opener,
        # Signals end the command normally.
        suppress(KeyboardInterrupt),
        ended_by_signals(_end),
    ):
        _serve(options, _exports(options, opener))
    return 0


def _end(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _exports(options: argparse.Namespace, opener: Opener) -> dict[bytes, View]:
    """Returns the files to export by name; plans them now, so that errors come before the first client."""
    from vmconv.api import checking, new_name, views
    from vmconv.plugin import RAM_NAME, RAW_NAME

    image = opener.image(options.file, options.format_f, snapshot=options.snapshot)
    for warning in (*image.warnings, *checking.warnings(image, opener)):
        print(printable(f"warning: {warning}"), file=sys.stderr)
    target = opener.registry.writer(options.target_format or (RAW_NAME if image.kind == "disk" else RAM_NAME))
    name = new_name(os.path.basename(options.file.rstrip("/")), target, opener.registry)
    return {os.fsencode(key): view for key, view in views(image, target, options.options, name).items()}


def _serve(options: argparse.Namespace, exports: dict[bytes, View]) -> None:
    from vmconv_view.background import fork
    from vmconv_view.server import Server

    listener, place = _listener(options)
    made = _identity(options.socket)
    try:
        ready = fork() if options.fork else lambda: None
        for name, view in exports.items():
            print(printable(f"{os.fsdecode(name)}: {view.size} bytes at {_uri(place, name, exports)}"), flush=True)
        ready()
        Server(listener, exports, persistent=options.persistent).run()
    finally:
        listener.close()
        if made and _identity(options.socket) == made:
            os.unlink(options.socket)


def _listener(options: argparse.Namespace) -> tuple[socket.socket, str]:
    """Returns the listening socket and the URI of its default export."""
    from vmconv_view import nbd, server

    if options.socket:
        return server.listen_on_socket(options.socket), f"nbd+unix:///?socket={os.path.abspath(options.socket)}"
    port = nbd.DEFAULT_PORT if options.port is None else options.port
    listener = server.listen_on_port(options.bind, port)
    address, port = listener.getsockname()[:2]
    return listener, f"nbd://{f'[{address}]' if ':' in address else address}:{port}/"


def _identity(path: str | None) -> tuple[int, int] | None:
    """Returns device and inode, to tell our socket from a later one at the same path."""
    if path is None:
        return None
    with suppress(OSError):
        status = os.lstat(path)
        return status.st_dev, status.st_ino
    return None


def _uri(place: str, name: bytes, exports: dict[bytes, View]) -> str:
    """Returns the URI of an export; that of the default, the last one, has no name."""
    from urllib.parse import quote

    if name == next(reversed(exports)):
        return place
    before, mark, after = place.partition("?")
    return before + quote(name) + mark + after


COMMAND = Command(
    "serve",
    "export an image in another format over the network (NBD)",
    "Exports, read-only over NBD, FILE in another format, or the guest's disk. Nothing is converted: reads are\n"
    "served from FILE. Ends after the last client has disconnected, unless --persistent.",
    _configure,
    _run,
    "end it with ^C or SIGTERM\n\n"
    "examples:\n"
    "  vmconv serve disk.vmdk --as vhdx --socket /run/disk.sock\n"
    "  vmconv serve disk.vhdx --persistent &\n"
    "  qemu-img convert -O qcow2 nbd://127.0.0.1:10809 disk.qcow2",
)
