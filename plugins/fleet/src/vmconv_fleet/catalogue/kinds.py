"""The bodies of records by kind: the schema shared by all nodes of a fleet.

The writer of a body checks it. Readers preserve unknown fields of newer nodes, and replicate unknown kinds. So a field
is never renamed and never changes its meaning. A new field increments `SCHEMA`; a transaction states its owner's
revision.

Times are milliseconds since 1970 and their names end with `_ms`; sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vmconv_fleet.catalogue.conversion import ConversionPolicy, ConversionSpec, MachineSpec
from vmconv_fleet.catalogue.fields import (
    HASH,
    Bytes,
    Count,
    DatastoreName,
    DatastoreReference,
    GroupName,
    Identifier,
    Milliseconds,
    Name,
    NodeId,
)
from vmconv_fleet.catalogue.terms import SCHEMA, Role

MAX_CONVERTERS = 1000
"""Nodes that one datastore may have to convert its disks, besides its owner."""

JobState = Literal["queued", "planned", "running", "done", "failed", "cancelled"]


class Body(BaseModel):
    """The body of a record. Unknown fields are kept."""

    model_config = ConfigDict(frozen=True, extra="allow", defer_build=True)

    def plain(self) -> dict[str, Any]:
        """Returns the body as JSON types, without fields that are None."""
        return self.model_dump(mode="json", exclude_none=True)

    def stated(self) -> dict[str, Any]:
        """Returns the fields that were set, as JSON types and without None: the body of a record."""
        return self.model_dump(mode="json", exclude_none=True, exclude_unset=True)


class NodeBody(Body):
    """A node; the id of the record is the node's own. `api` is the address for administrators, if there is one.

    `links` are the addresses, HOST:PORT, where other nodes connect, `authority` those where nodes join and renew, if
    the node holds the fleet's authority.
    """

    name: Name
    fleet: Name
    version: str = ""
    api: str | None = None
    addresses: list[str] = []
    links: list[str] = []
    authority: list[str] = []
    started_ms: Milliseconds = 0
    schema_revision: Annotated[int, Field(ge=0)] = SCHEMA
    retired: bool = False


class HeartbeatBody(Body):
    """Liveness, replication positions and problems of a node."""

    at_ms: Milliseconds
    interval_s: Annotated[float, Field(gt=0, le=3600)]
    positions: dict[str, tuple[int, int]] = {}
    neighbours: list[str] = []
    problems: list[str] = []
    memory: Bytes | None = None


class FormatCapability(Body):
    """What a node can do with a format."""

    title: str = ""
    reads: bool = False
    writes: bool = False


class MachineCapability(FormatCapability):
    """What a node can do with a machine format; `disks` is the format of the disks of new machines."""

    disks: str = ""


class CapabilitiesBody(Body):
    """The formats of disks and of machines that are installed on a node, by name."""

    vmconv: str = ""
    formats: dict[str, FormatCapability] = {}
    machines: dict[str, MachineCapability] = {}


class BackendCapability(Body):
    """Whether storage can use a backend, and the block size for sharing; `unit` 0: it cannot share."""

    usable: bool
    reason: str | None = None
    unit: Annotated[int, Field(ge=0)] = 0


class DatastoreBody(Body):
    """A directory, or a container of objects (`path` is its URL), whose disks its node lists and converts.

    A scan is due unless `scan_answered_ms` is
    `scan_asked_ms`; the clock may have jumped between the two.

    `storage` is the same for all nodes that see this directory, and `owner` lists and converts its disks; `owners` are
    all so far. The next scan gives the storage to `give_to`, or takes it from a retired owner. `converters` are the
    other nodes that may convert its disks, on their own mounts, while this node owns it.
    """

    path: Annotated[str, Field(min_length=1, max_length=4096)]
    filesystem: str = ""
    backends: dict[str, BackendCapability] = {}
    size: Bytes = 0
    free: Bytes = 0
    disks: Count = 0
    scanned_ms: Milliseconds = 0
    scan_asked_ms: Milliseconds | None = None
    scan_answered_ms: Milliseconds | None = None
    problem: str | None = None
    storage: str | None = None
    owner: NodeId | None = None
    owners: list[dict[str, Any]] = []
    give_to: NodeId | None = None
    take: bool = False
    converters: Annotated[list[NodeId], Field(max_length=MAX_CONVERTERS)] = []


class ChainLayer(Body):
    """One image of a chain, named as the image above names it; `disk` is its id in the catalogue, if it has one."""

    name: str
    format: str = ""
    disk: str | None = None


class DiskBody(Body):
    """A disk image in a datastore. `name` is its path below the datastore; `chain` are the images below it, nearest
    first. `version` is that of an object that was read.

    `problem`: why the image cannot be read; other fields may then be missing. `in_use`: it is open for writing.
    """

    datastore: Name
    name: Annotated[str, Field(min_length=1, max_length=4096)]
    format: str = ""
    virtual_size: Bytes = 0
    actual_size: Bytes = 0
    identity: str | None = None
    chain: list[ChainLayer] = []
    in_use: bool = False
    changed_ms: Milliseconds = 0
    version: Annotated[str, Field(max_length=255)] | None = None
    warnings: list[str] = []
    problem: str | None = None


class VmDisk(Body):
    """A disk of a virtual machine, as its configuration names it; `name` is empty for a disk without a file.

    `disk` is its id in the catalogue, if it has one, `capacity` the bytes that the guest sees, if stated.
    """

    name: str
    disk: str | None = None
    capacity: Bytes | None = None


class VmNic(Body):
    """A network card of a virtual machine; `network` is the name of what it is connected to."""

    mac: str = ""
    network: str = ""


class VmBody(Body):
    """A virtual machine, defined by a file in a datastore: what its configuration states.

    `system` is the guest's operating system as the configuration says it, `os` its short id of libosinfo. `format` is
    the machine format. `packaged`: the disks are in `file`. `problem`: why the configuration cannot be read; other
    fields are missing then.
    """

    datastore: Name
    file: Annotated[str, Field(min_length=1, max_length=4096)]
    name: str
    format: str = ""
    system: str = ""
    os: str = ""
    memory: Bytes | None = None
    processors: Count | None = None
    firmware: str = ""
    disks: list[VmDisk] = []
    nics: list[VmNic] = []
    packaged: bool = False
    problem: str | None = None


class Principal(Body):
    """The caller of a request: a token's holder, or the local administrator of a node (`token` None) named `user`.

    `address` is where a token's holder connects from, as the node sees it. `issuer` and `subject` are those of a person
    who has signed in.
    """

    node: NodeId
    token: str | None = None
    user: str = ""
    address: Annotated[str, Field(max_length=64)] | None = None
    issuer: str | None = None
    subject: str | None = None


class PlannedCopy(Body):
    reason: str
    bytes: Bytes
    ranges: Count = 1


class Strip(Body):
    """A disk or a file in equal parts: a letter of `parts` tells what most of each is.

    h is not allocated, z zero, p payload, b payload of a layer below, k compressed or encoded payload; of a file to
    make, s is shared, c copied, m metadata.
    """

    title: Annotated[str, Field(max_length=200)] = ""
    size: Bytes = 0
    parts: Annotated[str, Field(max_length=400, pattern="^[a-z]*$")] = ""


class JobPlan(Body):
    """The bytes that a conversion shares, copies and writes, and the reasons for copying.

    `losses` are what the target does not get, `changes` the settings of a machine that get another value. `strips` are
    the files that a disk becomes, and `source` is the disk, in a dry run.
    """

    backend: str = ""
    shared: Bytes = 0
    copied: Bytes = 0
    written: Bytes = 0
    zero: Bytes = 0
    referenced: Bytes = 0
    copies: list[PlannedCopy] = []
    losses: list[str] = []
    changes: list[str] = []
    files: list[str] = []
    source: Strip | None = None
    strips: Annotated[list[Strip], Field(max_length=16)] = []


class Progress(Body):
    """The bytes copied and written so far, and in total."""

    done: Bytes = 0
    total: Bytes = 0


class JobEvent(Body):
    """A line of a job's log."""

    at_ms: Milliseconds
    text: Annotated[str, Field(max_length=1000)]


