"""Reports of commands that make images: plan, progress and results, for people or as JSON."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vmconv.cli import streams
from vmconv.cli.colours import paint
from vmconv.cli.output import say
from vmconv.errors import printable

if TYPE_CHECKING:
    from vmconv.conversion.request import Request, Result
    from vmconv.model.plan import Plan


def plan_json(plan: Plan) -> dict[str, Any]:
    """Returns a plan in JSON's types."""
    return {
        "backend": plan.backend,
        **plan.totals._asdict(),
        "copies": [copy._asdict() for copy in plan.copies],
        "references": [{"name": one.name, "bytes": one.length} for one in plan.references],
        "losses": list(plan.losses),
        "notes": list(plan.notes),
        "files": [{"name": file.name, "size": file.size, **_steps(file)} for file in plan.files],
    }


def _steps(file: Any) -> dict[str, int]:
    from vmconv.model.plan import Action

    return {action.name.lower(): file.steps.total(action) for action in Action}


_EVENT_SECONDS = 0.1
_ESTIMATE_AFTER = 1.0


class _Silence:
    """Prints nothing, for `--quiet`."""

    def announce(self, plan: Plan) -> None:
        pass

    def progress(self, done: int, to_do: int) -> None:
        pass

    def verifying(self, done: int, to_do: int) -> None:
        pass

    def sharing(self, done: int, to_do: int) -> None:
        pass

    def results(self, *results: Result) -> None:
        pass

    def close(self) -> None:
        pass


class _Events(_Silence):
    """Prints one JSON document per line: plan, progress, result."""

    def announce(self, plan: Plan) -> None:
        self._print("plan", plan_json(plan))

    def __init__(self) -> None:
        self._said = 0.0

    def progress(self, done: int, to_do: int) -> None:
        now = time.monotonic()
        if done in (0, to_do) or now - self._said >= _EVENT_SECONDS:
            self._said = now
            self._print("progress", {"done": done, "total": to_do})

    def verifying(self, done: int, to_do: int) -> None:
        now = time.monotonic()
        if done in (0, to_do) or now - self._said >= _EVENT_SECONDS:
            self._said = now
            self._print("verify", {"done": done, "total": to_do})

    def results(self, *results: Result) -> None:
        from vmconv.cli.output import as_plain

        for result in results:
            self._print("result", as_plain(result))

    def _print(self, event: str, values: dict[str, Any]) -> None:
        from vmconv.cli.output import print_json

        print_json({"event": event, **values})


class _Words(_Silence):
    """Prints text: copies and their reasons, a progress bar, results."""

    def __init__(self, *, bar: bool, details: bool, request: Request | None) -> None:
        from vmconv.cli.output import ProgressBar

        self._details, self._request = details, request

        self._bar = ProgressBar() if bar else None
        self._began, self._estimated = 0.0, False
        self._shared = "shared"

    def announce(self, plan: Plan) -> None:
        from vmconv.cli.output import size_text
        from vmconv.conversion.refusals import without_copies
        from vmconv.model.references import notes

        self._shared = shared_word(plan)
        if plan.destination == "stream":
            say(f"{plan.files[0].name}: {plan.files[0].size} bytes", to=sys.stderr)
        for copy in plan.copies:
            say(f"copying {size_text(copy.bytes)} ({copy.bytes} bytes) because {copy.reason}", to=sys.stderr)
        if self._request and (hint := without_copies(self._request, plan)):
            say(f"  hint: {hint}", to=sys.stderr)
        for loss in shown_losses(plan, details=self._details):
            say(f"not carried over: {loss}", to=sys.stderr)
        for note in (*plan.notes, *notes(plan.references, plan.directory)):
            say(f"note: {note}", to=sys.stderr)

    def progress(self, done: int, to_do: int) -> None:
        if self._bar:
            self._bar(done, to_do)

    def sharing(self, done: int, to_do: int) -> None:
        if self._bar:
            self._bar(done, to_do, "sharing")

    def verifying(self, done: int, to_do: int) -> None:
        from vmconv.cli.output import size_text

        now = time.monotonic()
        if not done:
            self._began, self._estimated = now, False
            print(f"verifying: {size_text(to_do)} ({to_do} bytes) to read of source and result", file=sys.stderr)
        elif not self._bar and not self._estimated and now - self._began >= _ESTIMATE_AFTER:
            self._estimated = True
            left = (now - self._began) * (to_do - done) / done
            print(f"verifying: about {left:.0f} s more", file=sys.stderr)
        if self._bar:
            self._bar(done, to_do, "verifying")

    def close(self) -> None:
        if self._bar:
            self._bar.close()

    def results(self, *results: Result) -> None:
        for warning in dict.fromkeys(warning for result in results for warning in result.warnings):
            print(f"{paint('warning:', 'warning', sys.stderr)} {printable(warning)}", file=sys.stderr)
        seconds = f" in {results[0].seconds:.3f} s"
        for result in results:
            say(f"{_done(result, self._shared)}{seconds if len(results) == 1 else ''}")
        if len(results) > 1:
            print(f"{len(results)} images{seconds}")


