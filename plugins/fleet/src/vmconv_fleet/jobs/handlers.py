"""The handlers of the verbs: each decides from the replica and changes own records, or refuses.

A handler runs on the replica's thread, within the transaction of its request, and only reads records. Side effects
(conversions, scans) are left to the observers of the written records.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from vmconv_fleet.errors import Refusal
from vmconv_fleet.jobs.groups import remove_group, set_group
from vmconv_fleet.jobs.policy import POLICY, policy_of, refuse_beside, refuse_ruled_out
from vmconv_fleet.replication.indexing import Where
from vmconv_fleet.replication.records import Change, Record
from vmconv_fleet.replication.requests import Context, Handler, IncomingRequest, Outcome
from vmconv_fleet.trust.groups import groups_of
from vmconv_fleet.trust.roles import VERBS, refuse_unless_allowed, rights_of
from vmconv_fleet.words import trap_in

if TYPE_CHECKING:
    from pydantic import BaseModel

    from vmconv_fleet.catalogue.kinds import PolicyBody
    from vmconv_fleet.jobs.arguments import (
        Cancel,
        Convert,
        ConvertMachine,
        DatastoreAdd,
        DatastoreAppoint,
        DatastoreGive,
        DatastoreRemove,
        DatastoreTake,
        PolicySet,
        Resume,
        Retire,
        Revoke,
        Scan,
        TokenCreate,
        TokenRevoke,
        WebhookAdd,
        WebhookRemove,
    )
    from vmconv_fleet.trust.authority import Authority

    M = TypeVar("M", bound=BaseModel)

MAX_OPEN_JOBS = 20_000
OPEN = Where("NOT ended")


def make_handlers(directory: str) -> Mapping[str, Handler]:
    """Returns the handler of each verb; `directory` is the node's own, where it may hold the fleet's authority."""
    deciders: Mapping[str, Callable[[Context, IncomingRequest, Any], Outcome]] = {
        "convert": _convert,
        "convert-machine": _convert_machine,
        "cancel": _cancel,
        "scan": _scan,
        "datastore-add": _add_datastore,
        "datastore-remove": _remove_datastore,
        "datastore-appoint": _appoint,
        "datastore-give": _give_datastore,
        "datastore-take": _take_datastore,
        "policy-set": _set_policy,
        "resume": _resume,
        "token-create": _create_token,
        "token-revoke": _revoke_token,
        "webhook-add": _add_webhook,
        "webhook-remove": _remove_webhook,
        "group-set": set_group,
        "group-remove": remove_group,
        "retire": partial(_retire, directory),
        "revoke": partial(_revoke, directory),
    }
    assert deciders.keys() == VERBS.keys()
    return {verb: partial(_handle, decide) for verb, decide in deciders.items()}


def _handle(
    decide: Callable[[Context, IncomingRequest, Any], Outcome], context: Context, request: IncomingRequest
) -> Outcome:
    """Checks the caller and the arguments, and calls the handler."""
    # The models take memory that a node without requests does not need.
    from vmconv_fleet.catalogue.kinds import Principal
    from vmconv_fleet.jobs.arguments import ARGUMENTS

    by = _checked(Principal, request.by, "by")
    if by.node != request.requester:
        raise Refusal(f"{request.requester} states a caller of another node, {by.node}")
    refuse_unless_allowed(request.verb, context.node, by, context, context.now, arguments=request.arguments)
    return decide(context, request, _checked(ARGUMENTS[request.verb], request.arguments, request.verb))


def _checked(model: type[M], given: Mapping[str, Any], what: str) -> M:
    from pydantic import ValidationError

    try:
        return model.model_validate(dict(given))
    except ValidationError as exc:
        from vmconv_fleet.catalogue.complaints import complaint

        raise Refusal(f"{what}: {complaint(exc.errors())}") from exc


def _own(context: Context, kind: str, identifier: str) -> Record:
    record = context.get(context.node, kind, identifier)
    if record is None:
        raise Refusal(f"{kind} {identifier} does not exist on this node")
    return record


# Conversions


def _convert(context: Context, request: IncomingRequest, wanted: Convert) -> Outcome:
    from vmconv_fleet.catalogue.kinds import DiskBody

    identifier = wanted.job or request.id
    before = context.get(context.node, "job", identifier)
    if before:
        return _again(before, "disk", wanted.disk, wanted)
    record, fields = _source(context, "disk", wanted.disk, wanted)
    disk = DiskBody.model_validate(record.body)
    for policy in _policies(context, wanted.of):
        refuse_ruled_out(policy, wanted.format, keep_source=wanted.keep_source)
        fields |= _ruled(policy)
    _refuse_format(context, wanted.format)
    _refuse_trap(context, disk.name, wanted)
    return _queued(context, request, identifier, wanted, {"source": disk.name, **wanted.spec(), **fields})


def _convert_machine(context: Context, request: IncomingRequest, wanted: ConvertMachine) -> Outcome:
    from vmconv_fleet.catalogue.conversion import MachineSpec
    from vmconv_fleet.catalogue.kinds import VmBody

    identifier = wanted.job or request.id
    before = context.get(context.node, "job", identifier)
    if before:
        return _again(before, "vm", wanted.vm, wanted)
    record, fields = _source(context, "vm", wanted.vm, wanted)
    vm = VmBody.model_validate(record.body)
    if not wanted.keep_source:
        raise Refusal("the conversion of a machine keeps its source")
    disk_format = _disk_format(context, wanted)
    for policy in _policies(context, wanted.of):
        refuse_ruled_out(policy, disk_format, keep_source=True)
        fields |= _ruled(policy)
    _refuse_format(context, disk_format)
    _refuse_trap(context, vm.file, wanted)
    machine = {name: getattr(wanted, name) for name in MachineSpec.model_fields}
    return _queued(context, request, identifier, wanted, {"source": vm.file, **wanted.spec(), **machine, **fields})


def _source(
    context: Context, kind: str, identifier: str, wanted: Convert | ConvertMachine
) -> tuple[Record, dict[str, Any]]:
    """Returns the record of the source, and the fields of a job that name it.

    The source is this node's own, or another's, on storage where that one has appointed this node.
    """
    from vmconv_fleet.catalogue.appointing import own_datastore

    of = wanted.of if wanted.of != context.node else None
    record = _own(context, kind, identifier) if of is None else context.get(of, kind, identifier)
    if record is None:
        raise Refusal(f"{kind} {identifier} of node {of} is not known here")
    if problem := record.body.get("problem"):
        raise Refusal(f"{kind} {identifier} cannot be read: {problem}")
    if of is None:
        return record, {kind: identifier, "datastore": record.body["datastore"]}
    mine = own_datastore(context, context.node, of, record)
    if wanted.target_datastore is not None or not wanted.keep_source:
        raise Refusal(f"for another node a target is made beside its source, which stays: ask node {of}")
    return record, {kind: identifier, "of": of, "datastore": mine}


def _policies(context: Context, of: str | None) -> list[PolicyBody]:
    """Returns the policies of this node, and of the owner of a source that is not its own."""
    return [policy_of(node, context) for node in dict.fromkeys((of or context.node, context.node))]


def _queued(
    context: Context,
    request: IncomingRequest,
    identifier: str,
    wanted: Convert | ConvertMachine,
    fields: Mapping[str, Any],
) -> Outcome:
    """Returns the outcome of a permitted conversion: a new job with these fields."""
    from vmconv_fleet.catalogue.kinds import JobBody, Principal

    for name in () if "of" in fields else (fields["datastore"], wanted.target_datastore):
        if name is not None:
            _refuse_of_another(context, name)
    source, target = str(_own(context, "datastore", fields["datastore"]).body["path"]), None
    if wanted.target_datastore is not None:
        target = str(_own(context, "datastore", wanted.target_datastore).body["path"])
    refuse_beside(source, target, keeps=wanted.keep_source)
    _refuse_windows(context, fields)
    if context.count("job", OPEN) >= MAX_OPEN_JOBS:
        raise Refusal(f"this node already has {MAX_OPEN_JOBS} jobs that have not ended")
    by = Principal.model_validate(request.by)
    # Disks name others as their parents, also those in datastores that are not the caller's.
    within = rights_of(by, context, context.now).only_in(context.node, VERBS[request.verb])
    if within is not None and "of" in fields:
        # The caller's rights are those in the owner's datastore, which is this one.
        within = [fields["datastore"]]
    groups = groups_of(by, context)
    body = JobBody(state="queued", created_ms=context.now, by=by, within=within, groups=groups, **fields)
    return Outcome([Change("job", identifier, body.stated())], {"job": identifier})


def _refuse_windows(context: Context, fields: Mapping[str, Any]) -> None:
    """Raises Refusal if a job would never begin, or its time zone is unknown here."""
    from vmconv_fleet.catalogue.windows import next_open_ms, windows_of

    policy = context.get(context.node, "policy", POLICY)
    windows = windows_of(fields, policy.body if policy else {})
    if next_open_ms(windows, context.now) is None:
        raise Refusal(f"the windows {' and '.join(windows)} do not overlap: the job would never begin")


def _refuse_of_another(context: Context, datastore: str) -> None:
    """Raises Refusal if a datastore is not here, or belongs to another node or soon will."""
    body = _own(context, "datastore", datastore).body
    if (owner := body.get("owner", context.node)) != context.node:
        raise Refusal(f"datastore {datastore} belongs to node {owner}: ask that node")
    if "give_to" in body:
        raise Refusal(f"datastore {datastore} is being given to node {body['give_to']}")


def _again(before: Record, kind: str, source: str, wanted: Convert | ConvertMachine) -> Outcome:
    """Returns the outcome for a known id: the existing job."""
    # Disks of the same name in datastores of the same name have the same id on all nodes.
    of = wanted.of if wanted.of != before.owner else None
    same = (before.body.get(kind), before.body.get("of"), before.body["format"]) == (source, of, wanted.format)
    if not same:
        raise Refusal(f"job {before.id} is a different conversion")
    return Outcome((), {"job": before.id, "state": before.body["state"]})


def _refuse_trap(context: Context, source: str, wanted: Convert | ConvertMachine) -> None:
    """Raises Refusal if the owner's policy would give the target a name that is a trap, such as that of the source."""
    policy = policy_of(wanted.of or context.node, context)
    stem = os.path.splitext(os.path.basename(source))[0]
    name = wanted.target or policy.naming.format(
        stem=stem, suffix=f".{wanted.format}", format=wanted.format, job=wanted.job or "job"
    )
    if problem := trap_in(name):
        raise Refusal(f"the target would be called {name[:80]!r}, which {problem}", hint="name another target")


