"""`vmconv fleet webhook`: webhooks for events of a node."""

from __future__ import annotations

import argparse
from typing import Any

from vmconv.plugin import VmconvError, os_errors, print_json, print_table
from vmconv_fleet.cli.changing import said
from vmconv_fleet.cli.client import NodeClient
from vmconv_fleet.cli.connecting import connected, only, refuse_refused
from vmconv_fleet.words import cell, time_text


def webhook(options: argparse.Namespace) -> int:
    with connected(options) as client:
        if options.action == "list":
            return _list(options, client.everything("/api/v1/webhooks", node=options.of))
        if options.action == "add":
            return _add(options, client)
        found = [one for one in client.everything("/api/v1/webhooks") if one["id"] == options.id]
        one = only(found, options.id, "webhook")
        path = f"/api/v1/webhooks/{one['owner']}/{one['id']}"
        if options.action == "test":
            return _test(options, client.call("POST", f"{path}/test").content)
        return said(
            options, client.call("DELETE", path, query={"wait": options.wait}), f"webhook {one['id']} is removed"
        )


def _add(options: argparse.Namespace, client: NodeClient) -> int:
    wish: dict[str, Any] = {"url": options.url, "allow_http": options.allow_http}
    if options.events:
        wish["events"] = options.events.split(",")
    if options.secret_file:
        with os_errors("cannot be read"), open(options.secret_file, encoding="utf-8") as file:
            wish["secret"] = file.read(1000).strip()
    content = refuse_refused(client.call("POST", "/api/v1/webhooks", wish))
    if options.output == "json":
        print_json(content, indent=4)
    else:
        print(f"webhook {content['webhook']}\nsecret {content['secret']}")
    return 0


def _test(options: argparse.Namespace, content: dict[str, Any]) -> int:
    if not content["ok"]:
        raise VmconvError(f"webhook {options.id}: {content['problem']}")
    if options.output == "json":
        print_json(content, indent=4)
    else:
        print(f"webhook {options.id}: the receiver has accepted the event webhook.test")
    return 0


def _list(options: argparse.Namespace, items: list[dict[str, Any]]) -> int:
    if options.output == "json":
        print_json(items, indent=4)
        return 0
    rows = [["ID", "NODE", "SENDS TO", "EVENTS", "MADE"]]
    for one in items:
        body = one["body"]
        events = ",".join(body.get("events", ())) or "the usual"
        made = time_text(body.get("created_ms"))
        rows.append([cell(text) for text in (one["id"], one["node"], body["place"], events, made)])
    print_table(rows)
    return 0
