"""Verbs that request a change."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from vmconv.plugin import UsageError, print_json, print_table
from vmconv_fleet.catalogue.places import is_container
from vmconv_fleet.cli.client import NodeClient, Reply
from vmconv_fleet.cli.connecting import connected, job_named, only, refuse_refused
from vmconv_fleet.cli.values import NONE
from vmconv_fleet.words import cell, role_text, time_text

_MAX_DAYS = 3650
"""The longest life of a token."""


def said(options: argparse.Namespace, reply: Reply, done: str) -> int:
    """Prints the answer to a request."""
    content = refuse_refused(reply)
    if options.output == "json":
        print_json(content, indent=4)
    elif content.get("ok"):
        print(f"{done} (transaction {content.get('transaction')})")
    else:
        print(f"requested: request {content['request']}; its owner has not answered yet")
    return 0


def cancel(options: argparse.Namespace) -> int:
    with connected(options) as client:
        job = job_named(client, options.job)
        reply = client.call("POST", f"/api/v1/jobs/{job['owner']}/{job['id']}/cancel", query={"wait": options.wait})
    return said(options, reply, f"job {job['id']}: cancelled")


def scan(options: argparse.Namespace) -> int:
    body = {"datastore": options.datastore} if options.datastore else {}
    with connected(options) as client:
        node = options.scanned or own_node(client)
        reply = client.call("POST", f"/api/v1/nodes/{node}/scan", body, query={"wait": options.wait})
    return said(options, reply, "scan begun")


def own_node(client: NodeClient) -> str:
    """Returns the id of the node that is asked."""
    return str(client.get("/api/v1/fleet")["node"])


def datastore(options: argparse.Namespace) -> int:
    with connected(options) as client:
        if options.action == "add":
            path = options.path if is_container(options.path) else os.path.abspath(options.path)
            reply = client.call("POST", "/api/v1/datastores", {"name": options.name, "path": path})
            return said(options, reply, f"datastore {options.name} is {path}")
        owner = options.of or own_node(client)
        if options.action == "appoint":
            nodes = [] if options.nodes == NONE else options.nodes
            path = f"/api/v1/datastores/{owner}/{options.name}/converters"
            reply = client.call("PUT", path, {"nodes": nodes}, query={"wait": options.wait})
            others = f" and {', '.join(nodes)}" if nodes else ""
            return said(options, reply, f"datastore {options.name} is converted by its owner{others}")
        if options.action in ("give", "take"):
            body = {"to": options.to} if options.action == "give" else None
            path = f"/api/v1/datastores/{owner}/{options.name}/{options.action}"
            reply = client.call("POST", path, body, query={"wait": options.wait})
            return said(options, reply, f"datastore {options.name} changes its owner")
        reply = client.call("DELETE", f"/api/v1/datastores/{owner}/{options.name}", query={"wait": options.wait})
    return said(options, reply, f"datastore {options.name} is removed from the catalogue; its files stay")


def policy(options: argparse.Namespace) -> int:
    wish = _wished(options)
    with connected(options) as client:
        node = options.ruled or own_node(client)
        if wish.get("administrators_of"):
            nodes = (client.get(f"/api/v1/nodes/{quote(named, safe='')}") for named in wish["administrators_of"])
            wish["administrators_of"] = [one["node"] for one in nodes]
        if wish:
            reply = client.call("PATCH", f"/api/v1/nodes/{node}/policy", wish, query={"wait": options.wait})
            return said(options, reply, "policy changed")
        items = client.everything("/api/v1/policies", node=node)
    body = items[0]["body"] if items else {}
    if options.output == "json":
        print_json(body, indent=4)
    elif body:
        print_table([[name, cell(value)] for name, value in body.items()])
    else:
        print("no policy of its own: sources are kept, two conversions at a time, any format")
    return 0


def _wished(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the rules that the options change."""
    wish: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("naming", "max_parallel", "zero_copy", "keep_days", "keep_records")
        if getattr(options, name) is not None
    }
    if options.may_remove_source is not None:
        wish["may_remove_source"] = options.may_remove_source == "yes"
    for name, nothing in (("between", None), ("datastore_parallel", {}), ("bandwidth", {})):
        value = getattr(options, name)
        if value is not None:
            wish[name] = nothing if value == NONE else value
    for name in ("formats", "administrators_of"):
        value = getattr(options, name)
        if value is not None:
            wish[name] = None if value == "all" else value.split(",")
    return wish


def token(options: argparse.Namespace) -> int:
    with connected(options) as client:
        if options.action == "list":
            return _list_tokens(options, client.everything("/api/v1/tokens"), names_of(client))
        if options.action == "create":
            return _create_token(options, client)
        found = [one for one in client.everything("/api/v1/tokens") if one["id"] == options.id]
        one = only(found, options.id, "token")
        reply = client.call("DELETE", f"/api/v1/tokens/{one['owner']}/{one['id']}", query={"wait": options.wait})
    return said(options, reply, f"token {options.id} is revoked")


def _create_token(options: argparse.Namespace, client: NodeClient) -> int:
    wish = {"label": options.label, "role": options.role}
    if options.datastores:
        wish["datastores"] = options.datastores
    if options.days is not None:
        if not 0 < options.days <= _MAX_DAYS:
            raise UsageError(f"--days {options.days:g}: more than 0 and at most {_MAX_DAYS} is allowed")
        wish["ttl_s"] = options.days * 86400
    content = refuse_refused(client.call("POST", "/api/v1/tokens", wish))
    if options.output == "json":
        print_json(content, indent=4)
    else:
        print(content["token"])
    return 0


def names_of(client: NodeClient) -> dict[str, str]:
    """Returns the names of nodes by their ids."""
    return {one["node"]: one["name"] for one in client.everything("/api/v1/nodes")}


def _list_tokens(options: argparse.Namespace, items: list[dict[str, Any]], names: Mapping[str, str]) -> int:
    if options.output == "json":
        print_json(items, indent=4)
        return 0
    rows = [["ID", "LABEL", "ROLE", "MADE", "VALID UNTIL", "NODE"]]
    for one in items:
        body = one["body"]
        until = time_text(body["expires_ms"]) if body.get("expires_ms") else "without end"
        if body.get("revoked"):
            until = "revoked"
        made = time_text(body.get("created_ms"))
        role = role_text(body, lambda node: names.get(node, node))
        rows.append([cell(text) for text in (one["id"], body["label"], role, made, until, one["node"])])
    print_table(rows)
    return 0


def retire(options: argparse.Namespace) -> int:
    body = {"reason": options.reason} | ({"authority": options.authority} if options.authority else {})
    with connected(options) as client:
        reply = client.call("POST", f"/api/v1/nodes/{options.retired}/retire", body, query={"wait": options.wait})
    return said(options, reply, f"{options.retired} is retired")
