"""`vmconv fleet`: the verbs and their arguments; their modules are imported on use."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from vmconv.plugin import Command, SetOptions, formatter, parse_size
from vmconv_fleet.cli.values import names, none_or, numbers, window

_WINDOW = "such as 22:00-05:00 by this machine's clock, or '22:00-05:00 Europe/Berlin'"


class _Verb(NamedTuple):
    """A verb; `module` has its function, which is named as the verb."""

    help: str
    module: str
    configure: Callable[[argparse.ArgumentParser], None]


def _configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, title="verbs")
    for name, verb in VERBS.items():
        sub = verbs.add_parser(
            name,
            help=verb.help,
            description=f"{verb.help[0].upper()}{verb.help[1:]}.",
            formatter_class=formatter,
        )
        verb.configure(sub)


def _run(options: argparse.Namespace) -> int:
    verb = VERBS[options.verb]
    do: Callable[[argparse.Namespace], int] = getattr(import_module(f"vmconv_fleet.cli.{verb.module}"), options.verb)
    return do(options)


def _reading(parser: argparse.ArgumentParser) -> None:
    """Adds the options of all verbs that talk to a node."""
    parser.add_argument(
        "--node",
        metavar="WHERE",
        help="the node to connect to: its directory on this machine, or https://HOST:7449 with a token\n"
        "(default: $VMCONV_NODE, or below the state directory)",
    )
    parser.add_argument(
        "--token-file", metavar="FILE", help="file with the token for https (default: $VMCONV_FLEET_TOKEN)"
    )
    parser.add_argument("--ca", metavar="FILE", help="certificate of the fleet's authority, for https")
    parser.add_argument("--output", choices=("human", "json"), default="human", help="how to print (default: human)")


def _asking(parser: argparse.ArgumentParser) -> None:
    """Adds the options of all verbs that request a change."""
    _reading(parser)
    parser.add_argument(
        "--wait", type=float, default=10, metavar="SECONDS", help="seconds to wait for the owner's answer (default: 10)"
    )


def _of_node(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--of", metavar="NODE", help="only records of this node: its name, id, or the beginning of its id"
    )


def _listing(parser: argparse.ArgumentParser) -> None:
    _of_node(parser)
    _reading(parser)


def _disks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--select", metavar="SELECTION", help="only these, such as 'format=vmdk and node=n0*'")
    parser.add_argument(
        "--sort",
        choices=[f"{sign}{field}" for sign in ("", "-") for field in ("name", "size", "actual-size", "format")],
        metavar="FIELD",
        help="the order: name, size, actual-size or format; --sort=-size reverses it. By default by node and datastore",
    )
    _searching(parser)
    _listing(parser)


def _searching(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--search", metavar="WORDS", help="only those with all these words in their texts")


def _vms(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--select", metavar="SELECTION", help="only these, such as 'os=debian* and memory>4G'")
    fields = ("name", "system", "memory", "processors", "disks")
    parser.add_argument(
        "--sort",
        choices=[f"{sign}{field}" for sign in ("", "-") for field in fields],
        metavar="FIELD",
        help=f"the order: {', '.join(fields[:-1])} or disks (their number); --sort=-memory reverses it",
    )
    _searching(parser)
    _listing(parser)


def _jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--state", metavar="STATES", help="only jobs in these states, separated by commas")
    parser.add_argument("--batch", metavar="ID", help="only jobs of one conversion of many")
    _searching(parser)
    _listing(parser)


def _newest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--limit", type=int, default=20, metavar="N", help="the number of records, newest first (default: 20)"
    )
    parser.add_argument("--scans", action="store_true", help="also those that only asked for a scan")
    _listing(parser)


def _convert(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "named",
        nargs="*",
        default=[],
        metavar="DISK|VM",
        help="disks of the catalogue: ids, or NODE:NAME; with -O virtual machines: ids, NODE:FILE or NODE:NAME",
    )
    which.add_argument("--select", metavar="SELECTION", help="all selected disks; with -O all selected machines")
    parser.add_argument("--yes", action="store_true", help="do not ask before the conversion of many")
    what = parser.add_mutually_exclusive_group(required=True)
    # Named as the fields of the request, and without defaults: an option that is not given is not sent.
    spec = [
        what.add_argument("--to", dest="format", metavar="FMT", help="format to convert a disk to"),
        parser.add_argument(
            "-o",
            dest="options",
            action=SetOptions,
            default={},
            metavar="NAME=VALUE",
            help="options of that format, separated by commas; vmconv formats and vmconv machine formats list them",
        ),
        parser.add_argument(
            "--target",
            metavar="NAME",
            help="name of the file to make, or of the directory for a machine (default: by the node's policy)",
        ),
        parser.add_argument(
            "--target-datastore", metavar="NAME", help="datastore of the target (default: beside the source)"
        ),
        parser.add_argument("--zero-copy", choices=("auto", "require"), help="require: fail instead of copying"),
        parser.add_argument(
            "--remove-source",
            dest="keep_source",
            action="store_const",
            const=False,
            help="remove the disk afterwards, if the node's policy allows it",
        ),
        parser.add_argument("--max-parallel", type=int, metavar="N", help="limit of parallel conversions on each node"),
        parser.add_argument("--between", type=window, metavar="WINDOW", help=f"begin within these times, {_WINDOW}"),
        parser.add_argument("--dry-run", action="store_const", const=True, help="only plan, make nothing"),
    ]
    what.add_argument(
        "-O", dest="machine_format", metavar="FMT", help="machine format to convert whole virtual machines to"
    )
    machine = [
        parser.add_argument("--disk-format", metavar="FMT", help="with -O: format of the new disks (default: its own)"),
        parser.add_argument(
            "--disk-options",
            action=SetOptions,
            default={},
            metavar="NAME=VALUE",
            help="with -O: options of the disks' format, separated by commas",
        ),
        parser.add_argument(
            "--strict", action="store_const", const=True, help="with -O: fail rather than lose a setting"
        ),
        parser.add_argument(
            "--keep",
            action="append",
            metavar="FIELD",
            help="with -O: fail rather than lose this field, such as tpm or nics.mac; may be repeated",
        ),
        parser.add_argument(
            "--uuid",
            choices=("guest", "text"),
            help="with -O: the UUID that the guest reads, or the one that the configuration shows (default: guest)",
        ),
        parser.add_argument(
            "--new-identity",
            action="store_const",
            const=True,
            help="with -O: give the machine a new UUID and new MAC addresses, for a clone",
        ),
    ]
    parser.set_defaults(spec=tuple(one.dest for one in spec), machine_spec=tuple(one.dest for one in machine))
    parser.add_argument("--at", metavar="TIME", help="begin at HH:MM of this machine's clock, or YYYY-MM-DDTHH:MM")
    parser.add_argument("--follow", action="store_true", help="wait until all have ended, with progress")
    parser.add_argument("--id", metavar="ID", help="id of the request: the same id again is the same request")
    _asking(parser)


def _job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB", help="a job's id, or its beginning")
    _asking(parser)


def _watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kinds", default="", metavar="KINDS", help="only these kinds of records, separated by commas")
    _reading(parser)


def _retire(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("retired", metavar="NODE", help="its name, id, or the beginning of its id")
    parser.add_argument("--reason", default="", metavar="TEXT", help="why")
    parser.add_argument(
        "--authority",
        metavar="NODE",
        help="a node with the fleet's authority (default: this one, or the nearest)",
    )
    _asking(parser)


def _scan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scanned", nargs="?", metavar="NODE", help="the node to scan (default: this one)")
    parser.add_argument("--datastore", metavar="NAME", help="only this one")
    _asking(parser)


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", metavar="FILE", help="file to write (default: standard output)")
    _reading(parser)


def _audit(parser: argparse.ArgumentParser) -> None:
    for name, what in (("since", "the first moment (default: the oldest)"), ("until", "the end (default: now)")):
        parser.add_argument(
            f"--{name}", metavar="TIME", help=f"{what}: YYYY-MM-DD or YYYY-MM-DDTHH:MM by this machine's clock"
        )
    _reading(parser)


def _datastore(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, title="actions")
    add = actions.add_parser("add", help="declare a directory of this node as a datastore", formatter_class=formatter)
    add.add_argument("name", metavar="NAME", help="name of the datastore")
    add.add_argument("path", metavar="DIR", help="the directory, on this machine, or swift://CLOUD/CONTAINER")
    _asking(add)
    remove = actions.add_parser(
        "remove", help="remove a datastore from the catalogue; its files stay", formatter_class=formatter
    )
    remove.add_argument("name", metavar="NAME", help="name of the datastore")
    give = actions.add_parser("give", help="give shared storage to another node", formatter_class=formatter)
    give.add_argument("--to", required=True, metavar="NODE", help="its new owner")
    appoint = actions.add_parser(
        "appoint", help="let other nodes convert the disks of shared storage", formatter_class=formatter
    )
    appoint.add_argument(
        "--nodes",
        required=True,
        type=none_or(names),
        metavar="NODE,NODE",
        help="these, and no others; none: only its owner",
    )
    take = actions.add_parser("take", help="take the storage of a retired node", formatter_class=formatter)
    for action in (appoint, give, take):
        action.add_argument("name", metavar="NAME", help="name of the datastore")
    for action in (remove, appoint, give, take):
        action.add_argument("--of", metavar="NODE", help="the datastore's node (default: this one)")
        _asking(action)


def _token(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, title="actions")
    create = actions.add_parser("create", help="create a token; it is shown once", formatter_class=formatter)
    create.add_argument("label", metavar="LABEL", help="name of its holder")
    create.add_argument("--role", choices=("viewer", "operator", "admin"), default="viewer", help="(default: viewer)")
    create.add_argument(
        "--datastore",
        dest="datastores",
        action="append",
        metavar="[NODE:]NAME",
        help="the role applies to this datastore alone, and its holder is a viewer elsewhere; may be repeated",
    )
    create.add_argument("--days", type=float, metavar="N", help="days until it expires (default: until it is revoked)")
    _asking(create)
    revoke = actions.add_parser("revoke", help="revoke a token", formatter_class=formatter)
    revoke.add_argument("id", metavar="ID", help="the token's id, as listed")
    _asking(revoke)
    _reading(actions.add_parser("list", help="list tokens and their roles", formatter_class=formatter))


def _webhook(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, title="actions")
    add = actions.add_parser(
        "add", help="send events of the node to a URL; shows the secret once", formatter_class=formatter
    )
    add.add_argument("url", metavar="URL", help="where to send them: https://HOST[:PORT]/PATH")
    add.add_argument(
        "--events",
        metavar="TYPES",
        help="types, separated by commas, with * for a part, such as job.*\n"
        "(default: job.done,job.failed,job.cancelled,*.problem,*.well)",
    )
    add.add_argument("--secret-file", metavar="FILE", help="file with a secret, whsec_..., instead of a new one")
    add.add_argument("--allow-http", action="store_true", help="allow a URL of http, which is not encrypted")
    _asking(add)
    remove = actions.add_parser("remove", help="remove a webhook and its secret", formatter_class=formatter)
    test = actions.add_parser("test", help="send an event webhook.test now", formatter_class=formatter)
    for action in (remove, test):
        action.add_argument("id", metavar="ID", help="the webhook's id, as listed")
        _asking(action)
    _listing(actions.add_parser("list", help="list webhooks", formatter_class=formatter))


def _group(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, title="actions")
    change = actions.add_parser("set", help="give the people of a group a role", formatter_class=formatter)
    remove = actions.add_parser("remove", help="take a group's role", formatter_class=formatter)
    for action in (change, remove):
        action.add_argument("group", metavar="GROUP", help="the group, as the OpenID provider calls it")
        action.add_argument("--of", metavar="NODE", help="the node where its people sign in (default: this one)")
        _asking(action)
    change.add_argument("--role", choices=("viewer", "operator", "admin"), required=True, help="the role")
    change.add_argument(
        "--datastore",
        dest="datastores",
        action="append",
        metavar="[NODE:]NAME",
        help="the role applies to this datastore alone, and the group views the others; may be repeated",
    )
    _reading(actions.add_parser("list", help="list groups and their roles", formatter_class=formatter))


def _policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ruled", nargs="?", metavar="NODE", help="the node (default: this one)")
    parser.add_argument("--naming", metavar="TEXT", help="names of targets, from {stem}, {suffix}, {format}, {job}")
    parser.add_argument("--max-parallel", type=int, metavar="N", help="limit of parallel conversions")
    parser.add_argument(
        "--between", type=none_or(window), metavar="WINDOW", help=f"when conversions may begin, {_WINDOW}; none: always"
    )
    parser.add_argument(
        "--datastore-parallel",
        type=none_or(numbers(int)),
        metavar="NAME=N,NAME=N",
        help="limits of parallel conversions of datastores; none: no limits",
    )
    parser.add_argument(
        "--bandwidth",
        type=none_or(numbers(parse_size)),
        metavar="NAME=SIZE,NAME=SIZE",
        help="limits of bytes per second that conversions copy and write in datastores; none: no limits",
    )
    parser.add_argument("--zero-copy", choices=("auto", "require"), help="require: no conversion copies payload")
    parser.add_argument("--may-remove-source", choices=("yes", "no"), help="whether jobs may remove sources")
    parser.add_argument("--formats", metavar="FMT,FMT", help="formats that may be written; all: any format")
    parser.add_argument("--keep-days", type=int, metavar="N", help="days to keep ended jobs and the history")
    parser.add_argument("--keep-records", type=int, metavar="N", help="limit of ended jobs, and of transactions")
    parser.add_argument(
        "--administrators-of", metavar="NODE,NODE", help="nodes whose administrators are accepted; all: any node"
    )
    _asking(parser)


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--directory", default=None, metavar="DIR", help="where to make the nodes (default: a temporary one)"
    )
    parser.add_argument("--size", default="64M", metavar="SIZE", help="size of the disk (default: 64M)")
    parser.add_argument("--keep", action="store_true", help="leave the nodes running until ^C, to look at the console")


VERBS = {
    "nodes": _Verb("list the nodes: state, age of the last heartbeat, records behind", "listing", _reading),
    "datastores": _Verb("list the datastores", "listing", _listing),
    "disks": _Verb("list disk images", "listing", _disks),
    "vms": _Verb("list virtual machines", "listing", _vms),
    "jobs": _Verb("list conversions", "listing", _jobs),
    "requests": _Verb("list requests and their responses", "listing", _newest),
    "history": _Verb("list executed transactions: caller, records before and after", "listing", _newest),
    "convert": _Verb("convert disks or whole virtual machines, on any node", "converting", _convert),
    "cancel": _Verb("cancel a conversion", "changing", _job),
    "scan": _Verb("scan a node's datastores", "changing", _scan),
    "datastore": _Verb("declare datastores of this node, or remove them from the catalogue", "changing", _datastore),
    "policy": _Verb("show and change how a node converts", "changing", _policy),
    "token": _Verb("create, list and revoke tokens for people and programs", "changing", _token),
    "webhook": _Verb("add, list, remove and test webhooks for events of a node", "webhooks", _webhook),
    "group": _Verb("give roles to groups of people who sign in at an OpenID provider", "groups", _group),
    "retire": _Verb("remove a node from the fleet permanently", "changing", _retire),
    "watch": _Verb("print changes of the fleet as they arrive", "watching", _watch),
    "export": _Verb("print all records, one on each line", "watching", _export),
    "audit": _Verb("print each request with its caller and its result, the oldest first", "auditing", _audit),
    "doctor": _Verb("report the problems of the fleet, as this node sees them", "doctor", _reading),
    "demo": _Verb("run a fleet of three nodes on this machine, with conversions and a partition", "demo", _demo),
}

COMMAND = Command(
    name="fleet",
    help="show and change a fleet of nodes",
    description="Shows the nodes, disks and conversions of a fleet, and requests changes of them, from any node.",
    configure=_configure,
    run=_run,
    epilog="""exit status:
  0  done, or requested
  1  refused, failed, or no node is reachable
  2  the request is not valid

examples:
  vmconv fleet disks --select 'format=vmdk and size>=10G'
  vmconv fleet convert n02:web.vmdk --to qcow2 --follow
  vmconv fleet convert n02:web.vmx -O libvirt --dry-run
  vmconv fleet convert --select 'os=debian* and node=n02' -O libvirt --dry-run
  vmconv fleet convert --select 'format=vmdk and node=n0*' --to qcow2 --max-parallel 4 --at 22:00 --dry-run""",
)