def _refuse_format(context: Context, name: str) -> None:
    """Raises Refusal for a format of disks that this node cannot write."""
    from vmconv_fleet.catalogue.kinds import CapabilitiesBody

    known = context.get(context.node, "capabilities", "installed")
    if known is None:
        return
    writable = sorted(key for key, one in CapabilitiesBody.model_validate(known.body).formats.items() if one.writes)
    if name not in writable:
        raise Refusal(f"this node cannot write {name}; it writes {', '.join(writable)}")


def _disk_format(context: Context, wanted: ConvertMachine) -> str:
    """Returns the format of a machine's new disks. Raises Refusal for a machine format that this node cannot write."""
    from vmconv_fleet.catalogue.kinds import CapabilitiesBody

    known = context.get(context.node, "capabilities", "installed")
    machines = CapabilitiesBody.model_validate(known.body if known else {}).machines
    writable = {name: one.disks for name, one in machines.items() if one.writes}
    if wanted.format not in writable:
        have = ", ".join(sorted(writable)) or "none"
        raise Refusal(f"this node cannot write {wanted.format} machines; it writes {have}")
    return wanted.disk_format or writable[wanted.format]


def _ruled(policy: PolicyBody) -> dict[str, Any]:
    """Returns the fields of a job from the policy."""
    return {"zero_copy": "require"} if policy.zero_copy == "require" else {}


