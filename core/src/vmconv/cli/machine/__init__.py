"""`vmconv machine`: one verb per module, named as the verb."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vmconv.cli.options import formatter
from vmconv.interface.command import Command

if TYPE_CHECKING:
    from collections.abc import Iterator


def _verbs() -> Iterator[Command]:
    from vmconv.cli.machine import check, convert, formats, info, plan

    yield from (module.COMMAND for module in (info, check, plan, convert, formats))


def _configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, title="verbs")
    for verb in _verbs():
        sub = verbs.add_parser(
            verb.name, help=verb.help, description=verb.description, epilog=verb.epilog, formatter_class=formatter
        )
        verb.configure(sub)
        sub.set_defaults(run_verb=verb.run)


def _run(options: argparse.Namespace) -> int:
    code: int = options.run_verb(options)
    return code


COMMAND = Command(
    "machine",
    "convert whole machines: configuration, firmware and disks",
    "Converts virtual machines between hypervisors: the configuration and the firmware's variables are translated,\n"
    "the disks are converted without copying their payload wherever storage allows it.",
    _configure,
    _run,
    "vmconv machine VERB --help says more about a verb; vmconv machine formats lists what is installed.",
)
