"""The command line: `vmconv COMMAND`. Its own commands are registered by the same hook as third parties' ones."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Self

from vmconv.cli import streams
from vmconv.errors import printable
from vmconv.hooks import hookimpl
from vmconv.signals import Stopped

if TYPE_CHECKING:
    from vmconv.cli.command import Command
    from vmconv.errors import VmconvError

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM
EXIT_HUNG_UP = 128 + signal.SIGHUP


@hookimpl
def vmconv_register_commands() -> Iterable[Command]:
    from vmconv.cli import comparing, completion, converting, demo, fanning, inspecting, listing, returning

    modules = (listing, inspecting, converting, fanning, returning, comparing, demo, completion)
    return [command for module in modules for command in module.COMMANDS]


def make_parser(wanted: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser of the whole command line; of the commands only the `wanted` one when it is installed."""
    from vmconv.cli.options import formatter
    from vmconv.registry import installed

    parser = argparse.ArgumentParser(
        prog="vmconv",
        description="Converts virtual machine disks between formats without copying their payload.",
        epilog="vmconv COMMAND --help says more about a command; vmconv formats lists what is installed.",
        formatter_class=formatter,
    )
    parser.add_argument("--version", action="version", version=_Version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    registry = installed()
    found = registry.commands.get(wanted or "")
    for command in [found] if found else registry.commands.values():
        sub = commands.add_parser(
            command.name,
            help=command.help,
            description=command.description,
            epilog=command.epilog,
            formatter_class=formatter,
        )
        try:
            command.configure(sub)
            sub.set_defaults(run=command.run)
        except (Exception, SystemExit) as exc:
            distribution = registry.owners["command", command.name]
            registry.add_problem(distribution, f"command {command.name!r}", exc)
            sub.set_defaults(run=_broken(command.name, distribution))
    return parser


def _broken(name: str, distribution: str) -> Callable[[argparse.Namespace], int]:
    """Returns what runs instead of a command whose arguments could not be set up."""
    from vmconv.errors import PluginError

    def run(_options: argparse.Namespace) -> int:
        raise PluginError(f"command {name!r} of {distribution} is broken", hint="vmconv formats says why")

    return run


class _Version(str):
    """The version, looked up only when it is asked for."""

    def __new__(cls) -> Self:
        return super().__new__(cls, "%(prog)s")

    def __mod__(self, values: object) -> str:
        from importlib.metadata import version

        return f"vmconv {version('vmconv')}"


_STOPS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
"""Signals that end a run after it has cleaned up, and the word for each."""


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
        return _code(exc)


def _guarded(arguments: Sequence[str] | None) -> int:
    """Parses and runs a command; whatever stops it is reported here."""
    import gc

    from vmconv.errors import VmconvError
    from vmconv.faults import plugin_faults

    options = argparse.Namespace()
    try:
        given = sys.argv[1:] if arguments is None else arguments
        # What is not asked for needs no parser: making those of all commands takes as long as a conversion's metadata.
        options = make_parser(given[0] if given else None).parse_args(given)
        gc.enable()
        with plugin_faults():
            code: int = options.run(options)
        sys.stdout.flush()
        return code
    except VmconvError as exc:
        return _report(exc, options)
    except KeyboardInterrupt as exc:
        from vmconv.cli.reporting import left_by

        print(f"vmconv: {word_for(exc)}{left_by(exc)}", file=sys.stderr)
        return _code(exc)
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


def _number(exc: KeyboardInterrupt) -> int:
    return exc.number if isinstance(exc, Stopped) else signal.SIGINT


def word_for(exc: KeyboardInterrupt) -> str:
    """Returns what a signal did, in one word."""
    return _STOPS.get(_number(exc), "stopped")


def _code(exc: KeyboardInterrupt) -> int:
    """Returns the exit code that shells have for a program that a signal ended."""
    return 128 + _number(exc)


def _report(exc: VmconvError, options: argparse.Namespace) -> int:
    code: int = getattr(options, "error_code", None) or exc.exit_code
    if getattr(options, "output", "human") == "json" and getattr(options, "command", "") in ("convert", "fanout"):
        from vmconv.cli.output import print_json

        with streams.dropped_if_it_fails():
            print_json({"event": "error", "message": str(exc), "hint": exc.hint, "exit-code": code})
    print(f"vmconv: {exc}", file=sys.stderr)
    if exc.hint:
        print(f"  hint: {exc.hint}", file=sys.stderr)
    return code


def _stop(number: int, _frame: object) -> None:
    raise Stopped(number)