def _cancel(context: Context, _request: IncomingRequest, wanted: Cancel) -> Outcome:
    record = _own(context, "job", wanted.job)
    state = record.body["state"]
    ends_itself = state == "planned" and record.body.get("dry_run")
    if ends_itself or state in ("done", "failed", "cancelled"):
        raise Refusal(f"job {wanted.job} is already {state}")
    changed = {**record.body, "cancel": True}
    if state == "queued":
        changed |= {"state": "cancelled", "ended_ms": context.now}
    return Outcome([Change("job", wanted.job, changed)], {"job": wanted.job, "state": changed["state"]})


# Datastores


def _scan(context: Context, _request: IncomingRequest, wanted: Scan) -> Outcome:
    if wanted.datastore is not None:
        due = [_own(context, "datastore", wanted.datastore)]
    else:
        due = context.find("datastore", context.node)
    changes = [Change("datastore", one.id, {**one.body, "scan_asked_ms": context.now}) for one in due]
    return Outcome(changes, {"datastores": [one.id for one in due]})


def _add_datastore(context: Context, _request: IncomingRequest, wanted: DatastoreAdd) -> Outcome:
    if context.get(context.node, "datastore", wanted.name):
        raise Refusal(f"datastore {wanted.name} already exists")
    for other in context.find("datastore", context.node):
        if _overlap(other.body["path"], wanted.path):
            raise Refusal(f"{wanted.path} and {other.body['path']} of datastore {other.id} overlap")
    body = {"path": wanted.path, "scan_asked_ms": context.now, "scanned_ms": 0}
    return Outcome([Change("datastore", wanted.name, body)], {"datastore": wanted.name})


