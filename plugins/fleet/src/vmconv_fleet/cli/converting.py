"""`vmconv fleet convert`: converts a disk, many disks or a machine, now or later, on any node."""

from __future__ import annotations

import argparse
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from vmconv.plugin import UsageError, print_json, print_table, size_text
from vmconv_fleet.cli.client import NodeClient, OlderNodeError
from vmconv_fleet.cli.connecting import connected, source_named
from vmconv_fleet.cli.following import Ended, follow
from vmconv_fleet.words import cell, plan_text, time_text

Asked = dict[str, Any]
"""One requested conversion: node, disk or vm, name, answer."""


def convert(options: argparse.Namespace) -> int:
    _refuse_mixed(options)
    at = None if options.at is None else moment(options.at, datetime.now())
    with connected(options) as client, connected(options) as listener:
        # Listening starts before the request, so that no event of the job is missed.
        events = listener.lines("/api/v1/events", kinds="job,response") if _stays(options) else None
        if events:
            next(events)
        single = len(options.named) == 1
        asked = [_one(options, client, at)] if single else _many(options, client, at)
        ended = follow(client, events, asked, bar=options.output != "json") if events else {}
    return _report(options, asked, ended, at)


def _refuse_mixed(options: argparse.Namespace) -> None:
    """Raises UsageError for options of machines without -O."""
    given = [name for name in options.machine_spec if getattr(options, name)]
    if given and not options.machine_format:
        raise UsageError(f"--{given[0].replace('_', '-')} applies to a virtual machine", hint="name its format with -O")


def moment(text: str, now: datetime) -> datetime:
    """Returns the moment; a time of day is the next one by this machine's clock."""
    if re.fullmatch(r"\d{1,2}:\d{2}", text):
        hour, minute = map(int, text.split(":"))
        if hour > 23 or minute > 59:
            raise UsageError(f"--at {text}: is not a time of day")
        then = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
        return then if then > now else then + timedelta(days=1)
    try:
        then = datetime.fromisoformat(text)
    except ValueError as exc:
        raise UsageError(f"--at {text}: is neither HH:MM nor YYYY-MM-DDTHH:MM") from exc
    then = then.astimezone().replace(tzinfo=None)
    if then < now:
        raise UsageError(f"--at {text}: is in the past")
    return then


def _stays(options: argparse.Namespace) -> bool:
    """Returns whether the command waits for the jobs: plans are quick, conversions may take long."""
    return bool(options.follow or options.dry_run)


def _wish(options: argparse.Namespace, at: datetime | None) -> dict[str, Any]:
    """Returns the fields of the conversion that the command line sets."""
    names = (*options.spec, *options.machine_spec)
    wish = {name: value for name in names if (value := getattr(options, name)) not in (None, {})}
    if options.machine_format:
        wish["format"] = options.machine_format
    return wish if at is None else wish | {"at_ms": int(at.timestamp() * 1000)}


def _kind(options: argparse.Namespace) -> str:
    return "vm" if options.machine_format else "disk"


def _one(options: argparse.Namespace, client: NodeClient, at: datetime | None) -> Asked:
    kind = _kind(options)
    found = source_named(client, kind, options.named[0])
    # The caller chooses the job's id, to follow the job before its owner has received it.
    wish = _wish(options, at) | {"job": options.id or f"job-{secrets.token_hex(6)}"}
    path = f"/api/v1/{kind}s/{found['owner']}/{found['id']}/convert"
    reply = client.call("POST", path, wish, query={"wait": options.wait})
    asked = {"node": found["owner"], kind: found["id"], "name": found["body"]["name"], "answer": reply.content}
    return asked | {"job": wish["job"]}


def _many(options: argparse.Namespace, client: NodeClient, at: datetime | None) -> list[Asked]:
    for name in ("target", "target_datastore", "id"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} applies to one conversion, and these are many")
    kind = _kind(options)
    if options.select:
        found = client.everything(f"/api/v1/{kind}s", select=options.select)
    else:
        found = [source_named(client, kind, one) for one in options.named]
    if not found:
        hint = f"vmconv fleet {kind}s --select tries it"
        raise UsageError(f"no {kind} is selected by {options.select!r}", hint=hint)
    if not (options.yes or options.dry_run):
        _confirm(options, found)
    # What was shown is converted, not what the selection chooses by now.
    wish = _wish(options, at) | {"items": [{"owner": one["owner"], "id": one["id"]} for one in found]}
    path = "/api/v1/machine-conversions" if kind == "vm" else "/api/v1/conversions"
    answers = _answers(client, path, wish, options.wait)
    return [one | {"job": one["answer"].get("body", {}).get("job") or one["answer"]["request"]} for one in answers]


