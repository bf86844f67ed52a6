"""`vmconv node`: the actions and their arguments; their code is imported on use."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from vmconv.plugin import Command, formatter

Adder = Callable[[argparse.ArgumentParser], Any]


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "datastores", nargs="*", metavar="DIR", help="directories of disk images that this node converts"
    )
    parser.add_argument("--name", help="name of the node (default: the host name)")
    parser.add_argument("--listen", metavar="HOST:PORT", help="where other nodes connect (default: [::]:7447)")
    parser.add_argument(
        "--address",
        action="append",
        metavar="HOST",
        help="name or address of this node for others, for its certificate (default: all of this machine)",
    )
    parser.add_argument("--api", metavar="HOST:PORT", help="where administrators connect (default: 127.0.0.1:7449)")
    parser.add_argument("--no-api", action="store_true", help="no HTTPS; the Unix socket stays")


def _init(parser: argparse.ArgumentParser) -> None:
    _settings(parser)
    parser.add_argument("--fleet", default="fleet", help="the name of the fleet (default: %(default)s)")
    parser.add_argument(
        "--permit",
        action="append",
        metavar="NAME",
        help="a domain or network that certificates of this fleet may name, and no others (default: private addresses, "
        "and the domain of this machine)",
    )
    parser.add_argument("--join", metavar="HOST:PORT", help="where new nodes connect to join (default: [::]:7448)")


def _join(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("invitation", metavar="INVITATION", help="the output of vmconv node invite on another node")
    _settings(parser)


def _invite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=60, help="minutes until it expires (default: %(default)s)")
    parser.add_argument(
        "--address", metavar="HOST", help="address of this node for the new one (default: the first of this machine)"
    )


def _renew(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--new-keys", action="store_true", help="make new keys, not only a new certificate")


def _revoke(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("node", metavar="NODE", help="the node: its name, id, or the beginning of its id")
    parser.add_argument("--key", metavar="KEY", help="only this key of the node, as vmconv node keys lists it")


def _keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("node", nargs="?", metavar="NODE", help="only keys of this node")
    parser.add_argument("--output", choices=("human", "json"), default="human", help="(default: %(default)s)")


def _leave(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="leave even if no authority can be reached")


def _authority(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("direction", choices=("export", "import"), help="export it from this node, or import it")
    parser.add_argument("file", metavar="FILE", help="file of the authority's private key: keep it secret")


def _backup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a new file; it has the node's private keys: keep it secret")


def _restore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the output of vmconv node backup")


def _resume(parser: argparse.ArgumentParser) -> None:
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--without",
        action="append",
        metavar="NODE",
        help="do not wait for this node, by name or id: it is lost with the records that it alone has of this node",
    )
    given.add_argument("--alone", action="store_true", help="wait for no other node: all are lost")
    given.add_argument(
        "--merge", action="store_true", help="take over the other histories of this node, whose copies have ended"
    )
    _status(parser)


def _status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", choices=("human", "json"), default="human", help="(default: %(default)s)")


def _nothing(_parser: argparse.ArgumentParser) -> None:
    """Takes no arguments."""


ACTIONS: dict[str, tuple[str, Adder]] = {
    "init": ("create a fleet: this machine becomes its first node and holds its authority", _init),
    "join": ("join a fleet by an invitation", _join),
    "run": ("run the node, in the foreground, until SIGTERM", _nothing),
    "status": ("show this node's settings, and whether it runs", _status),
    "invite": ("print an invitation for one new node", _invite),
    "renew": ("get a new certificate; a running node uses it at once", _renew),
    "revoke": ("revoke a node, or one of its keys: the whole fleet refuses it", _revoke),
    "keys": ("list the keys of nodes, and which are revoked", _keys),
    "authority": ("copy the fleet's authority to another node", _authority),
    "backup": ("write settings, keys, authority and database into one file", _backup),
    "restore": ("make the directory of a node from its backup", _restore),
    "resume": ("let a node write again that was restored without all members, or has two histories", _resume),
    "leave": ("leave the fleet: the certificate is revoked and deleted, disks stay", _leave),
}


def _configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, title="actions")
    for name, (help_text, add) in ACTIONS.items():
        action = actions.add_parser(
            name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.", formatter_class=formatter
        )
        action.add_argument(
            "--directory",
            metavar="DIR",
            help="the node's directory (default: $VMCONV_NODE, or below the state directory)",
        )
        add(action)


def _run(options: argparse.Namespace) -> int:
    from vmconv_fleet.cli import node_actions

    act: Callable[[argparse.Namespace], int] = getattr(node_actions, f"{options.action}_node")
    return act(options)


COMMAND = Command(
    name="node",
    help="make this machine a node of a fleet, and run it",
    description="Turns a directory into a node of a fleet, and runs it. Each node has a directory of its own.",
    configure=_configure,
    run=_run,
)
