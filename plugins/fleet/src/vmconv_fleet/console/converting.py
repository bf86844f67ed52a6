"""Conversions of one or many disks or machines: choose options, see what will happen, confirm once, see each answer."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from vmconv.plugin import UsageError, VmconvError, size_text
from vmconv_fleet.api.asking import arguments_of
from vmconv_fleet.api.bulk import VERB, Kind, convert_all, sources
from vmconv_fleet.catalogue import kinds
from vmconv_fleet.console.confirming import WAIT, words
from vmconv_fleet.console.web import Fields, Visit, fields_of, query_of, refuse_forged, visit_of
from vmconv_fleet.replication.records import Record

MAX_ITEMS = 200

TEXTS = ("format", "target", "target_datastore", "zero_copy", "between", "disk_format", "uuid")
FLAGS = ("dry_run", "strict", "new_identity")
_OF_MACHINES = frozenset({"disk_format", "uuid", "strict", "new_identity", "keep"})


class Wish(NamedTuple):
    """What the fields of a form ask for. `given` are the fields of each conversion."""

    kind: Kind
    sources: list[Record]
    given: Mapping[str, Any]

    @property
    def what(self) -> str:
        return f"{len(self.sources)} {_NOUN[self.kind]}{'s' if len(self.sources) != 1 else ''}"


_NOUN = {"disk": "disk", "vm": "virtual machine"}


class Item(NamedTuple):
    """A source as the review shows it. `problem`: why it will be refused, or may fail."""

    record: Record
    name: str
    size: int | None
    becomes: str
    problem: str | None


def choose(visit: Visit) -> Response:
    """Returns the page with the options of the conversion."""
    return _choosing(visit, _wish(visit, query_of(visit.request)), None)


def review(visit: Visit) -> Response:
    """Returns the page that says what will happen; with the options again if they are not valid."""
    fields = query_of(visit.request)
    wish = _wish(visit, fields)
    try:
        _check(wish)
    except UsageError as exc:
        return _choosing(visit, wish, str(exc))
    return visit.page(
        "review.html",
        title="Convert",
        wish=wish,
        items=[_item(visit, wish, one) for one in wish.sources],
        sentences=_sentences(visit, wish),
        fields=[(name, value) for name, values in fields.items() if name != "form_key" for value in values],
        batch=f"batch-{secrets.token_hex(6)}",
    )


async def convert(request: Request) -> Response:
    """Requests the reviewed conversions; shows the answer to each. Sent again, it is the same request."""
    visit, fields = visit_of(request), await fields_of(request)
    refuse_forged(visit, {name: values[0] for name, values in fields.items()})
    wish = await run_in_threadpool(_wish, visit, fields)
    _check(wish)
    batch = _first(fields, "batch")
    if not batch.startswith("batch-") or len(batch) > 60:
        raise UsageError("this form is not from the page that says what will happen")
    answers = await convert_all(visit.state, visit.caller, wish.kind, wish.sources, wish.given, wait=WAIT, batch=batch)
    results = [(one, _name(one), answer, words(answer)) for one, answer in zip(wish.sources, answers, strict=True)]
    refused = sum(answer.ok is False for answer in answers)
    return await run_in_threadpool(
        lambda: visit.page(
            "converted.html", title="Convert", is_live=False, wish=wish, results=results, refused=refused, batch=batch
        )
    )


def _first(fields: Fields, name: str) -> str:
    return fields.get(name, [""])[0].strip()


def _wish(visit: Visit, fields: Fields) -> Wish:
    """Returns what the fields ask for. Raises UsageError for none or too many, NotHereError for unknown sources."""
    kind = cast("Kind", _first(fields, "kind"))
    if kind not in VERB:
        raise UsageError("a conversion is of disks or of machines")
    items = fields.get("item", [])
    if not 0 < len(items) <= MAX_ITEMS:
        raise UsageError(f"{len(items)} are chosen: choose 1 to {MAX_ITEMS} in the list")
    visit.caller.must_be_somewhere("operator")
    owners = [one.partition("/")[::2] for one in items]
    return Wish(kind, sources(visit.snapshot, kind, owners), _given(kind, fields))


def _given(kind: Kind, fields: Fields) -> dict[str, Any]:
    given: dict[str, Any] = {name: text for name in TEXTS if (text := _first(fields, name))}
    given |= {name: True for name in FLAGS if _first(fields, name)}
    if _first(fields, "remove_source"):
        given["keep_source"] = False
    if parallel := _first(fields, "max_parallel"):
        given["max_parallel"] = int(parallel) if parallel.isdecimal() and len(parallel) < 10 else parallel
    if keep := [one.strip() for one in _first(fields, "keep").split(",") if one.strip()]:
        given["keep"] = keep
    return {name: value for name, value in given.items() if kind == "vm" or name not in _OF_MACHINES}


def _check(wish: Wish) -> None:
    """Raises UsageError for options that no node takes."""
    if "target" in wish.given and len(wish.sources) > 1:
        raise UsageError("a name is for one conversion, and several are chosen")
    arguments_of(VERB[wish.kind], {**wish.given, wish.kind: wish.sources[0].id})


def _choosing(visit: Visit, wish: Wish, wrong: str | None) -> Response:
    return visit.page(
        "convert.html",
        title="Convert",
        wish=wish,
        names=[_name(one) for one in wish.sources],
        formats=_writable(visit, wish),
        removable=wish.kind == "disk" and all(_policy(visit, one.owner).may_remove_source for one in wish.sources),
        wrong=wrong,
    )


def _writable(visit: Visit, wish: Wish) -> list[str]:
    """Returns the formats that all owners of the sources can write."""
    found: list[set[str]] = []
    for owner in dict.fromkeys(one.owner for one in wish.sources):
        able = visit.snapshot.body(kinds.CapabilitiesBody, owner, "capabilities", "installed")
        able = able or kinds.CapabilitiesBody()
        formats = able.formats if wish.kind == "disk" else able.machines
        found.append({name for name, one in formats.items() if one.writes})
    return sorted(set.intersection(*found))


def _policy(visit: Visit, owner: str) -> kinds.PolicyBody:
    return visit.snapshot.body(kinds.PolicyBody, owner, "policy", "conversion") or kinds.PolicyBody()


def _name(record: Record) -> str:
    return str(record.body.get("name") or record.body.get("file") or record.id)


def _item(visit: Visit, wish: Wish, record: Record) -> Item:
    body = record.body
    problem = body.get("problem")
    if not problem and body.get("in_use"):
        problem = "open for writing: the conversion may be refused"
    return Item(record, _name(record), _size(visit, wish, record), _becomes(visit, wish, record), problem)


def _size(visit: Visit, wish: Wish, record: Record) -> int | None:
    """Returns the bytes on storage of a disk, or of those disks of a machine that the catalogue has."""
    if wish.kind == "disk":
        return int(record.body.get("actual_size", 0))
    vm = kinds.VmBody.model_validate(record.body)
    disks = [visit.snapshot.view.get(record.owner, "disk", one.disk) for one in vm.disks if one.disk]
    sizes = [int(one.body.get("actual_size", 0)) for one in disks if one]
    return sum(sizes) if sizes else None


def _becomes(visit: Visit, wish: Wish, record: Record) -> str:
    """Returns the name of the target as the node's policy makes it, and where it will be."""
    naming = _policy(visit, record.owner).naming
    directory, name = os.path.split(str(record.body.get("name" if wish.kind == "disk" else "file", record.id)))
    stem, format_name = os.path.splitext(name)[0], str(wish.given["format"])
    target = wish.given.get("target") or naming.format(
        stem=stem, suffix=f".{_suffix(format_name)}", format=format_name, job="JOB"
    )
    if place := wish.given.get("target_datastore"):
        return f"{place}: {target}"
    return os.path.join(directory, target) + ("/" if wish.kind == "vm" else "")


