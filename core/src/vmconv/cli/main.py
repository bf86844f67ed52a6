"""Runs one command: `vmconv COMMAND`. Errors become one line, with a hint below it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vmconv.cli import streams
from vmconv.cli.colours import paint
from vmconv.cli.parser import make_parser
from vmconv.cli.starting import prepare
from vmconv.cli.stops import code_for, word_for
from vmconv.errors import VmconvError, printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Prints errors of vmconv as one line, with a hint below it."""
    prepare()
    try:
        return _guarded(arguments)
    except KeyboardInterrupt as exc:
        # A second signal arrived while the first one was reported.
        return code_for(exc)


def _guarded(arguments: Sequence[str] | None) -> int:
    """Parses and runs a command; reports its errors and signals."""
    import gc

    from vmconv.errors import VmconvError
    from vmconv.io.faults import plugin_faults

    options = argparse.Namespace()
    try:
        given = sys.argv[1:] if arguments is None else arguments
        options = make_parser(next((word for word in given if word != "--debug"), None)).parse_args(given)
        gc.enable()
        with plugin_faults():
            code: int = options.run(options)
        sys.stdout.flush()
        return code
    except VmconvError as exc:
        return _report(exc, options)
    except KeyboardInterrupt as exc:
        from vmconv.cli.report import left_by

        print(f"vmconv: {word_for(exc)}{left_by(exc)}", file=sys.stderr)
        return code_for(exc)
    except BrokenPipeError:
        # The reader of our output closed the pipe, as `head` does: no message.
        streams.drop_output()
        return 1
    except OSError as exc:
        streams.drop_output()
        _trace(exc, options)
        named = (getattr(options, name, None) for name in ("source", "file", "path", "left"))
        where = exc.filename or next(filter(None, named), None)
        print(f"vmconv: {printable(f'{where}: ' if where else '')}{exc.strerror or exc}", file=sys.stderr)
        # For some commands exit code 1 is an answer. An error needs another code there.
        return getattr(options, "error_code", None) or 1


def _report(exc: VmconvError, options: argparse.Namespace) -> int:
    code: int = getattr(options, "error_code", None) or exc.exit_code
    if getattr(options, "output", "human") == "json" and _makes_images(options):
        from vmconv.cli.output import print_json

        with streams.drop_output_on_error():
            print_json({"event": "error", "message": str(exc), "hint": exc.hint, "exit-code": code})
    _trace(exc, options)
    print(f"{paint('vmconv:', 'error', sys.stderr)} {exc}", file=sys.stderr)
    if exc.hint:
        print(f"  {paint('hint:', 'hint', sys.stderr)} {exc.hint}", file=sys.stderr)
    return code


def _trace(exc: BaseException, options: argparse.Namespace) -> None:
    """Prints the traceback of an error, and the plugins in it, if the user asked for it."""
    if not getattr(options, "debug", False):
        return
    import traceback

    from vmconv.io.faults import plugins_in

    for line in "".join(traceback.format_exception(exc)).splitlines():
        print(printable(line), file=sys.stderr)
    for plugin in plugins_in(exc):
        print(f"in this traceback: {plugin.module} of {plugin.distribution} {plugin.version}", file=sys.stderr)


def _makes_images(options: argparse.Namespace) -> bool:
    """True if the command prints events, and so its error as one."""
    return getattr(options, "verb", None) == "convert" or getattr(options, "command", "") in ("convert", "fanout")
