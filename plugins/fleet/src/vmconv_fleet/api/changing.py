"""Routes for changes: 200 if executed, 409 if refused, 202 if the owner has not answered yet."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Collection, Sequence
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from vmconv.plugin import AccessError, UsageError
from vmconv_fleet.api.access import UNAUTHORIZED, Known
from vmconv_fleet.api.asking import Answer, IdempotencyKey, NotHereError, Wait, ask
from vmconv_fleet.api.reading import owner_of, record_of
from vmconv_fleet.api.state import State, StateOf
from vmconv_fleet.catalogue.fields import GroupName, Name, PlainName
from vmconv_fleet.catalogue.kinds import MAX_CONVERTERS
from vmconv_fleet.catalogue.overridden import overridden_in
from vmconv_fleet.catalogue.places import is_container
from vmconv_fleet.catalogue.terms import Role
from vmconv_fleet.jobs.arguments import JobRequest, MachineJobRequest, PolicySet
from vmconv_fleet.trust import tokens
from vmconv_fleet.trust.roles import refuse_unless_allowed

_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"model": Answer, "description": "Done"},
    202: {"model": Answer, "description": "Requested; the owner has not answered yet"},
    409: {"model": Answer, "description": "Refused by the owner"},
}

router = APIRouter(prefix="/api/v1", responses=UNAUTHORIZED)

_RESUMES_WITHIN = 15.0
"""Seconds in which a node that waits for no other one writes."""


class _Wish(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AnyRequest(_Wish):
    """A request of any verb."""

    target: str
    verb: Name
    arguments: dict[str, Any] = {}


class ScanWish(_Wish):
    datastore: str | None = None


class DatastoreWish(_Wish):
    """A directory of this node, by its path here, or a container of objects, by its URL here."""

    name: str
    path: Annotated[str, Field(min_length=1, max_length=4096)]


class GiveWish(_Wish):
    to: str


class AppointWish(_Wish):
    """The nodes that may convert the disks of a datastore, by name or id, besides its owner; none: only the owner."""

    nodes: Annotated[list[str], Field(max_length=MAX_CONVERTERS)]


class TokenWish(_Wish):
    """`datastores`, each `[NODE:]NAME`: the token has the role in these alone, and is a viewer elsewhere."""

    label: PlainName
    role: Role
    datastores: Annotated[list[str], Field(min_length=1, max_length=256)] | None = None
    ttl_s: Annotated[float, Field(gt=0, le=10 * 365 * 86400)] | None = None


class TokenMade(Answer):
    """`token` is shown only once: the fleet stores its hash."""

    token: str | None = None


class GroupWish(_Wish):
    """`datastores` are as for a token; `node` is where the group signs in, by default this one."""

    group: GroupName
    role: Role
    datastores: Annotated[list[str], Field(min_length=1, max_length=256)] | None = None
    node: str | None = None


class RevokeWish(_Wish):
    """`authority` is a node that holds the fleet's authority, by default this one or the nearest."""

    key_id: str | None = None
    authority: str | None = None


class RetireWish(_Wish):
    reason: Annotated[str, Field(max_length=255)] = ""
    authority: str | None = None


class ResumeWish(_Wish):
    """Members by name or id, or `alone`: any member at all; or `merge`: the other histories of this node."""

    without: Annotated[list[str], Field(max_length=4096)] = []
    alone: bool = False
    merge: bool = False


class JoinWish(_Wish):
    ttl_s: Annotated[float, Field(gt=0, le=30 * 86400)] = 3600


class LinkWish(_Wish):
    connected: bool


@router.post("/requests", responses=_ANSWERS, summary="Request any verb of a node")
async def request(
    wish: AnyRequest, state: StateOf, caller: Known, wait: Wait = 0, idempotency_key: IdempotencyKey = None
) -> JSONResponse:
    target = _node(state, wish.target)
    answer = await ask(state, caller, target, wish.verb, wish.arguments, wait=wait, key=idempotency_key)
    return answer.as_response()


