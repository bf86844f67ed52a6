"""Arguments of several commands, named as in qemu-img."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from vmconv.errors import did_you_mean

if TYPE_CHECKING:
    from vmconv.interface.arguments import Cache, ImagePair, Reading


class formatter(argparse.RawDescriptionHelpFormatter):  # noqa: N801
    """Help of at most 100 columns; keeps the line breaks of descriptions."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(columns(), 100))


class Parser(argparse.ArgumentParser):
    """A parser, and that of each command, whose errors suggest the word that was meant."""

    intermixed = False
    """True for a command with any number of names, which may have options between them."""
    _inside = False

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        # Until Python 3.12, parsing intermixed arguments calls this method.
        if self._inside:
            return super().parse_known_args(args, namespace)
        if self.intermixed:
            self._inside = True
            options, rest = self.parse_known_intermixed_args(args, namespace)
            self._inside = False
        else:
            options, rest = super().parse_known_args(args, namespace)
        if rest:
            meant = did_you_mean(rest[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(rest)}{f'; {meant.strip()}' if meant else ''}")
        return options, rest

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n  hint: {self.prog} --help lists the arguments\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            meant = did_you_mean(str(value), map(str, action.choices))
            choices = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}; {meant}choose from {choices}")


def columns() -> int:
    """Returns the columns of the terminal, without `shutil`, whose import takes longer than the rest of the parser."""
    try:
        return int(os.environ.get("COLUMNS", "0")) or os.get_terminal_size(1).columns or 100
    except (OSError, ValueError):
        return 100


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", choices=("human", "json"), default="human", help="how to print (default: human)")


def add_format(
    parser: argparse.ArgumentParser, flag: str = "-f", whose: str = "FILE", default: str = "by its suffix and content"
) -> None:
    parser.add_argument(
        flag,
        dest=f"format_{flag.strip('-')}",
        metavar="FMT",
        help=f"format of {whose} (default: {default})",
    )


def add_allow_external(parser: argparse.ArgumentParser, whose: str = "images") -> None:
    parser.add_argument(
        "--allow-external",
        action="append",
        default=[],
        metavar="PATH",
        help=f"let {whose} refer to files in this tree besides their own directory; may be repeated",
    )


def add_opening(parser: argparse.ArgumentParser, whose: str = "images") -> None:
    """Adds the arguments on files that `whose` name, and on images in use."""
    add_allow_external(parser, whose)
    parser.add_argument(
        "-U", "--force-share", action="store_true", help="read images that another process has open for writing"
    )


def add_backing_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backing-format",
        dest="source_backing_format",
        metavar="FMT",
        help="format of backing files where the image above them does not state it (default: by suffix and content)",
    )


def add_secret(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--secret",
        dest="secrets",
        action="append",
        default=[],
        metavar="FILE",
        help="passphrase of encrypted images: all bytes of this file, also a line break at its end, as for QEMU;\n"
        "- reads it from the terminal or a pipe. May be repeated: each is tried for each image",
    )


def add_target_secret(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target-secret",
        metavar="FILE",
        help="encrypt TARGET, a qcow2 image, by LUKS with this passphrase: all bytes of this file. All payload is\n"
        "written",
    )


def add_parent(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parent",
        dest="parents",
        action="append",
        default=[],
        metavar="FILE",
        help="parent of the first layer, from the image down, whose parent is not where it says; checked by its id\n"
        "where the format has one; may be repeated for layers below",
    )


def add_access(parser: argparse.ArgumentParser) -> None:
    add_opening(parser)
    add_backing_format(parser)


