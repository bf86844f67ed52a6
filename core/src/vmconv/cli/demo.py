"""`vmconv demo`: converts a real disk image to every format and back, in any directory."""

from __future__ import annotations

import argparse
import os

from vmconv.cli.verbs import Verb

_SMALLEST = 8 << 20


def _run(options: argparse.Namespace) -> int:
    import tempfile

    from vmconv.errors import BackendError, UsageError
    from vmconv.model.options import parse_size

    if not os.path.isdir(options.directory):
        raise BackendError(f"{options.directory}: is not a directory")
    try:
        size = parse_size(options.size)
    except ValueError as exc:
        raise UsageError(f"--size: {exc}") from exc
    if size < _SMALLEST:
        raise UsageError(f"--size: {options.size} is less than {_SMALLEST >> 20}M, the smallest that shows anything")
    with tempfile.TemporaryDirectory(prefix="vmconv-demo-", dir=options.directory) as directory:
        return _demonstrate(directory, size)


def _demonstrate(directory: str, size: int) -> int:
    from vmconv.api import convert
    from vmconv.cli.output import print_table, size_text
    from vmconv.io.known import RAW_NAME
    from vmconv.io.registry import installed
    from vmconv.system.linux import mount_of

    mount = mount_of(directory)
    print(
        f"A disk of {size_text(size)} with {size_text(size // 2)} of random payload, on {mount.type} at {mount.point}"
    )
    source = os.path.join(directory, "disk.raw")
    _make_disk(source, size)
    registry = installed()
    rows = [["CONVERSION", "SHARED", "COPIED", "WRITTEN", "SECONDS", "SAME BYTES", "SAME BLOCKS"]]
    reasons: dict[str, None] = {}
    failed = False
    for name, one in sorted(registry.formats.items()):
        if name == RAW_NAME or not (one.can_read and one.can_write):
            continue
        there = os.path.join(directory, f"there{one.suffixes[0]}")
        back = os.path.join(directory, "back.raw")
        for start, end, start_format, end_format in ((source, there, RAW_NAME, name), (there, back, name, RAW_NAME)):
            result = convert(start, end, source_format=start_format, target_format=end_format, force=True)
            identical, proof = _verdict(source, end, end_format)
            failed |= not identical
            reasons.update(dict.fromkeys(copy.reason for copy in result.copies))
            totals = result.totals
            sizes = [size_text(value) for value in (totals.shared, totals.copied, totals.written)]
            same = "yes" if identical else "NO"
            rows.append([f"{start_format} -> {end_format}", *sizes, f"{result.seconds:.3f}", same, proof])
    print_table(rows)
    for reason in reasons:
        print(f"Copied because {reason}.")
    if reasons:
        print("On XFS or Btrfs nothing would have been copied: vmconv demo --directory DIR tries it there.")
    return 1 if failed else 0


def _verdict(source: str, target: str, target_format: str) -> tuple[bool, str]:
    """Returns whether a guest sees the same bytes, and the shared bytes as text."""
    from vmconv.cli.output import size_text
    from vmconv.inspect.comparison import compare_images
    from vmconv.inspect.proof import prove_images
    from vmconv.io.known import RAW_NAME
    from vmconv.io.opener import Opener
    from vmconv.io.registry import installed

    with Opener(installed()) as opener:
        left, right = opener.image(source, RAW_NAME), opener.image(target, target_format)
        proof = prove_images(left, right)
        words = (
            f"all {size_text(proof.shared)}"
            if proof
            else f"{size_text(proof.shared)} of {size_text(proof.shared + proof.apart + proof.unknown)}"
        )
        return bool(compare_images(left, right)), words


def _make_disk(path: str, size: int) -> None:
    """Writes a sparse disk with payload in every second part, and a boot sector's signature."""
    part = 4 << 20
    with open(path, "wb") as file:
        file.truncate(size)
        for at in range(0, size, 2 * part):
            file.seek(at)
            file.write(os.urandom(min(part, size - at)))
        file.seek(510)
        file.write(b"\x55\xaa")
        file.flush()
        os.fsync(file.fileno())


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--directory", default=".", metavar="DIR", help="where to make the disk (default: .)")
    parser.add_argument("--size", default="256M", metavar="SIZE", help="size of the disk (default: 256M)")


VERB = Verb(
    "Makes a real disk image in a temporary directory, converts it to every installed format and back, and shows\n"
    "for each conversion what was shared, copied and written, how long it took, whether a guest sees the same\n"
    "bytes, and how much of the payload lies in the very same blocks. Removes everything it made.",
    _configure,
    _run,
)
