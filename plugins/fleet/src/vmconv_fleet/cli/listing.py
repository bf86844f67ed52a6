"""Verbs that list records."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from textwrap import indent
from typing import Any

from vmconv.plugin import size_text
from vmconv_fleet.catalogue.differences import differences
from vmconv_fleet.catalogue.places import is_container
from vmconv_fleet.cli.client import NodeClient
from vmconv_fleet.cli.connecting import connected
from vmconv_fleet.words import age_text, cell, plan_text, progress_text, soon_text, time_text

Item = dict[str, Any]


def _print(
    options: argparse.Namespace, pages: Iterable[list[Item]], head: Sequence[str], row: Callable[[Item], list[str]]
) -> int:
    """Prints pages of items as they arrive; the first one decides how wide the columns of a table are."""
    if options.output == "json":
        _print_array(item for page in pages for item in page)
        return 0
    rows: list[list[str]] = [list(head)]
    widths = [0] * len(head)
    for page in pages:
        rows += [[cell(text) for text in row(one)] for one in page]
        widths = [max(width, *(len(one[n]) for one in rows)) for n, width in enumerate(widths)] if rows else widths
        for one in rows:
            print("  ".join(text.ljust(width) for text, width in zip(one, widths, strict=True)).rstrip())
        rows = []
    return 0


def _print_array(items: Iterable[Item]) -> None:
    """Prints a JSON array item by item."""
    separator = "["
    for item in items:
        print(f"{separator}\n{indent(json.dumps(item, indent=4), '    ')}", end="")
        separator = ","
    print("[]" if separator == "[" else "\n]", flush=True)


def _unseen(options: argparse.Namespace, client: NodeClient) -> None:
    """Prints the age of the records of unreachable nodes."""
    if options.output == "json":
        return
    for one in client.get("/api/v1/fleet")["unseen"]:
        print(f"{cell(one['name'])} is unreachable: its records are {age_text(one['age_ms'])} old")


def nodes(options: argparse.Namespace) -> int:
    with connected(options) as client:
        items = client.get("/api/v1/nodes")["items"]
    return _print(options, [items], ["NODE", "STATE", "HEARD", "BEHIND", "AT", "ID"], _node_row)


def _node_row(one: Item) -> list[str]:
    heard = "-" if one["state"] == "here" else age_text(one["age_ms"])
    behind = "-" if one["age_ms"] is None else str(one["lag"])
    name = one["name"] + (f" (claims {one['claims']})" if one.get("claims") else "")
    name += "" if one["state"] == "retired" or one.get("has_record", True) else " (no record)"
    return [name, one["state"], heard, behind, one["position"].rpartition(".")[2], one["node"]]


def datastores(options: argparse.Namespace) -> int:
    with connected(options) as client:
        pages = client.pages("/api/v1/datastores", **_query(options))
        head = ["NODE", "DATASTORE", "FILESYSTEM", "SHARES", "FREE", "DISKS", "PATH"]
        return _print(options, pages, head, _datastore_row)


def _datastore_row(one: Item) -> list[str]:
    body = one["body"]
    shares = any(capabilities.get("unit") for capabilities in body.get("backends", {}).values())
    return [
        one["node"],
        one["id"],
        body.get("problem") or body.get("filesystem", ""),
        "yes" if shares else "no",
        "-" if is_container(body["path"]) else size_text(body.get("free", 0)),
        str(body.get("disks", 0)),
        body["path"],
    ]


def _query(options: argparse.Namespace, *names: str) -> dict[str, str]:
    """Returns the given options among these, and the node, as a query."""
    found = {name: getattr(options, name) for name in names} | {"node": options.of}
    return {name: value for name, value in found.items() if value}


def disks(options: argparse.Namespace) -> int:
    query = _query(options, "select", "search", "sort")
    with connected(options) as client:
        pages = client.pages("/api/v1/disks", **query)
        _print(
            options, pages, ["ID", "NODE", "DATASTORE", "FORMAT", "SIZE", "ON DISK", "CHAIN", "NOTE", "NAME"], _disk_row
        )
        _unseen(options, client)
    return 0


def _disk_row(one: Item) -> list[str]:
    body = one["body"]
    note = "unreadable" if body.get("problem") else "in use" if body.get("in_use") else ""
    return [
        one["id"],
        one["node"],
        body["datastore"],
        body.get("format", ""),
        size_text(body.get("virtual_size", 0)),
        size_text(body.get("actual_size", 0)),
        str(len(body.get("chain", ()))),
        note,
        body["name"],
    ]


def vms(options: argparse.Namespace) -> int:
    with connected(options) as client:
        pages = client.pages("/api/v1/vms", **_query(options, "select", "search", "sort"))
        return _print(options, pages, ["ID", "NODE", "VM", "FORMAT", "SYSTEM", "CPUS", "MEMORY", "DISKS"], _vm_row)


def _vm_row(one: Item) -> list[str]:
    body = one["body"]
    memory = size_text(body["memory"]) if body.get("memory") else ""
    processors = str(body.get("processors") or "")
    what = [body["name"], body.get("format", ""), body.get("system", ""), processors, memory]
    return [one["id"], one["node"], *what, f"unreadable: {body['problem']}" if body.get("problem") else _vm_disks(body)]


def _vm_disks(body: Item) -> str:
    """Returns the disks of a machine by name, with a note for a file that is in no datastore."""
    here = body.get("packaged")
    return ", ".join(
        (disk["name"] or "empty disk") + ("" if here or disk.get("disk") or not disk["name"] else " (not here)")
        for disk in body.get("disks", ())
    )


def jobs(options: argparse.Namespace) -> int:
    query = _query(options, "search", "batch") | ({"states": options.state} if options.state else {})
    with connected(options) as client:
        pages = client.pages("/api/v1/jobs", **query)
        _print(options, pages, ["JOB", "NODE", "STATE", "DONE", "TO", "PLAN", "DISK"], _job_row)
        _unseen(options, client)
    return 0


def _job_row(one: Item) -> list[str]:
    body = one["body"]
    state = body["state"] + (" (dry run)" if body.get("dry_run") else "")
    if one.get("waits_until_ms"):
        state += f" (waits for {soon_text(one['waits_until_ms'])})"
    if one.get("waits_forever"):
        state += " (its window and the node's never overlap)"
    name = body.get("source", "") + (f" -> {body['file']}" if body.get("file") else "")
    if body.get("error"):
        name += f": {body['error']}"
    return [one["id"], one["node"], state, progress_text(body), body["format"], plan_text(body.get("plan")), name]


def _latest(options: argparse.Namespace, path: str) -> list[Item]:
    query = {"limit": min(max(options.limit, 1), 1000), "scans": options.scans, **_query(options)}
    with connected(options) as client:
        items: list[Item] = client.get(path, **query)["items"]
    return items


def requests(options: argparse.Namespace) -> int:
    items = _latest(options, "/api/v1/requests")
    return _print(options, [items], ["REQUEST", "ASKED", "BY", "OF", "VERB", "ANSWER"], _request_row)


def _request_row(one: Item) -> list[str]:
    body, answer = one["body"], one["answer"]
    said = answer.get("reason") or (
        f"transaction {answer['transaction']}" if answer.get("transaction") else answer["state"]
    )
    late = " (late)" if answer.get("late") else ""
    who = f"{body['by'].get('user') or 'somebody'} at {one['node']}"
    return [one["id"], time_text(one["written_ms"]), who, body["target"][:8], body["verb"], said + late]


def history(options: argparse.Namespace) -> int:
    items = _latest(options, "/api/v1/transactions")
    if options.output == "json":
        return _print(options, [items], [], lambda _one: [])
    for one in items:
        body = one["body"]
        who = (body.get("by") or {}).get("user") or "somebody"
        late = ", late" if body.get("late") else ""
        when = time_text(body.get("at_ms"))
        # Nodes of an earlier version state no summary.
        what = one.get("summary") or str(body.get("verb"))
        print(f"{cell(one['node'])} {body['number']}  {when}  {cell(what)} by {cell(who)}{late}")
        for change in body.get("changes", ()):
            _print_change(change)
    return 0


def _print_change(change: Item) -> None:
    verb = "new" if change.get("before") is None else "gone" if change.get("after") is None else "changed"
    print(f"    {cell(change['kind'])} {cell(change['id'])}: {verb}")
    if verb != "gone":
        for one in differences(change.get("before"), change.get("after")):
            print(f"        {cell(one.field)}: {cell(one.before)} -> {cell(one.after)}")