@router.post("/disks/{owner}/{disk}/convert", responses=_ANSWERS, summary="Convert a disk")
async def convert(
    owner: str,
    disk: str,
    wish: JobRequest,
    state: StateOf,
    caller: Known,
    wait: Wait = 0,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    target = _node(state, owner)
    record_of(state, target, "disk", disk)
    arguments = wish.given() | {"disk": disk}
    answer = await ask(state, caller, target, "convert", arguments, wait=wait, key=idempotency_key)
    return answer.as_response()


@router.post("/vms/{owner}/{vm}/convert", responses=_ANSWERS, summary="Convert a virtual machine with its disks")
async def convert_machine(
    owner: str,
    vm: str,
    wish: MachineJobRequest,
    state: StateOf,
    caller: Known,
    wait: Wait = 0,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    target = _node(state, owner)
    record_of(state, target, "vm", vm)
    arguments = wish.given() | {"vm": vm}
    return (
        await ask(state, caller, target, "convert-machine", arguments, wait=wait, key=idempotency_key)
    ).as_response()


@router.post("/jobs/{owner}/{job}/cancel", responses=_ANSWERS, summary="Cancel a conversion")
async def cancel(owner: str, job: str, state: StateOf, caller: Known, wait: Wait = 0) -> JSONResponse:
    target = _node(state, owner)
    record_of(state, target, "job", job)
    return (await ask(state, caller, target, "cancel", {"job": job}, wait=wait)).as_response()


@router.post("/nodes/{node}/scan", responses=_ANSWERS, summary="Scan a node's datastores")
async def scan(node: str, wish: ScanWish, state: StateOf, caller: Known, wait: Wait = 0) -> JSONResponse:
    arguments = wish.model_dump(exclude_none=True)
    return (await ask(state, caller, _node(state, node), "scan", arguments, wait=wait)).as_response()


@router.post("/datastores", responses=_ANSWERS, summary="Declare a datastore of this node; local administrator only")
async def add_datastore(wish: DatastoreWish, state: StateOf, caller: Known) -> JSONResponse:
    if not caller.is_local:
        raise AccessError("datastores are declared by the node's local administrator: they name its paths")
    path = wish.path if is_container(wish.path) else os.path.realpath(wish.path)
    if not (is_container(path) or os.path.isdir(path)):
        raise UsageError(f"{wish.path}: is not a directory")
    answer = await ask(state, caller, state.node, "datastore-add", {"name": wish.name, "path": path})
    return answer.as_response()


@router.delete("/datastores/{owner}/{name}", responses=_ANSWERS, summary="Remove a datastore from the catalogue")
async def remove_datastore(owner: str, name: str, state: StateOf, caller: Known, wait: Wait = 0) -> JSONResponse:
    target = _node(state, owner)
    return (await ask(state, caller, target, "datastore-remove", {"name": name}, wait=wait)).as_response()


@router.post("/datastores/{owner}/{name}/give", responses=_ANSWERS, summary="Give shared storage to another node")
async def give_datastore(
    owner: str, name: str, wish: GiveWish, state: StateOf, caller: Known, wait: Wait = 0
) -> JSONResponse:
    arguments = {"name": name, "to": _node(state, wish.to)}
    return (await ask(state, caller, _node(state, owner), "datastore-give", arguments, wait=wait)).as_response()


@router.put(
    "/datastores/{owner}/{name}/converters",
    responses=_ANSWERS,
    summary="Name the nodes that convert the disks of shared storage, besides its owner",
)
async def appoint(
    owner: str, name: str, wish: AppointWish, state: StateOf, caller: Known, wait: Wait = 0
) -> JSONResponse:
    arguments = {"name": name, "nodes": [_node(state, one) for one in wish.nodes]}
    return (await ask(state, caller, _node(state, owner), "datastore-appoint", arguments, wait=wait)).as_response()


@router.post("/datastores/{owner}/{name}/take", responses=_ANSWERS, summary="Take shared storage of a retired node")
async def take_datastore(owner: str, name: str, state: StateOf, caller: Known, wait: Wait = 0) -> JSONResponse:
    target = _node(state, owner)
    return (await ask(state, caller, target, "datastore-take", {"name": name}, wait=wait)).as_response()


@router.patch("/nodes/{node}/policy", responses=_ANSWERS, summary="Change how a node converts")
async def set_policy(node: str, wish: PolicySet, state: StateOf, caller: Known, wait: Wait = 0) -> JSONResponse:
    return (await ask(state, caller, _node(state, node), wish.verb, wish.given(), wait=wait)).as_response()


@router.post("/tokens", summary="Create a token; only this answer shows it")
async def create_token(wish: TokenWish, state: StateOf, caller: Known) -> TokenMade:
    new = tokens.make(state.node)
    arguments = {"id": new.id, "hash": new.hash, "label": wish.label, **granted(state, wish.role, wish.datastores)}
    if wish.ttl_s is not None:
        arguments["expires_ms"] = state.now_ms() + int(wish.ttl_s * 1000)
    answer = await ask(state, caller, state.node, "token-create", arguments)
    return TokenMade(**answer.model_dump(), token=new.text if answer.ok else None)


@router.delete("/tokens/{owner}/{identifier}", responses=_ANSWERS, summary="Revoke a token")
async def revoke_token(owner: str, identifier: str, state: StateOf, caller: Known, wait: Wait = 0) -> JSONResponse:
    target = _node(state, owner)
    return (await ask(state, caller, target, "token-revoke", {"id": identifier}, wait=wait)).as_response()


@router.post("/groups", responses=_ANSWERS, summary="Give the people of a group a role where they sign in")
async def set_group(wish: GroupWish, state: StateOf, caller: Known, wait: Wait = 0) -> JSONResponse:
    arguments = {"group": wish.group, **granted(state, wish.role, wish.datastores)}
    target = _node(state, wish.node) if wish.node else state.node
    return (await ask(state, caller, target, "group-set", arguments, wait=wait)).as_response()


@router.delete("/groups/{owner}/{identifier}", responses=_ANSWERS, summary="Take a group's role")
async def remove_group(owner: str, identifier: str, state: StateOf, caller: Known, wait: Wait = 0) -> JSONResponse:
    target = _node(state, owner)
    return (await ask(state, caller, target, "group-remove", {"id": identifier}, wait=wait)).as_response()


@router.post("/nodes/{node}/revoke", responses=_ANSWERS, summary="Revoke the keys of a node, by the fleet's authority")
async def revoke(node: str, wish: RevokeWish, state: StateOf, caller: Known, wait: Wait = 0) -> JSONResponse:
    arguments = {"node": _node(state, node)} | wish.model_dump(exclude_none=True, include={"key_id"})
    answer = await ask(state, caller, _authority(state, wish.authority), "revoke", arguments, wait=wait)
    keys = [one for one in state.service.certified_keys() if one.node == arguments["node"]]
    done = all(one.is_revoked for one in keys if wish.key_id in (None, one.key_id))
    return _confirmed(state, answer, done=done).as_response()


@router.post("/nodes/{node}/retire", responses=_ANSWERS, summary="Remove a node from the fleet permanently")
async def retire(node: str, wish: RetireWish, state: StateOf, caller: Known, wait: Wait = 0) -> JSONResponse:
    arguments = {"node": _node(state, node), "reason": wish.reason}
    answer = await ask(state, caller, _authority(state, wish.authority), "retire", arguments, wait=wait)
    return _confirmed(state, answer, done=arguments["node"] in state.service.retirements()).as_response()


def _confirmed(state: State, answer: Answer, *, done: bool) -> Answer:
    """Returns the answer of a node that says to hold the authority, or a refusal if it has not done what it says.

    The authority's signature comes in the transaction of the answer. Any member may say that it holds the authority.
    """
    if not answer.ok or done:
        return answer
    name = state.snapshot().name(answer.target)
    reason = f"{name} says that it is done, and has not signed it: {name} does not hold the fleet's authority"
    return answer.model_copy(update={"ok": False, "state": "refused", "reason": reason})


@router.post("/resume", summary="Let this restored or forked node write again; local administrator only")
async def resume(wish: ResumeWish, state: StateOf, caller: Known) -> dict[str, Any]:
    """The answer has the members that it still waits for, and of a merge the records that it has overridden."""
    refuse_unless_allowed("resume", state.node, caller.by, state.view(), state.now_ms(), arguments={})
    if wish.merge:
        merged = asyncio.wrap_future(state.service.merge(caller.by.plain()))
        return {"waits_for": [], **overridden_in(await asyncio.wait_for(merged, _RESUMES_WITHIN))}
    if not (state.service.is_restored or state.service.is_forked):
        raise UsageError("this node waits for no other one")
    awaited = state.service.awaited()
    without = awaited if wish.alone else {_node_among(state, awaited, named) for named in wish.without}
    await asyncio.wrap_future(state.service.excuse(without, alone=wish.alone))
    written = state.service.resume(without, caller.by.plain(), alone=wish.alone)
    if wish.alone or awaited == without:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(written), _RESUMES_WITHIN)
    return {"waits_for": state.waits_for()}


def _node_among(state: State, nodes: Collection[str], named: str) -> str:
    """Returns the one of these nodes with this name or id; a member that is awaited may have no record here."""
    found = named if named in nodes else state.snapshot().find_node(named)
    if found is None or found not in nodes:
        names = ", ".join(state.snapshot().names(nodes)) or "no other one"
        raise UsageError(f"this node does not wait for {named!r}", hint=f"it waits for {names}")
    return found


@router.post("/join-tokens", summary="Create an invitation for a new node, on a node with the fleet's authority")
def join_token(wish: JoinWish, state: StateOf, caller: Known) -> dict[str, str]:
    refuse_unless_allowed("invite", state.node, caller.by, state.view(), state.now_ms(), arguments={})
    from vmconv_fleet import config
    from vmconv_fleet.trust.authority import Authority

    authority = Authority.load(state.directory)
    return {"join": str(authority.invite(config.load(state.directory), lifetime=wish.ttl_s, host=None))}


@router.put("/link", summary="Disconnect this node from the others, or reconnect it; local administrator only")
def link(wish: LinkWish, state: StateOf, caller: Known) -> dict[str, bool]:
    if not caller.is_local:
        raise AccessError("only its local administrator disconnects and reconnects a node")
    if state.link is None:
        raise UsageError("this node has no link")
    if wish.connected:
        state.link.reconnect()
    else:
        state.link.disconnect()
    return {"connected": not state.link.is_disconnected}


def granted(state: State, role: Role, datastores: Sequence[str] | None) -> dict[str, Any]:
    """Returns the fields of a record that grants a role: everywhere, or in some datastores.

    A node of a version without roles by datastore sees a viewer.
    """
    if datastores is None:
        return {"role": role}
    if role == "viewer":
        raise UsageError("a viewer sees all datastores", hint="name datastores for operators and administrators")
    return {"role": "viewer", "datastores": dict.fromkeys((_datastore(state, one) for one in datastores), role)}


def _datastore(state: State, named: str) -> str:
    """Returns a datastore, given as `[NODE:]NAME`, as `NODE/NAME` with the node's id."""
    node, _, name = named.rpartition(":")
    owner = _node(state, node) if node else state.node
    return f"{owner}/{record_of(state, owner, 'datastore', name).id}"


def _authority(state: State, named: str | None) -> str:
    """Returns a node with the fleet's authority: the named one, this one, or one that says so, neighbours first."""
    if named:
        return _node(state, named)
    if os.path.exists(os.path.join(state.directory, "authority", "ca.key")):
        return state.node
    near = {state.node: 0, **dict.fromkeys(state.service.neighbours(), 1)}
    holders = [node.owner for node in state.view().find("node") if node.body.get("authority")]
    return min(holders, key=lambda node: near.get(node, 2), default=state.node)


def _node(state: State, named: str) -> str:
    """Returns the id of a node, given by name or id."""
    found = owner_of(state.snapshot(), named)
    if found is None:
        raise NotHereError(f"no node {named!r}")
    return found
