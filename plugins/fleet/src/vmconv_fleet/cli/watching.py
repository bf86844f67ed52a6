"""`vmconv fleet watch` and `vmconv fleet export`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from vmconv.plugin import AccessError, os_errors
from vmconv_fleet.cli.connecting import connected
from vmconv_fleet.words import cell, progress_text, time_text

_NOISE = frozenset({"heartbeat", "epoch"})
"""Kinds that are printed only on request, because they only show that a node is up."""


def watch(options: argparse.Namespace) -> int:
    with connected(options) as client:
        for line in client.lines("/api/v1/events", kinds=options.kinds):
            if not line.startswith("data: "):
                continue
            record = json.loads(line.removeprefix("data: "))
            if "reason" in record and "kind" not in record:
                raise AccessError(f"the events have ended: {record['reason']}")
            if "kind" not in record or (not options.kinds and record["kind"] in _NOISE):
                continue
            print(json.dumps(record) if options.output == "json" else _line(record), flush=True)
    return 0


def _line(record: Mapping[str, Any]) -> str:
    when = time_text(record["written_ms"]).partition(" ")[2]
    what = "gone" if record["deleted"] else _summary(record["kind"], record["body"])
    return f"{when}  {cell(record['node'])}  {record['kind']} {cell(record['id'])}  {cell(what)}"


def _summary(kind: str, body: Mapping[str, Any]) -> str:
    if kind == "job":
        what = f"{body.get('source', '')} to {body['format']}"
        return f"{body['state']} {progress_text(body)} {what} {body.get('error', '')}"
    if kind == "request":
        return f"{body['verb']} of {body['target'][:8]} by {body['by'].get('user', '')}"
    if kind == "response":
        return f"transaction {body.get('transaction')}" if body.get("ok") else f"refused: {body.get('reason')}"
    if kind == "transaction":
        return f"{body.get('verb', '')}: {len(body.get('changes', ()))} records"
    return str(body.get("name") or body.get("label") or body.get("path") or "")


def export(options: argparse.Namespace) -> int:
    with connected(options) as client:
        lines = unbroken(client.lines("/api/v1/export"))
        if options.file is None:
            for line in lines:
                sys.stdout.write(line + "\n")
            return 0
        count = _write_new(options.file, lines)
    print(f"{options.file}: {count} records")
    return 0


def unbroken(lines: Iterator[str]) -> Iterator[str]:
    """Yields JSON lines. Raises AccessError if the node has ended them."""
    for line in lines:
        if line.startswith('{"error": '):
            raise AccessError(f"the answer has ended early: {json.loads(line)['error']}")
        yield line


def _write_new(path: str, lines: Iterator[str]) -> int:
    """Writes a new file, complete or not at all; returns the number of lines."""
    count = 0
    with os_errors("cannot be written"), open(path, "x", encoding="utf-8") as file:
        try:
            for line in lines:
                file.write(line + "\n")
                count += 1
        except BaseException:
            os.unlink(path)
            raise
    return count
