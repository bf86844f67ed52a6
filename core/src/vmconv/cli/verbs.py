"""The commands of core without the modules that implement them: only the module of the asked verb is imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import NamedTuple

from vmconv.interface.command import Command


class Verb(NamedTuple):
    """What the module of one verb defines, as `VERB`: the parts of a `Command` that `vmconv --help` does not print."""

    description: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    epilog: str = ""


def command(package: str, name: str, summary: str) -> Command:
    """Returns the command whose `VERB` is in the module `name` of `package`, imported when the command is used."""
    module = f"{package}.{name}"
    return Command(name, summary, "", partial(_configure, module), partial(_run, module))


def _verb(module: str) -> Verb:
    verb: Verb = import_module(module).VERB
    return verb


def _configure(module: str, parser: argparse.ArgumentParser) -> None:
    verb = _verb(module)
    parser.description, parser.epilog = verb.description, verb.epilog
    verb.configure(parser)


def _run(module: str, options: argparse.Namespace) -> int:
    return _verb(module).run(options)
