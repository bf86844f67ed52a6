"""`vmconv completion`: completion of commands and options for shells."""

from __future__ import annotations

import argparse

from vmconv.interface.command import Command


def _run(options: argparse.Namespace) -> int:
    import shtab

    from vmconv.cli.parser import make_parser

    print(shtab.complete(make_parser(), options.shell))
    return 0


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="shell to complete for")


COMMAND = Command(
    "completion",
    "print a completion script for a shell",
    "Prints a script that makes a shell complete commands and options of vmconv.",
    _configure,
    _run,
    "example:\n  vmconv completion bash > ~/.local/share/bash-completion/completions/vmconv",
)
