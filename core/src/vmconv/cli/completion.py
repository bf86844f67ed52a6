"""`vmconv completion`: completion of commands and options for shells."""

from __future__ import annotations

import argparse

from vmconv.cli.verbs import Verb


def _run(options: argparse.Namespace) -> int:
    import shtab

    from vmconv.cli.parser import make_parser

    print(shtab.complete(make_parser(), options.shell))
    return 0


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="shell to complete for")


VERB = Verb(
    "Prints a script that makes a shell complete commands and options of vmconv.",
    _configure,
    _run,
    "example:\n  vmconv completion bash > ~/.local/share/bash-completion/completions/vmconv",
)
