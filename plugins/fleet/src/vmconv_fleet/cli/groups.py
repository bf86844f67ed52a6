"""`vmconv fleet group`: roles of groups of people."""

from __future__ import annotations

import argparse
from typing import Any

from vmconv.plugin import UsageError, print_json, print_table
from vmconv_fleet.cli.changing import names_of, own_node, said
from vmconv_fleet.cli.client import NodeClient
from vmconv_fleet.cli.connecting import connected
from vmconv_fleet.words import cell, role_text


def group(options: argparse.Namespace) -> int:
    with connected(options) as client:
        if options.action == "list":
            return _list(options, client)
        if options.action == "remove":
            return _remove(options, client)
        wish: dict[str, Any] = {"group": options.group, "role": options.role}
        if options.datastores:
            wish["datastores"] = options.datastores
        if options.of:
            wish["node"] = options.of
        reply = client.call("POST", "/api/v1/groups", wish, query={"wait": options.wait})
    return said(options, reply, f"group {options.group} has the role {options.role}")


def _remove(options: argparse.Namespace, client: NodeClient) -> int:
    node = options.of or own_node(client)
    ids = [one["id"] for one in client.everything("/api/v1/groups", node=node) if one["body"]["group"] == options.group]
    if not ids:
        raise UsageError(f"group {options.group!r} has no role at this node", hint="vmconv fleet group list")
    reply = client.call("DELETE", f"/api/v1/groups/{node}/{ids[0]}", query={"wait": options.wait})
    return said(options, reply, f"group {options.group} has no role any more")


def _list(options: argparse.Namespace, client: NodeClient) -> int:
    items = client.everything("/api/v1/groups")
    if options.output == "json":
        print_json(items, indent=4)
        return 0
    names = names_of(client)
    rows = [
        [one["node"], one["body"]["group"], role_text(one["body"], lambda node: names.get(node, node))] for one in items
    ]
    print_table([["NODE", "GROUP", "ROLE"], *([cell(text) for text in row] for row in sorted(rows))])
    return 0