def _suffix(format_name: str) -> str:
    """Returns the suffix of a format's files as this node knows it; its name if it does not."""
    from vmconv.plugin import installed

    try:
        return installed().format(format_name).suffixes[0].lstrip(".")
    except (VmconvError, IndexError):
        return format_name


def _sentences(visit: Visit, wish: Wish) -> list[str]:
    """Returns what will happen."""
    sizes = [size for one in wish.sources if (size := _size(visit, wish, one)) is not None]
    nodes = ", ".join(sorted({visit.snapshot.name(one.owner) for one in wish.sources}))
    on_storage = f", {size_text(sum(sizes))} on storage" if sizes else ""
    made = "new directory" if wish.kind == "vm" else "new file"
    where = (
        f"in datastore {wish.given['target_datastore']}" if "target_datastore" in wish.given else "beside its source"
    )
    if wish.given.get("dry_run"):
        return [f"{wish.what} of {nodes}{on_storage}: plans only, nothing is made or changed."]
    said = [
        f"{wish.what} of {nodes}{on_storage}, to {wish.given['format']}.",
        f"Each becomes a {made} {where}; nothing is converted in place.",
        "The sources are removed afterwards." if wish.given.get("keep_source") is False else "The sources stay.",
    ]
    if window := wish.given.get("between"):
        said.append(f"They begin between {window}{'' if ' ' in window else ' UTC'}.")
    if wish.given.get("zero_copy") == "require":
        said.append("A conversion that would have to copy payload fails.")
    return [*said, *_losses(wish.given)]


def _losses(given: Mapping[str, Any]) -> Sequence[str]:
    said = []
    if given.get("strict"):
        said.append("A conversion that would lose a setting fails.")
    if given.get("keep"):
        said.append(f"A conversion that would lose {', '.join(given['keep'])} fails.")
    if given.get("new_identity"):
        said.append("Each new machine gets a new UUID and new MAC addresses.")
    return said