def shown_losses(plan: Plan, *, details: bool) -> list[str]:
    """Returns the losses to print: all with `details`, else those that matter."""
    from vmconv.model.facts import MinorLoss

    return [loss for loss in plan.losses if details or not isinstance(loss, MinorLoss)]


def shared_word(plan: Plan) -> str:
    """Returns the word for payload that is not copied; in place it is kept, because no second file shares it."""
    return "kept" if plan.destination == "source" else "shared"


def _done(result: Result, shared: str) -> str:
    from vmconv.cli.output import size_text

    totals = result.totals
    referenced = f"referenced {size_text(totals.referenced)}, " if totals.referenced else ""
    return (
        f"{' on '.join([result.target, *result.layers])}: "
        f"{referenced}{shared} {size_text(totals.shared)}, "
        f"copied {size_text(totals.copied)}, written {size_text(totals.written)}"
    )


def report_of(options: argparse.Namespace, request: Request | None = None) -> _Silence:
    """Returns the report in the style of the options; with hints, if it is of the request of one conversion."""
    if options.output == "json":
        return _Events()
    if options.quiet:
        return _Silence()
    return _Words(
        bar=options.progress or sys.stderr.isatty(),
        details=options.verbose,
        request=request,
    )


def run_and_report(
    options: argparse.Namespace, convert: Callable[..., Sequence[Result]], request: Request | None = None
) -> int:
    """Calls `convert` and prints its plan, progress and results in the style of the options.

    `request` is that of one conversion: then hints say how to make it without copies.
    """
    report = report_of(options, request)
    try:
        results = convert(
            verify=options.verify,
            announce=report.announce,
            progress=report.progress,
            verifying=report.verifying,
            sharing=report.sharing,
        )
    except KeyboardInterrupt as exc:
        results = getattr(exc, "results", ())
        if not results:
            raise
        # The signal arrived after the commit: the run succeeded.
        _say_complete(exc, results)
    finally:
        report.close()
    with streams.drop_output_on_error():
        report.results(*results)
    return 0


def _say_complete(exc: KeyboardInterrupt, results: Sequence[Result]) -> None:
    from vmconv.cli.stops import word_for

    names = ", ".join(name for result in results for name in (result.target, *result.layers))
    say(f"vmconv: {word_for(exc)} when everything was made; complete: {names}", to=sys.stderr)


def left_by(exc: BaseException) -> str:
    """Returns the end of the message on an interrupted run: what it left, if known."""
    from vmconv.errors import VmconvError

    failed = exc.__context__
    if isinstance(failed, VmconvError):
        # The run failed after the commit, and then the held signal was delivered.
        return f": {failed}" + (f"\n  hint: {failed.hint}" if failed.hint else "")
    if left := getattr(exc, "left", None):
        return f", {left}"
    return ", nothing was created" if getattr(exc, "results", None) == () else ""