def _answers(client: NodeClient, path: str, wish: Mapping[str, Any], wait: float) -> list[Asked]:
    try:
        found: list[Asked] = client.call("POST", path, wish, query={"wait": wait}).content
    except UsageError as exc:
        if re.search(r"\bselect: Field required", str(exc)):
            raise OlderNodeError("conversions of a list") from exc
        raise
    return found


def _confirm(options: argparse.Namespace, found: Sequence[Mapping[str, Any]]) -> None:
    """Asks on a terminal whether the conversion of many shall begin. Raises UsageError if not."""
    if not sys.stdin.isatty():
        return
    for one in found:
        print(f"{cell(one['node'])}:{cell(one['body']['name'])}")
    print(f"{_intention(options, found)} [y/N] ", end="", flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("nothing is converted", hint="--yes does not ask, --dry-run only plans")


def _intention(options: argparse.Namespace, found: Sequence[Mapping[str, Any]]) -> str:
    """Returns what a conversion of many will do, as a question."""
    size = sum(int(one["body"].get("actual_size", 0)) for one in found)
    nodes = ", ".join(dict.fromkeys(cell(one["node"]) for one in found))
    what = f"{len(found)} {_kind(options)}s" + (f" ({size_text(size)} on storage)" if size else "")
    becomes = options.machine_format or options.format
    where = "each becomes a new directory" if options.machine_format else "each becomes a new file"
    removed = "the sources are removed" if options.keep_source is False else "the sources stay"
    return f"Convert {what} of {nodes} to {becomes}: {where} beside its source, {removed}?"


def _report(options: argparse.Namespace, asked: list[Asked], ended: dict[str, Ended], at: datetime | None) -> int:
    refused = [one for one in asked if one["answer"].get("ok") is False]
    failed = [one for one in ended.values() if one.state in ("failed", "cancelled")]
    if options.output == "json":
        print_json(
            [one | {"result": ended[one["job"]].body} if one["job"] in ended else one for one in asked], indent=4
        )
    elif _stays(options):
        _print_ended(options, asked, ended)
    else:
        _print_asked(options, asked, at)
    return 1 if refused or failed else 0


def _source(options: argparse.Namespace) -> str:
    """Returns the head of the column with the sources."""
    return "VM" if options.machine_format else "DISK"


def _print_asked(options: argparse.Namespace, asked: list[Asked], at: datetime | None) -> None:
    rows = [[_source(options), "JOB", "ANSWER"]]
    rows += [[cell(one["name"]), _job(one), cell(_answer(one["answer"]))] for one in asked]
    print_table(rows)
    if at:
        print(f"begins {time_text(int(at.timestamp() * 1000))}")


def _job(one: Asked) -> str:
    return cell(one["job"] if one["answer"].get("ok") is not False else None)


def _answer(answer: dict[str, Any]) -> str:
    if answer.get("ok") is None:
        return "not yet: its owner has not answered"
    return "accepted" if answer["ok"] else f"refused: {answer.get('reason')}"


def _print_ended(options: argparse.Namespace, asked: list[Asked], ended: dict[str, Ended]) -> None:
    rows = [[_source(options), "BECOMES", "STATE", "PLAN"]]
    notes: dict[str, None] = {}
    total = dict.fromkeys(("shared", "copied", "written"), 0)
    for one in asked:
        end = ended.get(one["job"])
        if end is None:
            rows.append([cell(one["name"]), "-", cell(_answer(one["answer"])), "-"])
            continue
        body = end.body
        plan = body.get("plan") or {}
        for name in total:
            total[name] += int(plan.get(name, 0))
        notes |= dict.fromkeys(f"copied because {copy['reason']}" for copy in plan.get("copies", ()))
        notes |= dict.fromkeys(f"changed: {change}" for change in plan.get("changes", ()))
        notes |= dict.fromkeys(f"not carried over: {loss}" for loss in plan.get("losses", ()))
        if body.get("error"):
            notes[f"{one['name']}: {body['error']}"] = None
        rows.append([cell(one["name"]), cell(body.get("file")), cell(_state(body)), cell(plan_text(body.get("plan")))])
    print_table(rows)
    for note in notes:
        print(cell(note))
    if len(asked) > 1:
        print(
            ", ".join(f"{name} {size_text(value)}" for name, value in total.items())
            + f" of {len(asked)} {_kind(options)}s"
        )


def _state(body: Mapping[str, Any]) -> str:
    seconds = f" in {body['seconds']:.2f} s" if body.get("seconds") is not None else ""
    return f"{body['state']}{seconds}"
