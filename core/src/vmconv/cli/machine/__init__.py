"""`vmconv machine`: one verb per module, named as the verb."""

from __future__ import annotations

import argparse

from vmconv.cli.options import formatter
from vmconv.cli.verbs import Verb, command

VERBS = (
    ("info", "describe a machine"),
    ("check", "find out whether a machine will start"),
    ("plan", "show what a conversion would carry over, change and lose"),
    ("convert", "convert a machine for another hypervisor"),
    ("formats", "list the machine formats that are installed, and those that could be"),
)
"""Name and help of each verb, whose module has its name."""


def _configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, title="verbs")
    for name, summary in VERBS:
        sub = verbs.add_parser(name, help=summary, formatter_class=formatter)
        verb = command(__name__, name, summary)
        verb.configure(sub)
        sub.set_defaults(run_verb=verb.run)


def _run(options: argparse.Namespace) -> int:
    code: int = options.run_verb(options)
    return code


VERB = Verb(
    "Converts virtual machines between hypervisors: the configuration and the firmware's variables are translated,\n"
    "the disks are converted without copying their payload wherever storage allows it.",
    _configure,
    _run,
    "vmconv machine VERB --help says more about a verb; vmconv machine formats lists what is installed.",
)
