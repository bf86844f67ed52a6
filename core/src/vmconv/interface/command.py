"""What a subcommand is to the command line; plugins make them too."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple


class Command(NamedTuple):
    """One subcommand: `help` is a phrase for the list of commands, `configure` adds its arguments to the parser that
    gets `description` and `epilog`, and `run` does it and returns the exit code.

    Import what the command needs inside `run`: every start of vmconv makes all commands.
    """

    name: str
    help: str
    description: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    epilog: str = ""