class JobBody(ConversionSpec, MachineSpec, Body):
    """A requested conversion of a disk or of a virtual machine, executed once.

    `disk` or `vm`, `source` and `datastore` name the source. The disk is the node `of`'s, or this node's (None).
    `cancel` requests the job's end. A dry run ends in the state `planned`. `attempts` counts the starts.
    `recovered`: the job was found done after its node had died. `file` is the name of the target; for a machine the
    directory and the name of the new configuration. `within` are the datastores whose files it may open, those of
    its caller; None: all. `groups` are those of a caller who has signed in: what they may do when the job begins is
    what counts, also after the session. `log` has a line for each step, the last ones.
    """

    state: JobState = "queued"
    disk: Identifier | None = None
    of: NodeId | None = None
    vm: Identifier | None = None
    source: str = ""
    datastore: Name
    file: str | None = None
    by: Principal | None = None
    created_ms: Milliseconds = 0
    started_ms: Milliseconds | None = None
    ended_ms: Milliseconds | None = None
    attempts: Count = 0
    cancel: bool = False
    within: list[DatastoreName] | None = None
    groups: Annotated[list[GroupName], Field(max_length=64)] | None = None
    recovered: bool = False
    plan: JobPlan | None = None
    progress: Progress | None = None
    seconds: float | None = None
    warnings: list[str] = []
    error: str | None = None
    hint: str | None = None
    log: list[JobEvent] = []

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.disk is None) == (self.vm is None):
            raise ValueError("a job converts a disk or a vm")
        return self


