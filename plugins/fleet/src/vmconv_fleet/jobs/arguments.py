"""What each verb takes: checked when it is asked for and again by the owner that executes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from vmconv_fleet.catalogue.kinds import Identifier, Milliseconds, Name, NodeId, Role
from vmconv_fleet.catalogue.places import refuse_as_file_name


def _file_name(name: str) -> str:
    from vmconv.plugin import AccessError

    try:
        refuse_as_file_name(name)
    except AccessError as exc:
        raise ValueError(str(exc)) from exc
    return name


def _absolute(path: str) -> str:
    if not path.startswith("/") or "\0" in path or "/../" in f"{path}/" or "/./" in f"{path}/":
        raise ValueError(f"{path!r} is not an absolute path without '.' and '..'")
    return path


_NAMING = r"^[^/\x00{}]*(\{(stem|suffix|format|job)\}[^/\x00{}]*)+$"

FileName = Annotated[str, AfterValidator(_file_name)]
DatastoreName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Option = Annotated[str, Field(max_length=255)]


class _Arguments(BaseModel):
    """What is not known is refused: a misspelt wish must not be taken for none."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Convert(_Arguments):
    """A conversion of a disk of the catalogue. `job` is an id of the asker's choice: the same again is the same job."""

    disk: Identifier
    format: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
    options: Annotated[dict[Option, Option], Field(max_length=64)] = {}
    target: FileName | None = None
    target_datastore: DatastoreName | None = None
    zero_copy: Literal["auto", "require"] = "auto"
    keep_source: bool = True
    dry_run: bool = False
    at_ms: Milliseconds | None = None
    batch: Identifier | None = None
    max_parallel: Annotated[int, Field(ge=1, le=1000)] | None = None
    job: Identifier | None = None


class Cancel(_Arguments):
    job: Annotated[str, Field(min_length=1, max_length=128)]


class Scan(_Arguments):
    """A scan of one datastore, or of all."""

    datastore: DatastoreName | None = None


class DatastoreAdd(_Arguments):
    """A directory of the node that is asked; `path` without links."""

    name: DatastoreName
    path: Annotated[str, Field(max_length=4096), AfterValidator(_absolute)]


class DatastoreRemove(_Arguments):
    name: DatastoreName


class PolicySet(_Arguments):
    """Rules to change; those that are not named stay."""

    naming: Annotated[str, Field(pattern=_NAMING, max_length=200)] = "{stem}{suffix}"
    may_remove_source: bool = False
    zero_copy: Literal["auto", "require"] = "auto"
    max_parallel: Annotated[int, Field(ge=1, le=1000)] = 2
    formats: Annotated[list[Name], Field(max_length=64)] | None = None
    administrators_of: Annotated[list[NodeId], Field(max_length=1000)] | None = None


class TokenCreate(_Arguments):
    """A token that was made where its holder is connected: only its hash travels."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    label: Name
    role: Role
    expires_ms: Milliseconds | None = None


class TokenRevoke(_Arguments):
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]


class Retire(_Arguments):
    node: NodeId
    reason: Annotated[str, Field(max_length=255)] = ""


class Revoke(_Arguments):
    """The keys of a node, or one of them."""

    node: NodeId
    key_id: Annotated[str, Field(max_length=128)] | None = None


ARGUMENTS: Mapping[str, type[_Arguments]] = {
    "convert": Convert,
    "cancel": Cancel,
    "scan": Scan,
    "datastore-add": DatastoreAdd,
    "datastore-remove": DatastoreRemove,
    "policy-set": PolicySet,
    "token-create": TokenCreate,
    "token-revoke": TokenRevoke,
    "retire": Retire,
    "revoke": Revoke,
}
