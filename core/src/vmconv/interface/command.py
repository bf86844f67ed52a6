"""Subcommands of the command line, of core and of plugins."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple


class Command(NamedTuple):
    """One subcommand: `help` is a phrase for the list of commands, `configure` adds arguments to the command's parser,
    and `run` returns the exit status.

    Import heavy modules inside `configure` and `run`: each start of vmconv creates all commands.
    """

    name: str
    help: str
    description: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    epilog: str = ""
