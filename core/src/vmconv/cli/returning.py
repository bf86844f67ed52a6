"""`vmconv recover` and `vmconv undo`: back from a conversion in place that was interrupted, or that was not wanted."""

from __future__ import annotations

import argparse
import os

from vmconv.cli.command import Command


def _configure_recover(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="the source or the target of the conversion, or its journal")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="follow a journal that another user, another machine or an older vmconv made, as after a backup was\n"
        "restored: it says which files of the directory are written over, renamed and removed",
    )


def _run_recover(options: argparse.Namespace) -> int:
    from vmconv import signals
    from vmconv.inplace.recovery import recover
    from vmconv.targets import finished

    if finished(options.path, trust=options.trust):
        print(f"{options.path}: all images that were made with it are complete")
        return 0
    what = {None: "nothing to recover", True: "the conversion is finished", False: "is as it was before the conversion"}
    # A signal would only make another recovery necessary.
    with signals.held():
        done = recover(options.path, trust=options.trust)
        print(f"{_beside(options.path, done.path)}: {what[done.forward]}")
    return 0


def _beside(given: str, path: str) -> str:
    """Returns a path in the directory of what the user named, as the user named that."""
    return os.path.join(os.path.dirname(given), os.path.basename(path))


def _configure_undo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the target of a conversion with --in-place --keep-undo")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="follow an undo file that another user, another machine or an older vmconv made, as after a backup was\n"
        "restored: it says which files of the directory are written over, renamed and removed",
    )


def _run_undo(options: argparse.Namespace) -> int:
    from vmconv.inplace.undo import undo

    try:
        path = undo(options.file, trust=options.trust)
    except KeyboardInterrupt as exc:
        results = getattr(exc, "results", ())
        if not results:
            vars(exc)["left"] = "nothing was changed"
            raise
        # The signal came when everything was done.
        path = results[0]
    print(f"{_beside(options.file, path)}: is as it was before the conversion")
    return 0


COMMANDS = (
    Command(
        "recover",
        "take back or finish a conversion in place that was interrupted",
        "Brings the disk back after a conversion in place was killed or the power failed: as it was before, or, when\n"
        "the conversion had got that far, as the complete target.",
        _configure_recover,
        _run_recover,
        """exit status:
  0  the disk is complete
  1  it could not be brought back; the message says why
  2  the request makes no sense""",
    ),
    Command(
        "undo",
        "turn a disk back into what it was converted from in place",
        "Brings the old container back, byte for byte, when it was converted with --keep-undo and nobody has\n"
        "written to the new one since. Payload is not touched.",
        _configure_undo,
        _run_undo,
        """exit status:
  0  the disk is what it was
  1  it cannot be undone; the message says why, and nothing was changed
  2  the request makes no sense""",
    ),
)
