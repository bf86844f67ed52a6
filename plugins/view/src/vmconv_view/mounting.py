"""`vmconv mount`."""

from __future__ import annotations

import argparse
import os

from vmconv.plugin import Command, access, add_access, add_format, add_parent, add_secret, is_url
from vmconv_view.overlay_options import add_writable, refuse_contradictions


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="directory of images, or one image (FILE or URL)")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="directory outside of DIR to show them in")
    parser.add_argument("--fork", action="store_true", help="go to the background once it is mounted")
    parser.add_argument(
        "--allow-other",
        action="store_true",
        help="let other users, such as that of a hypervisor, read the images that they could open themselves",
    )
    parser.add_argument(
        "--formats",
        metavar="NAME,...",
        default="",
        help="show only these, such as qcow2,vmdk-monolithicFlat; the name of a format stands for all its subformats",
    )
    add_format(parser, whose="the one image")
    add_writable(parser)
    add_access(parser)
    add_secret(parser)
    add_parent(parser)


def _run(options: argparse.Namespace) -> int:
    import signal

    from vmconv.api import installed
    from vmconv.plugin import UsageError
    from vmconv_view import background
    from vmconv_view.fuse import mount
    from vmconv_view.tree import Tree
    from vmconv_view.variants import refuse_unknown

    directory, only = _shown(options.directory)
    _refuse(directory, options.mountpoint, options.allow_external)
    refuse_contradictions(options, [options.directory])
    if only is None and not is_url(directory):
        for flag, given in (("--parent", options.parents), ("-f", options.format_f)):
            if given:
                raise UsageError(f"{flag} is for one image", hint="name the image instead of its directory")
    if options.allow_other and is_url(directory):
        raise UsageError("--allow-other: what other users may read at a URL is not known")
    if options.writable:
        return _run_writable(options)
    formats = [name.strip() for name in options.formats.split(",") if name.strip()]
    registry = installed()
    refuse_unknown(registry, formats)
    _allow_many_files()
    tree = Tree(registry, directory, only=only, format_name=options.format_f, formats=formats, **access(options))
    try:
        if is_url(directory):
            # A server may ask for a password, which it can do only while there is a terminal.
            tree.read_now()
        ready = background.fork() if options.fork else lambda: None
        # libfuse handles signals only if they have their default action; then it unmounts before it exits.
        with background.ended_by_signals(signal.SIG_DFL):
            mount(tree, options.mountpoint, ready, allow_other=options.allow_other)
    finally:
        tree.close()
    return 0


def _run_writable(options: argparse.Namespace) -> int:
    import signal

    from vmconv.api import installed, new_name
    from vmconv.plugin import RAW_NAME, UsageError
    from vmconv_view import background
    from vmconv_view.disk_mount import DiskFilesystem, DiskTree
    from vmconv_view.fuse import mount
    from vmconv_view.overlay import Overlay

    if options.formats:
        raise UsageError("--writable shows the guest's disk, and no format")
    if not os.path.isfile(options.directory):
        raise UsageError(f"{options.directory}: is no file", hint="--writable shows one image")
    registry = installed()
    overlay = Overlay(options.directory, options, registry)
    try:
        overlay.announce()
        name = new_name(os.path.basename(options.directory), registry.format(RAW_NAME), registry)
        tree = DiskTree(name, overlay.view, os.stat(overlay.path))
        ready = background.fork() if options.fork else lambda: None
        with background.ended_by_signals(signal.SIG_DFL):
            mount(
                tree,
                options.mountpoint,
                ready,
                allow_other=options.allow_other,
                operations=DiskFilesystem,
                read_only=False,
            )
    finally:
        overlay.close()
    return 0


def _shown(path: str) -> tuple[str, str | None]:
    """Returns the directory to show, and the name of the only image in it if the user named an image."""
    if is_url(path) or not os.path.isfile(path):
        return path, None
    return os.path.dirname(path) or ".", os.path.basename(path)


def _refuse(directory: str, point: str, external: list[str]) -> None:
    """Raises `UsageError` for missing directories, and for mounts in which reading an image would read the mount."""
    from vmconv.api import inside
    from vmconv.plugin import UsageError

    local = [tree for tree in (directory, *external) if not is_url(tree)]
    for path in (directory, point):
        if not ((is_url(path) and path is directory) or os.path.isdir(path)):
            raise UsageError(f"{path}: is not a directory")
    real = os.path.realpath(point)
    for tree in local:
        above = os.path.realpath(tree)
        if inside(real, above) or inside(above, real):
            raise UsageError(f"{point}: would hide {tree}, or lie in it", hint="mount outside of the shown directories")


def _allow_many_files() -> None:
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


COMMAND = Command(
    "mount",
    "show the images of a directory in every format, as files",
    "Shows each image of DIR in every installed format as ordinary read-only files: MOUNTPOINT/IMAGE/FORMAT/FILE.\n"
    "If DIR is an image or a URL, it is the only one. Nothing is converted: reads are served from the image. Runs\n"
    "until it is unmounted. With --writable the guest's disk is the only file, and writes go to a layer on the image.",
    _configure,
    _run,
    "end it with fusermount3 -u MOUNTPOINT, umount, ^C or SIGTERM\n\n"
    "examples:\n"
    "  vmconv mount /srv/images /mnt\n"
    "  vmconv mount --writable disk.vhdx /mnt\n"
    "  vmconv mount https://cloud.example/images/server.qcow2 /mnt\n"
    "  cp --sparse=always /mnt/disk.vmdk/vhdx/disk.vhdx /backup/",
)
