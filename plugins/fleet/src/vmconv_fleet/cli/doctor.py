"""`vmconv fleet doctor`: the problems of the fleet, as one node sees them."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from vmconv.plugin import print_json
from vmconv_fleet.cli.client import NodeClient
from vmconv_fleet.cli.connecting import connected
from vmconv_fleet.words import age_text, cell

_UNANSWERED_MS = 60_000
_LITTLE_SPACE = 0.05
_UNRECORDED = "look at its log, or start it; vmconv fleet retire NODE, if it never comes"
_RESUME = "if one is lost, vmconv node resume --without NODE, or --alone"


class Diagnosis(NamedTuple):
    """A problem, or only a note (`is_wrong` False)."""

    where: str
    what: str
    is_wrong: bool = True


def doctor(options: argparse.Namespace) -> int:
    with connected(options) as client:
        found = list(_findings(client))
    wrong = [one for one in found if one.is_wrong]
    if options.output == "json":
        print_json([one._asdict() for one in found], indent=4)
    else:
        for one in found:
            print(f"{'WRONG' if one.is_wrong else 'note '}  {cell(one.where)}: {cell(one.what)}")
        print(f"{len(wrong)} problems" if wrong else "no problems")
    return 1 if wrong else 0


def _findings(client: NodeClient) -> Iterator[Diagnosis]:
    fleet = client.get("/api/v1/fleet")
    here = fleet["name"]
    if fleet.get("waits_for"):
        names = ", ".join(fleet["waits_for"])
        yield Diagnosis(here, f"has a restored database, and writes again once it has heard from {names}: {_RESUME}")
    elif not fleet["serving"] and not fleet.get("forked"):
        yield Diagnosis(here, "cannot write yet: it recovers its own records from its neighbours")
    if fleet["cut"]:
        yield Diagnosis(here, "is disconnected from the others by its administrator")
    yield from (Diagnosis(here, text) for text in fleet["problems"])
    nodes = client.get("/api/v1/nodes")["items"]
    yield from _of_nodes(nodes)
    yield from _of_datastores(client)
    yield from _of_work(client, {one["node"] for one in nodes if one["state"] == "retired"})


def _of_nodes(nodes: list[dict[str, Any]]) -> Iterator[Diagnosis]:
    schemas = {one["body"].get("schema_revision") for one in nodes} - {None}
    if len(schemas) > 1:
        yield Diagnosis(
            "fleet", f"schema revisions {', '.join(map(str, sorted(schemas)))}: nodes are being upgraded", False
        )
    names = Counter(one["name"] for one in nodes if one["state"] != "retired")
    yield from (Diagnosis(name, f"is the name of {n} nodes") for name, n in names.items() if n > 1)
    for one in nodes:
        if one.get("claims") and one["state"] != "retired":
            yield Diagnosis(one["name"], f"calls itself {one['claims']}, which is not its name: {one['node']}")
        # Older nodes do not say it.
        is_recorded = one.get("has_record", True)
        if not is_recorded and one["state"] not in ("here", "retired"):
            yield Diagnosis(one["name"], f"is a member without a valid record of itself: {_UNRECORDED}")
        if one["state"] == "silent" and is_recorded:
            yield Diagnosis(one["name"], f"is unreachable: its records are {age_text(one['age_ms'])} old")
        elif one["state"] in ("up", "forked"):
            yield from (Diagnosis(one["name"], text) for text in one["problems"])


def _of_datastores(client: NodeClient) -> Iterator[Diagnosis]:
    for one in client.everything("/api/v1/datastores"):
        body, where = one["body"], f"{one['node']} datastore {one['id']}"
        if body.get("problem"):
            yield Diagnosis(where, body["problem"])
        if body.get("size") and body["free"] < _LITTLE_SPACE * body["size"]:
            yield Diagnosis(where, f"{body['free'] / body['size']:.1%} of it is free")
    unreadable = client.everything("/api/v1/disks", select="problem")
    yield from (Diagnosis(f"{one['node']} disk {one['id']}", one["body"]["problem"], False) for one in unreadable)


def _of_work(client: NodeClient, retired: Collection[str]) -> Iterator[Diagnosis]:
    now = int(time.time() * 1000)
    for one in client.everything("/api/v1/requests", unanswered=True):
        # A retired node will never answer; its requests are pruned with the others.
        if now - one["written_ms"] > _UNANSWERED_MS and one["body"]["target"] not in retired:
            age = age_text(now - one["written_ms"])
            yield Diagnosis(f"request {one['id']}", f"its owner {one['body']['target'][:8]} has not answered for {age}")
    for one in client.everything("/api/v1/jobs", states="queued"):
        if one.get("waits_forever"):
            what = (
                "never begins, because its window and that of its node do not overlap: change the policy, or cancel it"
            )
            yield Diagnosis(f"{one['node']} job {one['id']}", what)
    failed = Counter(one["node"] for one in client.everything("/api/v1/jobs", states="failed"))
    yield from (
        Diagnosis(node, f"{n} jobs have failed: vmconv fleet jobs --state failed", False) for node, n in failed.items()
    )