class PolicyBody(ConversionPolicy, Body):
    """The policy of a node, id `conversion`."""


class Granted(BaseModel):
    """A role on all nodes, and higher roles in some datastores."""

    role: Role
    datastores: Annotated[dict[DatastoreReference, Role], Field(max_length=256)] = {}


class TokenSpec(Granted):
    """A person's token, without the token itself: `hash` is its SHA-256."""

    label: Name
    hash: Annotated[str, Field(pattern=HASH)]
    expires_ms: Milliseconds | None = None


class Person(BaseModel):
    """A person who has signed in at an OpenID provider; `groups` are those that had a role then."""

    issuer: Annotated[str, Field(min_length=1, max_length=512)]
    subject: Annotated[str, Field(min_length=1, max_length=255)]
    groups: Annotated[list[GroupName], Field(max_length=64)]


class TokenBody(TokenSpec, Body):
    """A person's token. The id is a part of the token.

    With a `person` it is a session, and the roles of the groups are what counts, as its owner's records of groups
    state them.
    """

    created_ms: Milliseconds = 0
    revoked: bool = False
    by: Principal | None = None
    person: Person | None = None


class GroupSpec(Granted):
    """What the people of a group may do, if they sign in at this node."""

    group: GroupName


class GroupBody(GroupSpec, Body):
    """A group of people; the id is a hash of its name."""


class WebhookBody(Body):
    """A webhook of the record's node: `place` is the beginning of its URL, `events` are patterns of their types.

    URL and secret are in a file of the node, and in no record.
    """

    place: Annotated[str, Field(min_length=1, max_length=300)]
    events: Annotated[list[Name], Field(max_length=32)] = []
    created_ms: Milliseconds = 0
    by: Principal | None = None


class RequestBody(Body):
    """A request to `target` for a change of its records."""

    target: NodeId
    verb: Name
    arguments: dict[str, Any] = {}
    by: Principal


class ResponseBody(Body):
    """The response to a request: executed in a `transaction`, or refused for a `reason`."""

    request: str
    requester: NodeId
    ok: bool
    reason: str | None = None
    body: dict[str, Any] = {}
    transaction: Count | None = None
    late: bool = False


class TransactionChange(Body):
    """One record before and after; None: it did not exist, or was deleted."""

    kind: str
    id: str
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None


class TransactionBody(Body):
    """An executed request; `number` grows by one with each, on each node. `position` is that of the request."""

    number: Count
    position: list[int] = []
    schema_revision: Annotated[int, Field(ge=0)] = SCHEMA
    request: str
    requester: NodeId
    verb: str = ""
    by: Principal | None = None
    at_ms: Milliseconds = 0
    late: bool = False
    changes: list[TransactionChange] = []


class CertificateBody(Body):
    """A node's public key, signed by the fleet's authority; the id is the key's id."""

    pem: str


class RetirementBody(Body):
    """A node that has left permanently, signed by the authority, as is the revocation that drops its records."""

    node: NodeId
    name: str = ""
    reason: str = ""
    at_ms: Milliseconds = 0
    signature: str = ""


class RevocationBody(Body):
    """Revokes the keys of a node (`key_id` None: all) for records beyond a position."""

    node: NodeId
    key_id: str | None = None
    upto: tuple[int, int] | None = None


KINDS: Mapping[str, type[Body]] = {
    "node": NodeBody,
    "heartbeat": HeartbeatBody,
    "capabilities": CapabilitiesBody,
    "datastore": DatastoreBody,
    "disk": DiskBody,
    "vm": VmBody,
    "job": JobBody,
    "policy": PolicyBody,
    "token": TokenBody,
    "webhook": WebhookBody,
    "group": GroupBody,
    "request": RequestBody,
    "response": ResponseBody,
    "transaction": TransactionBody,
    "certificate": CertificateBody,
    "revocation": RevocationBody,
    "retirement": RetirementBody,
}