def access(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of an `Opener` from the options of `add_access`, `add_secret` and `add_parent`."""
    return {
        "allow_external": options.allow_external,
        "force_share": options.force_share,
        "backing_format": options.source_backing_format,
        # Commands that change an image where it lies have no such argument.
        "secrets": getattr(options, "secrets", ()),
        "parents": getattr(options, "parents", ()),
    }


def add_trust(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--trust",
        action="store_true",
        help=f"follow {what} of another user, another machine or an older vmconv, as after restoring a backup:\n"
        "it decides which files of the directory are overwritten, renamed and removed",
    )


def as_named(given: str, path: str) -> str:
    """Returns a path with the directory as the user spelled it."""
    return os.path.join(os.path.dirname(given), os.path.basename(path))


def add_options(parser: argparse.ArgumentParser, whose: str, metavar: str = "NAME=VALUE") -> None:
    parser.add_argument(
        "-o",
        dest="options",
        action=SetOptions,
        default={},
        metavar=metavar,
        help=f"options of {whose}, separated by commas; vmconv formats lists them",
    )


def add_compress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c",
        dest="compress",
        action="store_true",
        help="compress payload: qcow2 (see -o compression_type, compression_level), VMDK as streamOptimized; clusters\n"
        "that SOURCE has compressed in the same way are taken over as they are",
    )


def add_sparse(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-S",
        dest="sparse",
        type=read_size,
        metavar="SIZE",
        help="read all payload, and leave out runs of zeros of at least SIZE bytes, in blocks of 4 KiB (default:\n"
        "payload is not read, so zeros in it stay)",
    )


def add_bitmaps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bitmaps", action="store_true", help="carry over the persistent bitmaps of SOURCE itself, from qcow2 to qcow2"
    )
    parser.add_argument(
        "--skip-broken-bitmaps",
        action="store_true",
        help="leave out bitmaps that are in use, or were not saved, so that they may lack writes",
    )


def add_snapshot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-l",
        "--snapshot",
        metavar="NAME",
        help="convert this internal snapshot (id or name, also snapshot.id=ID or snapshot.name=NAME), not the present\n"
        "state",
    )


def add_part(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--offset", type=read_size, default=0, metavar="N", help="begin at this byte of the disk (default: 0)"
    )
    parser.add_argument(
        "--length", type=read_size, metavar="N", help="take this number of bytes of the disk (default: up to its end)"
    )


def add_from_snapshot(parser: argparse.ArgumentParser, whose: str = "SOURCE") -> None:
    parser.add_argument(
        "--from-snapshot",
        metavar="WHICH",
        help=f"read {whose} as it was in a read-only snapshot of its filesystem (Snapper, Timeshift, btrbk): newest,\n"
        "or a snapshot's name, number, or date",
    )


def add_decompress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decompress",
        action="store_true",
        help="read SOURCE compressed by gzip, xz, Zstandard, bzip2, or alone in a ZIP archive; it is decoded once,\n"
        "into a file without a name in TARGET's directory",
    )
    parser.add_argument(
        "--decompress-limit",
        type=read_size,
        metavar="SIZE",
        help="most that SOURCE may become, such as 100G (default: 64T)",
    )


def read_size(text: str) -> int:
    """Returns a number of bytes. Raises argparse's error for a value."""
    from vmconv.model.options import parse_size

    try:
        return parse_size(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def in_snapshot(options: argparse.Namespace, path: str) -> str:
    """Returns the path of a file in the snapshot that `--from-snapshot` names, and says which it is; else the path."""
    if options.from_snapshot is None:
        return path
    from vmconv.errors import UsageError, printable
    from vmconv.io.snapshots import in_snapshot as found_in

    if getattr(options, "in_place", False):
        raise UsageError("--in-place: a snapshot is never changed", hint="omit --from-snapshot or --in-place")
    found = found_in(path, options.from_snapshot)
    # JSON on standard output has the path as its source.
    if not getattr(options, "quiet", False):
        print(printable(f"{path}: from the snapshot {found}, {found.path}"), file=sys.stderr)
    return found.path


CACHES = ("none", "writethrough", "directsync", "writeback", "unsafe")
"""The cache modes of qemu-img."""


def durability(cache: str) -> Cache:
    """Returns the one of two cache modes that a mode of qemu-img means here."""
    return "unsafe" if cache == "unsafe" else "writeback"


def add_rate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-r",
        dest="rate",
        type=read_size,
        metavar="RATE",
        help="bytes per second that a conversion copies and writes at most, such as 50M",
    )


def add_ignored(parser: argparse.ArgumentParser) -> None:
    """Adds arguments of `qemu-img convert` that scripts give and that have no effect here."""
    ignored = "accepted for scripts of qemu-img, without effect"
    parser.add_argument("-T", choices=CACHES, help=f"cache mode of SOURCE: {ignored}")
    parser.add_argument("-m", type=int, metavar="N", help=f"number of coroutines: {ignored}")
    parser.add_argument("-W", action="store_true", help=f"writes out of order: {ignored}")


def add_storage(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments on sharing, copying and access rights."""
    parser.add_argument(
        "--zero-copy",
        choices=("auto", "require"),
        default="auto",
        help="require: fail before any change rather than copy payload (default: auto, copy what cannot be shared)",
    )
    parser.add_argument(
        "--backend", default="auto", metavar="NAME", help="auto, or one that vmconv backends lists (default: auto)"
    )
    parser.add_argument(
        "-t",
        dest="cache",
        choices=CACHES,
        default="writeback",
        help="unsafe: do not sync new files, like qemu-img convert by default; a power failure may leave damaged\n"
        "images. All others: sync them before they are named; copies go past the page cache if possible\n"
        "(default: writeback)",
    )
    parser.add_argument(
        "--mode",
        type=read_mode,
        metavar="OCTAL",
        help="permission bits of new files, such as 0640 (default: as for any new file, less what a file of SOURCE\n"
        "does not allow; a file replaced by --force keeps its owner, mode and attributes)",
    )


def read_mode(text: str) -> int:
    """Returns permission bits. Raises `ValueError`, which argparse turns into a message."""
    mode = int(text, 8)
    if not 0 <= mode <= 0o777:
        raise ValueError
    return mode


def add_keep_undo(parser: argparse.ArgumentParser, whose: str, when: str = "") -> None:
    parser.add_argument(
        "--keep-undo",
        action="store_true",
        help=f"{when}write an undo file, {whose}.vmconv-undo; see vmconv undo",
    )


def add_any_owner(parser: argparse.ArgumentParser, whose: str = "FILE", when: str = "") -> None:
    parser.add_argument(
        "--any-owner",
        action="store_true",
        help=f"{when}also change and remove files of {whose} with another owner than {whose}",
    )


def add_report(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments on what `vmconv.cli.report` prints besides `--output`."""
    parser.add_argument("-p", "--progress", action="store_true", help="show progress even when not on a terminal")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    add_verbose(parser)


def add_verbose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-v", "--verbose", action="store_true", help="also list small losses, such as the adapter type")


def add_making(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of commands that make images, unlike `plan`."""
    add_report(parser)
    parser.add_argument(
        "--verify",
        choices=("metadata", "sample", "bytes", "qemu"),
        default="metadata",
        help="how to compare the result with SOURCE before it is named. metadata: read no payload; sample: payload\n"
        "around each edge of a range, and random blocks; bytes: all payload; qemu: by qemu-img compare\n"
        "(default: metadata)",
    )
    parser.add_argument(
        "--no-verify",
        dest="verify",
        action="store_const",
        const=False,
        help="do not read back and check the result's metadata",
    )


def source_and_storage(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of a `Request` from `-f`, `-c`, `-S`, `-l`, `add_storage`, `--force` and `add_access`."""
    return {
        "source_format": options.format_f,
        "source_backing_format": options.source_backing_format,
        "compress": options.compress,
        "sparse": options.sparse,
        "bitmaps": options.bitmaps,
        "skip_broken_bitmaps": options.skip_broken_bitmaps,
        "snapshot": options.snapshot,
        "backend": options.backend,
        "zero_copy": options.zero_copy,
        "cache": durability(options.cache),
        "rate": options.rate,
        "force": options.force,
        "force_share": options.force_share,
        "allow_external": options.allow_external,
        "secrets": options.secrets,
        "parents": options.parents,
        "mode": options.mode,
    }


class SetOptions(argparse.Action):
    """Collects `-o name=value,name=value` into a dictionary; `-o` may be repeated."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        given = dict(getattr(namespace, self.dest) or {})
        for part in str(values).split(","):
            name, equals, value = part.partition("=")
            if not equals or not name:
                parser.error(f"argument {option_string}: {part!r} is not name=value")
            given[name] = value
        setattr(namespace, self.dest, given)


def reading(options: argparse.Namespace) -> Reading:
    """Returns the arguments FILE, `-f` and those of `add_access`."""
    from vmconv.interface.arguments import Reading

    return Reading(options.file, options.format_f, **access(options))


def pair(options: argparse.Namespace) -> ImagePair:
    """Returns the arguments FILE1, FILE2, `-f`, `-F` and those of `add_access`."""
    from vmconv.interface.arguments import ImagePair

    return ImagePair(options.left, options.right, options.format_f, options.format_F, **access(options))
