"""`vmconv convert --directory DIR SOURCE...`: many conversions, one report."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vmconv.cli import streams
from vmconv.cli.output import say

if TYPE_CHECKING:
    from vmconv.conversion.batch import Outcome

EXIT_PARTIAL = 5


def add_batch(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("many disks")
    group.add_argument(
        "--directory", metavar="DIR", help="convert each SOURCE to a file in DIR that is named after it; needs -O"
    )
    group.add_argument("--recursive", action="store_true", help="a SOURCE may be a directory: all images in its tree")
    group.add_argument("--skip-existing", action="store_true", help="skip images whose target exists")
    group.add_argument("--jobs", type=int, default=1, metavar="N", help="convert N at once (default: 1)")


def refuse_without_directory(options: argparse.Namespace) -> None:
    """Raises `UsageError` for options that need `--directory`."""
    from vmconv.errors import UsageError

    for given, name in (
        (options.recursive, "--recursive"),
        (options.skip_existing, "--skip-existing"),
        (options.jobs != 1, "--jobs"),
    ):
        if given:
            raise UsageError(f"{name} is for many disks", hint="name the directory of the targets with --directory")


def run_batch(options: argparse.Namespace, sources: Sequence[str]) -> int:
    """Converts all and prints the outcomes; the exit code says whether all, some or none are there."""
    from vmconv.cli.requests import request_of
    from vmconv.conversion.batch import convert_all, requests

    _refuse(options)
    report = _report_of(options)
    found = requests(
        request_of(options, "", ""), sources, options.directory, options.format_O, recursive=options.recursive
    )
    report.total = len(found)
    try:
        outcomes: Sequence[Outcome] = convert_all(
            found, existing=_existing(options), verify=options.verify, jobs=options.jobs, ended=report.ended
        )
    except KeyboardInterrupt as exc:
        report.summary(getattr(exc, "outcomes", ()))
        raise
    with streams.drop_output_on_error():
        report.summary(outcomes)
    codes = [one.exit_code for one in outcomes if one.state == "failed"]
    if not codes:
        return 0
    if len(codes) < len(outcomes):
        return EXIT_PARTIAL
    # All failed: with the code of a single conversion if it is the same for all, such as that of targets that exist.
    return codes[0] if len(set(codes)) == 1 else 1


def _existing(options: argparse.Namespace) -> Any:
    return "skip" if options.skip_existing else "compare" if options.if_needed else "refuse"


def _refuse(options: argparse.Namespace) -> None:
    from vmconv.errors import UsageError

    if options.format_O is None:
        raise UsageError("--directory needs the format of the targets", hint="name it with -O")
    if not options.directory:
        raise UsageError("--directory: '' is empty", hint=". is the current directory")
    if options.jobs < 1:
        raise UsageError(f"--jobs: {options.jobs} is not a number of conversions")
    for given, name in (
        (options.backing_file or options.backing_format, "-B"),
        (options.snapshot, "--snapshot"),
        (options.from_snapshot, "--from-snapshot"),
        (options.no_create, "-n"),
        (options.image_opts, "--image-opts"),
        (options.parents, "--parent"),
    ):
        if given:
            raise UsageError(f"{name} is for a single disk", hint="convert it without --directory")
    if options.skip_existing and options.if_needed:
        raise UsageError("--skip-existing and --if-needed exclude each other", hint="--if-needed also compares")
    if options.in_place and (options.skip_existing or options.if_needed):
        raise UsageError("--in-place: a source that is converted already no longer exists")


def _placed(outcome: Outcome) -> str:
    """Returns the message with the path of its disk: messages have the last part, which other disks may have, too."""
    if outcome.source in outcome.message or outcome.target in outcome.message:
        return outcome.message
    name = os.path.basename(outcome.source)
    return f"{outcome.source}: {outcome.message.removeprefix(f'{name}: ')}"


class _Lines:
    """Prints nothing but errors: the outcomes of `--quiet`."""

    total = 0

    def ended(self, outcome: Outcome) -> None:
        if outcome.state in ("failed", "stopped"):
            say(f"vmconv: {_placed(outcome)}", to=sys.stderr)
            if outcome.hint:
                say(f"  hint: {outcome.hint}", to=sys.stderr)

    def summary(self, outcomes: Sequence[Outcome]) -> None:
        pass


class _Table(_Lines):
    """Prints a counter on a terminal, errors when they happen, and a table at the end."""

    def __init__(self, *, counts: bool) -> None:
        self._counts = counts
        self._done = 0

    def ended(self, outcome: Outcome) -> None:
        self._done += 1
        if self._counts:
            print(f"\r{self._done} of {self.total}", end="", file=sys.stderr, flush=True)
            if outcome.state in ("failed", "stopped"):
                print(file=sys.stderr)
        super().ended(outcome)

    def summary(self, outcomes: Sequence[Outcome]) -> None:
        from vmconv.cli.output import print_table

        if self._counts and outcomes:
            print(file=sys.stderr)
        if outcomes:
            print_table([("source", "target", "", "shared", "copied", "written"), *map(_row, outcomes)])
        for text in _copies(outcomes):
            say(text)
        say(_counted(outcomes, self.total))


class _Events(_Lines):
    """Prints one JSON document per image, and one for all."""

    def ended(self, outcome: Outcome) -> None:
        from vmconv.cli.output import as_plain, print_json

        values = {key.replace("_", "-"): value for key, value in as_plain(outcome).items() if value not in (None, "")}
        print_json({"event": "outcome", **values})
        super().ended(outcome)

    def summary(self, outcomes: Sequence[Outcome]) -> None:
        from vmconv.cli.output import print_json

        print_json({"event": "summary", "images": self.total, **_states(outcomes)})


def _report_of(options: argparse.Namespace) -> _Lines:
    if options.output == "json":
        return _Events()
    return _Lines() if options.quiet else _Table(counts=options.progress or sys.stderr.isatty())


def _row(outcome: Outcome) -> tuple[str, ...]:
    from vmconv.cli.output import size_text

    names = outcome.source, outcome.target, outcome.state
    if outcome.result is None:
        return *names, "", "", ""
    totals = outcome.result.totals
    return *names, size_text(totals.shared), size_text(totals.copied), size_text(totals.written)


def _copies(outcomes: Sequence[Outcome]) -> list[str]:
    """Returns a line for each reason to copy, with the bytes of all images."""
    from vmconv.cli.output import size_text

    found: dict[str, int] = {}
    for outcome in outcomes:
        for copy in outcome.result.copies if outcome.result else ():
            found[copy.reason] = found.get(copy.reason, 0) + copy.bytes
    return [f"copied {size_text(count)} because {reason}" for reason, count in found.items()]


def _states(outcomes: Sequence[Outcome]) -> dict[str, int]:
    found = dict.fromkeys(("made", "exists", "current", "failed", "stopped"), 0)
    for outcome in outcomes:
        found[outcome.state] += 1
    return found


def _counted(outcomes: Sequence[Outcome], total: int) -> str:
    from vmconv.errors import counted

    states = [f"{count} {state}" for state, count in _states(outcomes).items() if count]
    left = total - len(outcomes)
    return f"{counted(total, 'image')}: {', '.join([*states, *([f'{left} not begun'] if left else [])]) or 'none'}"
