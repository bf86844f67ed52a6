"""The node that a command talks to, and lookups by name."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from typing import Any

from vmconv.plugin import UsageError, VmconvError, os_errors
from vmconv_fleet.cli.client import TOKEN, NodeClient, Reply

_LISTED_BY = {"token": "token list", "webhook": "webhook list"}
"""The commands that list a kind, where it is not the kind's plural."""


def connected(options: argparse.Namespace) -> NodeClient:
    """Returns a client of the node that the options name."""
    from vmconv_fleet.config import default_directory

    where = options.node or default_directory()
    if "://" not in where:
        return NodeClient(where)
    token = os.environ.get(TOKEN)
    if options.token_file:
        with os_errors("cannot be read"), open(options.token_file, encoding="utf-8") as file:
            token = file.read().strip()
    return NodeClient(where, ca=options.ca, token=token)


def only(found: Sequence[dict[str, Any]], named: str, kind: str) -> dict[str, Any]:
    """Returns the only match. Raises UsageError for none or several."""
    if not found:
        raise UsageError(f"no {kind} {named!r}", hint=f"vmconv fleet {_LISTED_BY.get(kind, f'{kind}s')} lists them")
    if len(found) > 1:
        ids = ", ".join(f"{one['node']}:{one['id']}" for one in found[:5])
        raise UsageError(f"{named!r} is not one {kind} but {len(found)}: {ids}", hint="name it by its id")
    return found[0]


_NAMES = {"disk": ("name",), "vm": ("file", "name")}
"""The fields of a kind that name a record, after the node's name and a colon."""


def source_named(client: NodeClient, kind: str, named: str) -> dict[str, Any]:
    """Returns the disk or machine with this id, unique beginning of an id, or name: NODE:NAME, or NODE:FILE."""
    node, _, name = named.partition(":")
    select = f"id={_pattern(named)}"
    if len(named) >= 4:
        select = f"id={_pattern(named, '*')}"
    if name:
        select += f" or node={_pattern(node)} and ({' or '.join(f'{one}={_pattern(name)}' for one in _NAMES[kind])})"
    # A pattern fits more than the name itself.
    found = client.everything(f"/api/v1/{kind}s", select=select)
    exact = [
        one for one in found if named in (one["id"], *(f"{one['node']}:{one['body'][key]}" for key in _NAMES[kind]))
    ]
    return only(exact or [one for one in found if len(named) >= 4 and one["id"].startswith(named)], named, kind)


def _pattern(text: str, end: str = "") -> str:
    """Returns a quoted pattern of a selection that fits the text, followed by `end`."""
    return "'" + re.sub(r"[*?\['\"]", "?", text) + end + "'"


def job_named(client: NodeClient, named: str) -> dict[str, Any]:
    jobs = client.everything("/api/v1/jobs", id=named)
    exact = [one for one in jobs if one["id"] == named]
    return only(exact or [one for one in jobs if len(named) >= 4 and one["id"].startswith(named)], named, "job")


def refuse_refused(reply: Reply) -> dict[str, Any]:
    """Returns the answer to a request. Raises VmconvError if the owner refused it."""
    content: dict[str, Any] = reply.content
    if content.get("ok") is False:
        raise VmconvError(f"refused: {content.get('reason')}")
    return content
