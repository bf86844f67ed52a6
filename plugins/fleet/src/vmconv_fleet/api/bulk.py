"""Routes that convert many disks or machines: chosen by a selection, or one by one."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, model_validator

from vmconv.plugin import UsageError
from vmconv_fleet.api.access import UNAUTHORIZED, Caller, Known
from vmconv_fleet.api.asking import Answer, NotHereError, Wait, ask_many
from vmconv_fleet.api.state import State, StateOf
from vmconv_fleet.catalogue.appointing import converters, may_convert
from vmconv_fleet.catalogue.conversion import BulkSpec, MachineSpec
from vmconv_fleet.catalogue.fields import Identifier, NodeId
from vmconv_fleet.catalogue.selection import VMS, parse
from vmconv_fleet.catalogue.snapshot import Snapshot
from vmconv_fleet.replication.records import Record

router = APIRouter(prefix="/api/v1", responses=UNAUTHORIZED)

MAX_SELECTED = 5000

Kind = Literal["disk", "vm"]
VERB: Mapping[Kind, str] = {"disk": "convert", "vm": "convert-machine"}


class Item(BaseModel):
    """A disk or a machine of the catalogue."""

    model_config = ConfigDict(extra="forbid")

    owner: NodeId
    id: Identifier


class _Chosen(BaseModel):
    """Sources: all that `select` chooses, or these `items`."""

    model_config = ConfigDict(extra="forbid")

    select: Annotated[str, Field(max_length=4000)] | None = None
    items: Annotated[list[Item], Field(min_length=1, max_length=MAX_SELECTED)] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.select is None) == (self.items is None):
            raise ValueError("select or items is needed, and not both")
        return self

    def given(self) -> dict[str, Any]:
        """Returns the fields of the conversions that were set."""
        return self.model_dump(mode="json", exclude_unset=True, exclude={"select", "items"})


class Bulk(_Chosen, BulkSpec):
    """Conversions of disks. `max_parallel` applies to each node by itself."""


class MachineBulk(_Chosen, BulkSpec, MachineSpec):
    """Conversions of machines. `max_parallel` applies to each node by itself."""


class Selected(BaseModel):
    """One of many disks or machines, and the answer to its conversion."""

    node: str
    disk: str | None = None
    vm: str | None = None
    name: str
    answer: Answer


@router.post("/conversions", summary="Convert all chosen disks", response_model_exclude_none=True)
async def convert_disks(wish: Bulk, state: StateOf, caller: Known, wait: Wait = 0) -> list[Selected]:
    return await _convert("disk", wish, state, caller, wait)


@router.post("/machine-conversions", summary="Convert all chosen machines", response_model_exclude_none=True)
async def convert_machines(wish: MachineBulk, state: StateOf, caller: Known, wait: Wait = 0) -> list[Selected]:
    return await _convert("vm", wish, state, caller, wait)


async def _convert(kind: Kind, wish: _Chosen, state: State, caller: Caller, wait: float) -> list[Selected]:
    caller.must_be_somewhere("operator")
    chosen = await run_in_threadpool(lambda: _chosen(state.snapshot(), kind, wish))
    answers = await convert_all(state, caller, kind, chosen, wish.given(), wait=wait)
    return [
        Selected.model_validate({"node": answer.target, kind: one.id, "name": one.body["name"], "answer": answer})
        for one, answer in zip(chosen, answers, strict=True)
    ]


def _chosen(snapshot: Snapshot, kind: Kind, wish: _Chosen) -> list[Record]:
    if wish.items is not None:
        return sources(snapshot, kind, [(one.owner, one.id) for one in wish.items])
    text = wish.select or ""
    if kind == "disk":
        page = snapshot.disks(parse(text), limit=MAX_SELECTED)
    else:
        page = snapshot.vms(parse(text, VMS), limit=MAX_SELECTED)
    if page.next:
        raise UsageError(f"{page.total} {kind}s are selected, {MAX_SELECTED} at most")
    return page.records


def sources(snapshot: Snapshot, kind: Kind, items: Sequence[tuple[str, str]]) -> list[Record]:
    """Returns the records of these owners and ids, each once. Raises NotHereError for one that is not here."""
    found = []
    for owner, identifier in dict.fromkeys(items):
        record = snapshot.view.get(owner, kind, identifier)
        if record is None:
            raise NotHereError(f"{kind} {identifier} of {owner} is not here")
        found.append(record)
    return found


async def convert_all(
    state: State,
    caller: Caller,
    kind: Kind,
    chosen: Sequence[Record],
    given: Mapping[str, Any],
    *,
    wait: float,
    batch: str | None = None,
) -> list[Answer]:
    """Requests the conversions as one batch; returns their answers. With the same `batch` they are the same requests.

    Sources on shared storage are spread over all nodes that convert it. A refusal does not stop the others.
    """
    batch = batch or f"batch-{secrets.token_hex(6)}"
    targets = await run_in_threadpool(_spread, state, chosen, given)
    wishes = [
        (
            target,
            VERB[kind],
            {**given, kind: one.id, "batch": batch, **({} if target == one.owner else {"of": one.owner})},
        )
        for one, target in zip(chosen, targets, strict=True)
    ]
    keys = [f"{batch}-{number}" for number in range(len(chosen))]
    return await ask_many(state, caller, wishes, wait=wait, keys=keys)


def _spread(state: State, chosen: Sequence[Record], given: Mapping[str, Any]) -> list[str]:
    """Returns the node that converts each source: of those that can be asked, one after the other.

    Only the owner removes sources, and makes targets elsewhere than beside their sources.
    """
    if given.get("target_datastore") or given.get("keep_source") is False:
        return [one.owner for one in chosen]
    view = state.view()
    answering = {one.node for one in state.snapshot().nodes() if one.state in ("here", "up")}
    turns: dict[tuple[str, str], Iterator[str]] = {}
    targets = []
    for one in chosen:
        place = (one.owner, str(one.body.get("datastore")))
        if place not in turns:
            nodes = [node for node in converters(view, *place) if node == one.owner or node in answering]
            turns[place] = cycle(nodes)
        # The owner can, so this ends.
        targets.append(next(node for node in turns[place] if may_convert(view, node, one)))
    return targets
