"""`vmconv fleet audit`: each request of the fleet with its caller and its result."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from vmconv.plugin import UsageError
from vmconv_fleet.cli.connecting import connected
from vmconv_fleet.cli.watching import unbroken
from vmconv_fleet.words import cell, time_text


def audit(options: argparse.Namespace) -> int:
    query = {f"{name}_ms": _moment(name, text) for name in ("since", "until") if (text := getattr(options, name))}
    with connected(options) as client:
        for line in unbroken(client.lines("/api/v1/audit", **query)):
            print(line if options.output == "json" else _said(json.loads(line)), flush=True)
    return 0


def _moment(name: str, text: str) -> int:
    """Returns milliseconds since 1970. Raises UsageError."""
    try:
        moment = datetime.fromisoformat(text)
        return int(moment.timestamp() * 1000)
    except (ValueError, OverflowError, OSError) as exc:
        raise UsageError(f"--{name} {text}: is neither YYYY-MM-DD nor YYYY-MM-DDTHH:MM") from exc


def _said(entry: Mapping[str, Any]) -> str:
    token = f" (token {str(entry['token']).rpartition('/')[2]})" if entry["token"] else ""
    who = f"{entry['user']}{token} from {entry['address'] or entry['from_name']}"
    what = f"{entry['verb']} of {entry['target_name']}: {entry['result']} {entry.get('reason', '')}".strip()
    return f"{time_text(entry['at_ms'])}  {cell(who)}  {cell(what)}"
