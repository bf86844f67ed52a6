"""The arguments of each verb: checked by the node that takes the request and again by the owner that executes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from vmconv_fleet.catalogue.conversion import ConversionPolicy, ConversionSpec, MachineSpec
from vmconv_fleet.catalogue.fields import (
    DatastoreName,
    EventPattern,
    Identifier,
    Naming,
    NodeId,
    PlainName,
    TokenId,
    WebhookPlace,
)
from vmconv_fleet.catalogue.kinds import MAX_CONVERTERS, GroupSpec, TokenSpec
from vmconv_fleet.catalogue.places import is_container, refuse_as_container
from vmconv_fleet.words import trap_in


def _absolute(path: str) -> str:
    if is_container(path):
        refuse_as_container(path)
        return path
    if not path.startswith("/") or "\0" in path or "/../" in f"{path}/" or "/./" in f"{path}/":
        raise ValueError(f"{path!r} is not an absolute path without '.' and '..'")
    return path


def _harmless(naming: str) -> str:
    name = naming.format(stem="name", suffix=".suffix", format="format", job="job")
    if problem := trap_in(name):
        raise ValueError(f"{naming!r} makes names such as {name!r}, which {problem}")
    return naming


class Arguments(BaseModel):
    """The arguments of `verb`. Raises ValidationError for unknown fields, which may be misspelt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verb: ClassVar[str]

    def given(self) -> dict[str, Any]:
        """Returns the arguments that were set, as JSON types: the `arguments` of a request."""
        return self.model_dump(mode="json", exclude_unset=True)


class JobRequest(ConversionSpec, Arguments):
    """A conversion. `job` is an id chosen by the caller; the same id again is the same job."""

    verb: ClassVar[str] = "convert"

    job: Identifier | None = None


class Convert(JobRequest):
    """A conversion of a disk of the catalogue: one of the target node's own, or one `of` another, on shared storage."""

    disk: Identifier
    of: NodeId | None = None


class MachineJobRequest(ConversionSpec, MachineSpec, Arguments):
    """A conversion of a machine. `job` is as in a `JobRequest`."""

    verb: ClassVar[str] = "convert-machine"

    job: Identifier | None = None


class ConvertMachine(MachineJobRequest):
    """A conversion of a virtual machine of the catalogue: its configuration, firmware variables and disks.

    The machine is the target node's own, or one `of` another, on shared storage.
    """

    vm: Identifier
    of: NodeId | None = None


class Cancel(Arguments):
    verb: ClassVar[str] = "cancel"

    job: Annotated[str, Field(min_length=1, max_length=128)]


class Scan(Arguments):
    """A scan of one datastore, or of all."""

    verb: ClassVar[str] = "scan"

    datastore: DatastoreName | None = None


class DatastoreAdd(Arguments):
    """A directory of the target node, by a `path` without links, or a container of objects, by its URL."""

    verb: ClassVar[str] = "datastore-add"

    name: DatastoreName
    path: Annotated[str, Field(max_length=4096), AfterValidator(_absolute)]


class DatastoreRemove(Arguments):
    verb: ClassVar[str] = "datastore-remove"

    name: DatastoreName


class DatastoreGive(Arguments):
    """Gives the storage of a datastore to another node that sees it."""

    verb: ClassVar[str] = "datastore-give"

    name: DatastoreName
    to: NodeId


class DatastoreAppoint(Arguments):
    """Lets these nodes convert the disks of a datastore on shared storage, and no others besides its owner."""

    verb: ClassVar[str] = "datastore-appoint"

    name: DatastoreName
    nodes: Annotated[list[NodeId], Field(max_length=MAX_CONVERTERS)]


class DatastoreTake(Arguments):
    """Takes the storage of a datastore from its owner, which was retired."""

    verb: ClassVar[str] = "datastore-take"

    name: DatastoreName


class PolicySet(ConversionPolicy, Arguments):
    """Rules to change; the others stay."""

    verb: ClassVar[str] = "policy-set"

    naming: Annotated[Naming, AfterValidator(_harmless)] = "{stem}{suffix}"


class TokenCreate(TokenSpec, Arguments):
    """A token of the requesting node: only its hash is sent."""

    verb: ClassVar[str] = "token-create"

    id: TokenId
    label: PlainName


class TokenRevoke(Arguments):
    verb: ClassVar[str] = "token-revoke"

    id: TokenId


class WebhookAdd(Arguments):
    """A webhook of the node, which has its URL and secret already."""

    verb: ClassVar[str] = "webhook-add"

    id: TokenId
    place: WebhookPlace
    events: Annotated[list[EventPattern], Field(max_length=32)] = []


class WebhookRemove(Arguments):
    verb: ClassVar[str] = "webhook-remove"

    id: TokenId


class GroupSet(GroupSpec, Arguments):
    """A role for the people of a group who sign in at the target."""

    verb: ClassVar[str] = "group-set"


class GroupRemove(Arguments):
    verb: ClassVar[str] = "group-remove"

    id: Identifier


class Retire(Arguments):
    verb: ClassVar[str] = "retire"

    node: NodeId
    reason: Annotated[str, Field(max_length=255)] = ""


class Revoke(Arguments):
    """The keys of a node, or one of them."""

    verb: ClassVar[str] = "revoke"

    node: NodeId
    key_id: Annotated[str, Field(max_length=128)] | None = None


class Resume(Arguments):
    """The members whose later records of the node are given up, or the merging of its histories."""

    verb: ClassVar[str] = "resume"

    without: Annotated[list[NodeId], Field(max_length=4096)] = []
    alone: bool = False
    merge: bool = False


ARGUMENTS: Mapping[str, type[Arguments]] = {
    one.verb: one
    for one in (
        Convert,
        ConvertMachine,
        Cancel,
        Scan,
        DatastoreAdd,
        DatastoreRemove,
        DatastoreAppoint,
        DatastoreGive,
        DatastoreTake,
        PolicySet,
        Resume,
        TokenCreate,
        TokenRevoke,
        WebhookAdd,
        WebhookRemove,
        GroupSet,
        GroupRemove,
        Retire,
        Revoke,
    )
}