def _overlap(one: str, other: str) -> bool:
    one, other = one.rstrip("/") + "/", other.rstrip("/") + "/"
    return one.startswith(other) or other.startswith(one)


def _give_datastore(context: Context, _request: IncomingRequest, wanted: DatastoreGive) -> Outcome:
    record = _own(context, "datastore", wanted.name)
    storage, owner = record.body.get("storage"), record.body.get("owner")
    if owner != context.node:
        raise Refusal(f"datastore {wanted.name} is not this node's to give: it belongs to {owner or 'no node'}")
    there = [one.id for one in context.find("datastore", wanted.to) if one.body.get("storage") == storage]
    if not there:
        raise Refusal(f"node {wanted.to} does not see this storage", hint="declare it there first")
    uses = OPEN.also("? IN (datastore, target_datastore)", wanted.name)
    if count := context.count("job", uses):
        raise Refusal(f"{count} jobs in datastore {wanted.name} have not ended")
    changed = {**record.body, "give_to": wanted.to, "scan_asked_ms": context.now}
    return Outcome([Change("datastore", wanted.name, changed)], {"datastore": there[0]})


def _appoint(context: Context, _request: IncomingRequest, wanted: DatastoreAppoint) -> Outcome:
    record = _own(context, "datastore", wanted.name)
    owner = record.body.get("owner")
    if owner != context.node:
        raise Refusal(f"datastore {wanted.name} is not this node's to convert: it belongs to {owner or 'no node'}")
    nodes = sorted({*wanted.nodes} - {context.node})
    return Outcome([Change("datastore", wanted.name, {**record.body, "converters": nodes})], {"converters": nodes})


def _take_datastore(context: Context, _request: IncomingRequest, wanted: DatastoreTake) -> Outcome:
    record = _own(context, "datastore", wanted.name)
    owner = record.body.get("owner", context.node)
    if owner == context.node:
        raise Refusal(f"datastore {wanted.name} belongs to this node already")
    storage = record.body.get("storage")
    if any(one.body.get("storage") == storage for one in context.find("datastore", owner)):
        raise Refusal(f"node {owner} owns it and is not retired", hint="it gives its storage, or is retired first")
    changed = {**record.body, "take": True, "scan_asked_ms": context.now}
    return Outcome([Change("datastore", wanted.name, changed)], {"datastore": wanted.name})


def _remove_datastore(context: Context, _request: IncomingRequest, wanted: DatastoreRemove) -> Outcome:
    _own(context, "datastore", wanted.name)
    uses = OPEN.also("state = 'running' AND ? IN (datastore, target_datastore)", wanted.name)
    if running := context.count("job", uses):
        raise Refusal(f"{running} jobs are running in datastore {wanted.name}")
    # The scanner removes the datastore's disks, which are many.
    return Outcome([Change("datastore", wanted.name, None)], {"datastore": wanted.name})


# Rules, people and nodes


def _set_policy(context: Context, _request: IncomingRequest, wanted: PolicySet) -> Outcome:
    before = context.get(context.node, "policy", POLICY)
    body = {**(before.body if before else {}), **wanted.given()}
    if wanted.between is not None:
        from vmconv_fleet.catalogue.windows import parsed

        parsed(wanted.between)
    heard = body.get("administrators_of")
    if heard is not None and context.node not in heard:
        body["administrators_of"] = [*heard, context.node]
    return Outcome([Change("policy", POLICY, body)], {"policy": body})


