"""Runs one command: `vmconv COMMAND`. Errors become one line, with a hint below it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from vmconv.cli import streams
from vmconv.cli.parser import make_parser
from vmconv.cli.stops import code_for, word_for
from vmconv.errors import VmconvError, printable
from vmconv.system.signals import Stopped


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; the errors of vmconv become one line, with a hint below it."""
    import gc

    # A run is short: collecting garbage while modules are imported costs more than it frees.
    gc.disable()
    # Nothing here is linear algebra: without this numpy starts a thread for each processor when it is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    streams.prepare()
    for number in (signal.SIGTERM, signal.SIGHUP):
        # nohup, and shells for programs in the background, start a program with a signal ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        return _guarded(arguments)
    except KeyboardInterrupt as exc:
        # A second signal, while what the first one had stopped was being reported.
        return code_for(exc)


def _guarded(arguments: Sequence[str] | None) -> int:
    """Parses and runs a command; whatever stops it is reported here."""
    import gc

    from vmconv.errors import VmconvError
    from vmconv.io.faults import plugin_faults

    options = argparse.Namespace()
    try:
        given = sys.argv[1:] if arguments is None else arguments
        options = make_parser(given[0] if given else None).parse_args(given)
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
        # Whoever read our output has gone and knows it.
        streams.drop_output()
        return 1
    except OSError as exc:
        streams.drop_output()
        named = (getattr(options, name, None) for name in ("source", "file", "path", "left"))
        where = exc.filename or next(filter(None, named), None)
        print(f"vmconv: {printable(f'{where}: ' if where else '')}{exc.strerror or exc}", file=sys.stderr)
        # Of commands whose exit code 1 is an answer, this is none.
        return getattr(options, "error_code", None) or 1


def _report(exc: VmconvError, options: argparse.Namespace) -> int:
    code: int = getattr(options, "error_code", None) or exc.exit_code
    if getattr(options, "output", "human") == "json" and getattr(options, "command", "") in ("convert", "fanout"):
        from vmconv.cli.output import print_json

        with streams.drop_output_on_error():
            print_json({"event": "error", "message": str(exc), "hint": exc.hint, "exit-code": code})
    print(f"vmconv: {exc}", file=sys.stderr)
    if exc.hint:
        print(f"  hint: {exc.hint}", file=sys.stderr)
    return code


def _stop(number: int, _frame: object) -> None:
    raise Stopped(number)
