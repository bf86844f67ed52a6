"""The command line: `vmconv COMMAND`. Its own commands are registered by the same hook as third parties' ones."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Self

from vmconv.hooks import hookimpl

if TYPE_CHECKING:
    from vmconv.cli.command import Command
    from vmconv.errors import VmconvError

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


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
        except Exception as exc:
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


class _Terminated(BaseException):
    """SIGTERM arrived. No `Exception` and no `SystemExit`: what plugins raise is caught, this must not be."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; the errors of vmconv become one line, with a hint below it."""
    import gc

    # A run is short: collecting garbage while modules are imported costs more than it frees.
    gc.disable()
    # Nothing here is linear algebra: without this numpy starts a thread for each processor when it is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for stream in (sys.stdout, sys.stderr):
        # File names need not be text in the terminal's encoding.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminate)
    return _guarded(arguments)


def _guarded(arguments: Sequence[str] | None) -> int:
    """Parses and runs a command; whatever stops it is reported here."""
    import gc

    from vmconv.errors import VmconvError

    options = argparse.Namespace()
    try:
        given = sys.argv[1:] if arguments is None else arguments
        # What is not asked for needs no parser: making those of all commands takes as long as a conversion's metadata.
        options = make_parser(given[0] if given else None).parse_args(given)
        gc.enable()
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except VmconvError as exc:
        return _report(exc, options)
    except KeyboardInterrupt:
        print("vmconv: interrupted, nothing was created", file=sys.stderr)
        return EXIT_INTERRUPTED
    except _Terminated:
        print("vmconv: terminated, nothing was created", file=sys.stderr)
        return EXIT_TERMINATED
    except BrokenPipeError:
        # Who read our output has gone; there is nobody left to tell.
        _drop_output()
        return 1
    except OSError as exc:
        print(f"vmconv: {exc.filename or 'output'}: {exc.strerror or exc}", file=sys.stderr)
        _drop_output()
        return 1


def _drop_output() -> None:
    """Keeps the interpreter from writing, when it exits, what could not be written before."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(exc: VmconvError, options: argparse.Namespace) -> int:
    code: int = getattr(options, "error_code", None) or exc.exit_code
    if getattr(options, "output", "human") == "json" and getattr(options, "command", "") in ("convert", "fanout"):
        from vmconv.cli.output import print_json

        print_json({"event": "error", "message": str(exc), "hint": exc.hint, "exit-code": code})
    print(f"vmconv: {exc}", file=sys.stderr)
    if exc.hint:
        print(f"  hint: {exc.hint}", file=sys.stderr)
    return code


def _terminate(_number: int, _frame: object) -> None:
    raise _Terminated