def _resume(_context: Context, _request: IncomingRequest, wanted: Resume) -> Outcome:
    """Records the decision, which the replica has followed already: otherwise it would execute nothing."""
    return Outcome((), wanted.given())


def _create_token(context: Context, request: IncomingRequest, wanted: TokenCreate) -> Outcome:
    if context.get(context.node, "token", wanted.id):
        raise Refusal(f"token {wanted.id} already exists")
    body = {
        **wanted.model_dump(mode="json", exclude_none=True, exclude={"id"}),
        "created_ms": context.now,
        "by": dict(request.by),
    }
    return Outcome([Change("token", wanted.id, body)], {"token": wanted.id})


def _revoke_token(context: Context, _request: IncomingRequest, wanted: TokenRevoke) -> Outcome:
    record = _own(context, "token", wanted.id)
    return Outcome([Change("token", wanted.id, {**record.body, "revoked": True})], {"token": wanted.id})


def _add_webhook(context: Context, request: IncomingRequest, wanted: WebhookAdd) -> Outcome:
    if request.requester != context.node:
        raise Refusal("a webhook is added at its own node, which keeps its secret", hint="--node names that node")
    if context.get(context.node, "webhook", wanted.id):
        raise Refusal(f"webhook {wanted.id} already exists")
    body = {
        **wanted.model_dump(mode="json", exclude={"id"}),
        "created_ms": context.now,
        "by": dict(request.by),
    }
    return Outcome([Change("webhook", wanted.id, body)], {"webhook": wanted.id})


def _remove_webhook(context: Context, _request: IncomingRequest, wanted: WebhookRemove) -> Outcome:
    _own(context, "webhook", wanted.id)
    return Outcome([Change("webhook", wanted.id, None)], {"webhook": wanted.id})


def _retire(directory: str, context: Context, _request: IncomingRequest, wanted: Retire) -> Outcome:
    """Retires a node: all nodes drop its records and accept none again."""
    if wanted.node == context.node:
        raise Refusal("a node cannot retire itself", hint="vmconv node leave, on it")
    from vmconv_fleet.trust.authority import Authority

    record = context.get(wanted.node, "node", wanted.node)
    name = str(record.body.get("name", ""))[:255] if record else ""
    authority = Authority.load(directory)
    body = authority.retirement(wanted.node, name=name, reason=wanted.reason, at_ms=context.now)
    revoked = _revocation(authority, context, wanted.node, None, retired=True)
    return Outcome([Change("retirement", wanted.node, body), revoked], {"node": wanted.node})


def _revoke(directory: str, context: Context, _request: IncomingRequest, wanted: Revoke) -> Outcome:
    if wanted.key_id is not None:
        _refuse_key(context, wanted.node, wanted.key_id)
    elif wanted.node == context.node:
        raise Refusal("a node cannot revoke itself")
    from vmconv_fleet.trust.authority import Authority

    change = _revocation(Authority.load(directory), context, wanted.node, wanted.key_id, retired=False)
    return Outcome([change], {"node": wanted.node, "key_id": wanted.key_id})


def _refuse_key(context: Context, node: str, key_id: str) -> None:
    """Raises Refusal for a key of another node, and for the one that this node signs with."""
    if not any((one.node, one.key_id) == (node, key_id) for one in context.certified_keys()):
        raise Refusal(f"node {node} has no key {key_id}", hint="vmconv node keys lists keys")
    newest = context.get(context.node, "heartbeat", context.node)
    if node == context.node and newest is not None and newest.key_id == key_id:
        hint = "vmconv node renew --new-keys, then revoke the old one"
        raise Refusal(f"this node signs with key {key_id}", hint=hint)


def _revocation(authority: Authority, context: Context, node: str, key_id: str | None, *, retired: bool) -> Change:
    """Returns a signed revocation."""
    position = context.positions().get(node)
    upto = [position.epoch, position.seq] if position else [0, 0]
    body = authority.revocation(node, key_id=key_id, upto=upto, retired=retired)
    return Change("revocation", key_id or node, body)
