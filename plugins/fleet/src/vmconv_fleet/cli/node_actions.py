"""The actions of `vmconv node`."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from vmconv.plugin import UsageError, os_errors, print_json, print_table
from vmconv_fleet import config as settings
from vmconv_fleet.config import ConfigError, NodeConfig, split_address
from vmconv_fleet.errors import FleetError
from vmconv_fleet.words import cell, trap_in


def init_node(options: argparse.Namespace) -> int:
    from vmconv_fleet.trust import credentials
    from vmconv_fleet.trust.addresses import local_addresses, names_of
    from vmconv_fleet.trust.authority import Authority
    from vmconv_fleet.trust.identity import Keys, new_node_id
    from vmconv_fleet.trust.names import permitted_by_default

    _name(options)
    if (
        trap_in(options.fleet)
        or not options.fleet.replace("-", "").isalnum()
        or len(options.fleet) > 63
        or not options.fleet.isascii()
    ):
        raise UsageError(f"{options.fleet!r} is not the name of a fleet", hint="letters, digits and -, 63 at most")
    directory = _fresh_directory(options)
    with _undone_on_failure(directory):
        stated = _stated_addresses(options)
        permitted = options.permit or permitted_by_default(stated or local_addresses())
        authority, keys, node = Authority.found(directory, options.fleet, permitted), Keys.generate(), new_node_id()
        config = _config(options, directory, options.fleet, node, [])
        request = keys.request(node, options.fleet, names_of(config))
        credentials.install(directory, keys, authority.issue(request, drops=not stated, name=config.name))
        settings.save(config)
        _mark_as_new(config)
    print(f"node {node} ({config.name}) created fleet {options.fleet} in {directory}")
    print(f"  next: vmconv node run --directory {directory}")
    return 0


def join_node(options: argparse.Namespace) -> int:
    from vmconv_fleet.links.peers import links_of
    from vmconv_fleet.trust import credentials, joining
    from vmconv_fleet.trust.addresses import local_addresses
    from vmconv_fleet.trust.authority import Invitation
    from vmconv_fleet.trust.identity import Keys, new_node_id, write_private

    invitation = Invitation.parse(options.invitation)
    # Before the invitation is used up.
    _name(options)
    directory = _fresh_directory(options)
    with _undone_on_failure(directory):
        keys, node = Keys.generate(), new_node_id()
        stated = _stated_addresses(options)
        names = stated or local_addresses()
        # The authority decides the fleet's name and puts it into the certificate.
        # Where it listens is known before the fleet's name is.
        links = links_of(_config(options, directory, "joining", node, []))
        request = keys.request(node, "joining", names)
        granted = joining.join(invitation, request, drops=not stated, name=_name(options), links=links)
        config = _config(options, directory, granted.fleet, node, [invitation.address], granted.seeds)
        write_private(config.path("ca.pem"), granted.authorities)
        credentials.keep_members(directory, [granted.members])
        credentials.install(directory, keys, granted.certificate)
        credentials.load(config)
        settings.save(config)
        _mark_as_new(config)
    print(f"node {node} ({config.name}) joined fleet {granted.fleet} in {directory}")
    print(f"  next: vmconv node run --directory {directory}")
    return 0


def run_node(options: argparse.Namespace) -> int:
    from vmconv_fleet.node.daemon import run
    from vmconv_fleet.node.logs import configure

    config = settings.load(_directory(options))
    configure(sys.stderr)
    return run(config, lambda _daemon: print(f"node {config.node} runs", flush=True))


def status_node(options: argparse.Namespace) -> int:
    from vmconv_fleet.node.lock import running
    from vmconv_fleet.node.marks import RESTORED
    from vmconv_fleet.trust import credentials

    config = settings.load(_directory(options))
    bound = credentials.load(config).bound
    beat = _last_heartbeat(config)
    found = {
        "directory": config.directory,
        "fleet": config.fleet,
        "node": config.node,
        "name": config.name,
        "process": running(config),
        "certificate-until": bound.not_after.isoformat(timespec="seconds"),
        "authority": os.path.exists(config.path(os.path.join("authority", "ca.key"))),
        "neighbours": beat.get("neighbours", []),
        "problems": beat.get("problems", []),
    }
    if options.output == "json":
        print_json(found, indent=2)
        return 0
    print(f"node {config.node} ({config.name}) of fleet {config.fleet}")
    print(f"  directory    {config.directory}")
    print(f"  runs         {'as process ' + str(found['process']) if found['process'] else 'no'}")
    print(f"  certificate  until {bound.not_after:%Y-%m-%d}")
    print(f"  authority    {'here' if found['authority'] else 'elsewhere'}")
    print(f"  neighbours   {', '.join(beat.get('neighbours', [])) or 'none'}")
    if os.path.exists(config.path(RESTORED)):
        print("  problem      the database is restored: vmconv fleet doctor shows the nodes that it waits for")
    for problem in beat.get("problems", []):
        print(f"  problem      {problem}")
    return 0


def invite_node(options: argparse.Namespace) -> int:
    from vmconv_fleet.trust.authority import Authority

    if not options.minutes > 0:
        raise UsageError(f"--minutes {options.minutes:g} must be more than 0")
    config = settings.load(_directory(options))
    print(Authority.load(config.directory).invite(config, lifetime=options.minutes * 60, host=options.address))
    return 0


def _reload(config: settings.NodeConfig) -> None:
    """Makes the node read its keys and authority again, if it runs."""
    from vmconv_fleet.node.lock import running

    if (process := running(config)) is not None:
        os.kill(process, signal.SIGHUP)


def renew_node(options: argparse.Namespace) -> int:
    from vmconv_fleet.trust import credentials

    config = settings.load(_directory(options))
    found = credentials.request_new(config, new_keys=options.new_keys)
    _reload(config)
    print(f"node {config.node} has a certificate until {found.bound.not_after:%Y-%m-%d}")
    return 0


def revoke_node(options: argparse.Namespace) -> int:
    from vmconv_fleet.cli.client import NodeClient

    config = settings.load(_directory(options))
    what = f"key {options.key} of node {options.node}" if options.key else f"node {options.node}"
    body = {"key_id": options.key} if options.key else {}
    with NodeClient(config.directory) as client:
        path = f"/api/v1/nodes/{quote(options.node, safe='')}/revoke"
        answer = client.call("POST", path, body, query={"wait": 10}).content
    if not answer.get("ok"):
        raise FleetError(f"{what} was not revoked: {answer.get('reason') or 'no answer yet'}")
    print(f"{what} is revoked")
    return 0


def keys_node(options: argparse.Namespace) -> int:
    from vmconv_fleet.cli.client import NodeClient

    config = settings.load(_directory(options))
    with NodeClient(config.directory) as client:
        found = client.get("/api/v1/keys", node=options.node)["items"]
    if options.output == "json":
        print_json(found, indent=2)
        return 0
    rows = [[one["name"], one["key"], one["state"], one["until"][:10]] for one in found]
    print_table([["NODE", "KEY", "STATE", "CERTIFICATE UNTIL"], *([cell(text) for text in row] for row in rows)])
    return 0


def authority_node(options: argparse.Namespace) -> int:
    from vmconv_fleet.trust.authority import Authority
    from vmconv_fleet.trust.identity import MAX_PEM, write_private

    config = settings.load(_directory(options))
    if options.direction == "export":
        if os.path.exists(options.file):
            raise UsageError(f"{options.file}: already exists")
        with os_errors("writing the authority's key", FleetError):
            write_private(options.file, Authority.load(config.directory).export())
        print(f"{options.file}: the authority of fleet {config.fleet}; its holder can admit nodes")
        return 0
    with os_errors("reading the authority's key", FleetError), open(options.file, "rb") as file:
        Authority.of_key(config.directory, file.read(MAX_PEM)).adopt()
    _reload(config)
    print(f"node {config.node} holds the authority of fleet {config.fleet}")
    return 0


def backup_node(options: argparse.Namespace) -> int:
    from vmconv_fleet.node.backup import write_backup

    config = settings.load(_directory(options))
    write_backup(config, options.file)
    print(f"{options.file}: backup of node {config.node} ({config.name}); its holder is this node")
    return 0


def restore_node(options: argparse.Namespace) -> int:
    from vmconv_fleet.node.backup import restore_backup

    directory = _fresh_directory(options)
    with _undone_on_failure(directory):
        config = restore_backup(options.file, directory)
    print(f"node {config.node} ({config.name}) of fleet {config.fleet} is restored in {directory}")
    print("  it writes again once it has heard from all other members, which may have its records since the backup")
    print(f"  next: vmconv node run --directory {directory}")
    return 0


def resume_node(options: argparse.Namespace) -> int:
    from vmconv_fleet.cli.client import NodeClient

    config = settings.load(_directory(options))
    with NodeClient(config.directory) as client:
        wish = {"without": options.without or [], "alone": options.alone, "merge": options.merge}
        answer = client.call("POST", "/api/v1/resume", wish).content
    if options.output == "json":
        print_json(answer, indent=2)
        return 0
    left = answer["waits_for"]
    print(f"node {config.node} " + (f"still waits for {', '.join(left)}" if left else "writes again"))
    if found := answer.get("overridden"):
        print(
            f"  {answer['overridden_count']} versions of records do not count, because both histories had changed them:"
        )
        rows = [[cell(text) for text in _overridden(one)] for one in found]
        print_table([["KIND", "ID", "NAME", "OF HISTORY", "LOST"], *rows], "  ")
        if more := answer["overridden_count"] - len(found):
            print(f"  and {more} more: compare merged.jsonl in the directory of the node")
    return 0


def _overridden(one: dict[str, Any]) -> tuple[str, ...]:
    lost = (
        "its deletion"
        if one["is_deletion"]
        else "all: it is deleted"
        if one["is_deleted"]
        else ", ".join(one["fields"])
    )
    return one["kind"], one["id"], one["name"], one["history"], lost


def leave_node(options: argparse.Namespace) -> int:
    from vmconv_fleet.node.lock import running
    from vmconv_fleet.trust import credentials, joining

    config = settings.load(_directory(options))
    if running(config) is not None:
        raise FleetError(f"{config.directory}: the node is running", hint="stop it first")
    if os.path.exists(config.path(os.path.join("authority", "ca.key"))) and not options.force:
        raise FleetError(
            f"{config.directory}: holds the fleet's authority",
            hint="copy it to another node first (vmconv node authority export), then --force",
        )
    if not options.force:
        joining.first_that_answers(credentials.authorities_of(config), lambda address: joining.leave(config, address))
    with os_errors("deleting the node", FleetError):
        shutil.rmtree(config.directory)
    print(f"node {config.node} has left fleet {config.fleet}; its disks are unchanged")
    return 0


def _mark_as_new(config: NodeConfig) -> None:
    """Notes that no other node can have records of this one yet."""
    from vmconv_fleet.node.marks import FOUNDED

    with open(config.path(FOUNDED), "w", encoding="ascii"):
        pass


def _directory(options: argparse.Namespace) -> str:
    return os.path.abspath(options.directory or settings.default_directory())


def _fresh_directory(options: argparse.Namespace) -> str:
    """Creates the directory of a new node, for its own user only."""
    directory = _directory(options)
    for path in getattr(options, "datastores", ()):
        if not os.path.isdir(path):
            raise UsageError(f"{path}: is not a directory")
    with os_errors("making the node's directory", ConfigError):
        os.makedirs(directory, 0o700, exist_ok=True)
        if os.listdir(directory):
            raise ConfigError(f"{directory}: is not empty", hint="one directory for each node: --directory")
        os.chmod(directory, 0o700)
    return directory


@contextlib.contextmanager
def _undone_on_failure(directory: str) -> Iterator[None]:
    """Empties the directory if the block fails, so that the command can be repeated."""
    try:
        yield
    except BaseException:
        for name in os.listdir(directory):
            path = os.path.join(directory, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        raise


def _stated_addresses(options: argparse.Namespace) -> list[str]:
    """Returns the given names and addresses, and loopback for administrators here; none if none are given."""
    return list(dict.fromkeys([*options.address, "127.0.0.1", "localhost"])) if options.address else []


def _name(options: argparse.Namespace) -> str:
    name = options.name or socket.gethostname()
    if problem := trap_in(name):
        raise UsageError(f"{name[:80]!r} is not the name of a node: it {problem}")
    return str(name)


def _config(
    options: argparse.Namespace,
    directory: str,
    fleet: str,
    node: str,
    authorities: list[str],
    connect: list[str] = [],  # noqa: B006
) -> NodeConfig:
    given = {name: getattr(options, name, None) for name in ("api", "join", "listen")}
    for address in filter(None, given.values()):
        split_address(address)
    if options.no_api:
        given["api"] = ""
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if options.listen is not None:
        chosen["listen"] = [options.listen]
    return NodeConfig(
        directory=directory,
        fleet=fleet,
        node=node,
        name=_name(options),
        addresses=_stated_addresses(options),
        authorities=authorities,
        connect=connect,
        datastores=_named(options.datastores),
        **chosen,
    )


def _named(paths: list[str]) -> dict[str, str]:
    """Returns directories by the last parts of their names, numbered where these are equal."""
    found: dict[str, str] = {}
    for path in map(os.path.abspath, paths):
        base = re.sub("[^A-Za-z0-9._-]", "-", os.path.basename(path)).lstrip("._-") or "disks"
        name, number = base, 2
        while found.get(name, path) != path:
            name, number = f"{base}-{number}", number + 1
        found[name] = path
    return found


def _last_heartbeat(config: NodeConfig) -> dict[str, Any]:
    from vmconv_fleet.replication.database import open_reader
    from vmconv_fleet.replication.store import Reader

    if not os.path.exists(config.database):
        return {}
    reader = Reader(open_reader(config.database))
    try:
        record = reader.get(config.node, "heartbeat", config.node)
        return dict(record.body) if record else {}
    finally:
        reader.close()
