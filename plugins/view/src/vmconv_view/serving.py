"""`vmconv serve`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from vmconv.plugin import (
    Command,
    Parser,
    UsageError,
    access,
    add_access,
    add_format,
    add_options,
    add_parent,
    add_secret,
    counted,
    printable,
)
from vmconv_view.overlay_options import add_writable, refuse_contradictions

if TYPE_CHECKING:
    import socket

    from vmconv.api import View
    from vmconv.plugin import Opener
    from vmconv_view.tls import Tls


def _configure(parser: argparse.ArgumentParser) -> None:
    if isinstance(parser, Parser):
        parser.intermixed = True
    parser.add_argument("files", nargs="+", metavar="FILE", help="images to export; not changed, unless --commit")
    add_format(parser, whose="each FILE")
    parser.add_argument(
        "-x",
        "--export-name",
        action="append",
        metavar="NAME",
        help="name of a FILE's export, in their order; may be repeated (default: the file's name in that format).\n"
        "The first FILE is also the default export",
    )
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
        help="address to listen on (default: 127.0.0.1; see --tls for others)",
    )
    _add_tls(parser)
    parser.add_argument("-t", "--persistent", action="store_true", help="keep running after the last client")
    parser.add_argument("--fork", action="store_true", help="go to the background once clients can connect")
    add_writable(parser)
    add_access(parser)
    add_secret(parser)
    add_parent(parser)


def _add_tls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tls",
        choices=("off", "on", "require"),
        help="encryption: off, on (for clients that start it) or require (default: require with a source of keys)",
    )
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument(
        "--tls-certificates",
        metavar="DIR",
        help="directory of server-cert.pem and server-key.pem; ca-cert.pem and ca-crl.pem verify clients",
    )
    keys.add_argument(
        "--tls-psk", metavar="FILE", help="file of lines NAME:HEXKEY, the keys of clients (Python 3.13 or later)"
    )
    parser.add_argument(
        "--tls-verify-peer", action="store_true", help="serve only clients with a certificate of the CA"
    )
    parser.add_argument(
        "--tls-allow",
        action="append",
        metavar="NAME",
        help="of these, serve only those whose certificate has this common or DNS name; may be repeated",
    )


def _run(options: argparse.Namespace) -> int:
    from vmconv.api import installed, settle
    from vmconv.plugin import Opener
    from vmconv_view.background import ended_by_signals

    refuse_contradictions(options, options.files)
    if options.writable:
        return _run_writable(options)
    with (
        Opener(installed(), **access(options), settle=settle, remote=True) as opener,
        # Signals end the command normally.
        suppress(KeyboardInterrupt),
        ended_by_signals(_end),
    ):
        exports = _exports(options, opener)
        opener.given.refuse_unused()
        _serve(options, exports, _tls(options))
    return 0


def _run_writable(options: argparse.Namespace) -> int:
    from vmconv.api import installed, new_name
    from vmconv.plugin import RAW_NAME
    from vmconv_view.background import ended_by_signals
    from vmconv_view.overlay import Overlay, closing_all

    registry = installed()
    if options.snapshot or options.options or registry.writer(options.target_format or RAW_NAME).name != RAW_NAME:
        raise UsageError("--writable exports the guest's disk, as raw, in its present state")
    tls = _tls(options)
    overlays: list[Overlay] = []

    def made(path: str) -> dict[bytes, View]:
        overlays.append(Overlay(path, options, registry))
        name = new_name(os.path.basename(path), registry.format(RAW_NAME), registry)
        return {os.fsencode(name): overlays[-1].view}

    try:
        with suppress(KeyboardInterrupt), ended_by_signals(_end):
            exports = _named(options, made)
            for each in overlays:
                each.announce()
            _serve(options, exports, tls)
    finally:
        closing_all(overlays)
    return 0


def _end(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _exports(options: argparse.Namespace, opener: Opener) -> dict[bytes, View]:
    """Returns the files to export by name, the default also by ""; plans them now, so that errors come first."""
    return _named(options, lambda path: _views(options, opener, path))


def _named(options: argparse.Namespace, views: Callable[[str], dict[bytes, View]]) -> dict[bytes, View]:
    """Returns the views of all FILEs under the names that the user gave them."""
    names: list[str] = options.export_name or []
    if len(names) > len(options.files):
        raise UsageError(f"--export-name: {len(names)} names for {counted(len(options.files), 'FILE')}")
    exports: dict[bytes, View] = {}
    for number, path in enumerate(options.files):
        found = views(path)
        if number < len(names):
            found[_checked(names[number])] = found.popitem()[1]
        for name in found.keys() & exports.keys():
            raise UsageError(f"{path}: an export {os.fsdecode(name)} exists", hint="name it with --export-name (-x)")
        exports |= found
        exports.setdefault(b"", exports[next(reversed(exports))])
    return exports


def _checked(name: str) -> bytes:
    from vmconv_view.nbd import MAX_NAME

    data = os.fsencode(name)
    if not 0 < len(data) <= MAX_NAME:
        raise UsageError(f"--export-name: {len(data)} bytes, 1 to {MAX_NAME} are possible")
    return data


def _views(options: argparse.Namespace, opener: Opener, path: str) -> dict[bytes, View]:
    """Returns the files that an image would be, the main one last."""
    from vmconv.api import checking, new_name, views
    from vmconv.plugin import RAM_NAME, RAW_NAME

    image = opener.image(path, options.format_f, snapshot=options.snapshot)
    for warning in (*image.warnings, *checking.warnings(image, opener)):
        print(printable(f"warning: {warning}"), file=sys.stderr)
    target = opener.registry.writer(options.target_format or (RAW_NAME if image.kind == "disk" else RAM_NAME))
    given = image.file.name if image.file.is_remote else os.path.basename(path.rstrip("/"))
    name = new_name(given, target, opener.registry)
    return {os.fsencode(key): view for key, view in views(image, target, options.options, name).items()}


def _tls(options: argparse.Namespace) -> Tls | None:
    """Returns the settings of encryption, or None without; raises `UsageError` for those that would not protect."""
    source = options.tls_certificates or options.tls_psk
    mode = options.tls or ("require" if source else "off")
    if options.tls_psk and (options.tls_verify_peer or options.tls_allow):
        raise UsageError("--tls-verify-peer and --tls-allow are for certificates, not for --tls-psk")
    if options.tls_allow and not options.tls_verify_peer:
        raise UsageError("--tls-allow needs --tls-verify-peer: names that nobody has verified are worth nothing")
    if options.tls_verify_peer and (mode != "require" or not source):
        raise UsageError("--tls-verify-peer needs --tls-certificates, and --tls require: others would not be verified")
    if mode == "off":
        return None
    if not source:
        raise UsageError(f"--tls {mode} needs --tls-certificates or --tls-psk")
    from vmconv_view import tls

    required = mode == "require"
    if options.tls_psk:
        return tls.with_shared_keys(options.tls_psk, required=required)
    return tls.with_certificates(
        options.tls_certificates,
        required=required,
        verify_peer=options.tls_verify_peer,
        allowed=options.tls_allow or (),
    )


def _serve(options: argparse.Namespace, exports: dict[bytes, View], tls: Tls | None) -> None:
    from vmconv_view.background import fork
    from vmconv_view.server import Server

    listener, place = _listener(options, "nbds" if tls and tls.required else "nbd")
    made = _identity(options.socket)
    try:
        ready = fork() if options.fork else lambda: None
        for name, view in exports.items():
            if not name:
                continue
            print(printable(f"{os.fsdecode(name)}: {view.size} bytes at {_uri(place, name, exports)}"), flush=True)
        ready()
        Server(listener, exports, persistent=options.persistent, tls=tls).run()
    finally:
        listener.close()
        if made and _identity(options.socket) == made:
            os.unlink(options.socket)


def _listener(options: argparse.Namespace, scheme: str) -> tuple[socket.socket, str]:
    """Returns the listening socket and the URI of its default export."""
    from vmconv_view import nbd, server

    if options.socket:
        return server.listen_on_socket(options.socket), f"{scheme}+unix:///?socket={os.path.abspath(options.socket)}"
    port = nbd.DEFAULT_PORT if options.port is None else options.port
    listener = server.listen_on_port(options.bind, port)
    address, port = listener.getsockname()[:2]
    return listener, f"{scheme}://{f'[{address}]' if ':' in address else address}:{port}/"


def _identity(path: str | None) -> tuple[int, int] | None:
    """Returns device and inode, to tell our socket from a later one at the same path."""
    if path is None:
        return None
    with suppress(OSError):
        status = os.lstat(path)
        return status.st_dev, status.st_ino
    return None


def _uri(place: str, name: bytes, exports: dict[bytes, View]) -> str:
    """Returns the URI of an export; that of the default has no name."""
    from urllib.parse import quote

    if exports[name] is exports[b""]:
        return place
    before, mark, after = place.partition("?")
    return before + quote(name) + mark + after


COMMAND = Command(
    "serve",
    "export images in another format over the network (NBD)",
    "Exports each FILE in another format, or the guest's disk, over NBD. Nothing is converted: reads are served from\n"
    "FILE. It is read-only, unless --writable, which keeps writes in a layer on FILE. Ends after the last client has\n"
    "disconnected, unless --persistent.",
    _configure,
    _run,
    "end it with ^C or SIGTERM\n\n"
    "examples:\n"
    "  vmconv serve disk.vmdk --as vhdx --socket /run/disk.sock\n"
    "  vmconv serve disk.vhdx --persistent &\n"
    "  vmconv serve --writable disk.vhdx --socket /run/disk.sock\n"
    "  vmconv serve web.vhdx db.vmdk -x web -x db -t -b :: --tls-certificates /etc/pki/nbd --tls-verify-peer\n"
    "  qemu-img convert -O qcow2 nbd://127.0.0.1:10809 disk.qcow2",
)
