"""Conversions and the policy about them: the one definition of their fields, limits and defaults.

Requests, records and the API's bodies inherit these fields; the worker gets the values.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from vmconv_fleet.catalogue.fields import (
    DatastoreName,
    FileName,
    FormatName,
    Identifier,
    Milliseconds,
    Name,
    Naming,
    NodeId,
    Option,
    Parallel,
    Rate,
    WindowText,
    ZeroCopy,
)


class BulkSpec(BaseModel):
    """The fields that conversions of several disks can share.

    The job begins at `at_ms` or later, and within the window `between`. No more than `max_parallel` jobs of one batch
    run on a node at a time.
    """

    format: FormatName
    options: Annotated[dict[Option, Option], Field(max_length=64)] = {}
    zero_copy: ZeroCopy = "auto"
    keep_source: bool = True
    dry_run: bool = False
    at_ms: Milliseconds | None = None
    between: WindowText | None = None
    max_parallel: Parallel | None = None


class ConversionSpec(BulkSpec):
    """A conversion of one disk, or of one machine.

    `target` is the name of the file to make, or of the directory for a machine; without it the node's policy makes the
    name. It goes to `target_datastore`, by default into the directory of the source. Jobs of one call share `batch`.
    """

    target: FileName | None = None
    target_datastore: DatastoreName | None = None
    batch: Identifier | None = None

    def spec(self) -> dict[str, Any]:
        """Returns the fields of this class, without those of a subclass."""
        return {name: getattr(self, name) for name in ConversionSpec.model_fields}


class MachineSpec(BaseModel):
    """The fields that only conversions of machines have; their `format` and `options` are those of a machine format.

    `disk_format` and `disk_options` are those of the new disks. `strict` refuses any loss, `keep` that of some fields.
    `uuid` chooses between the UUID that the guest sees and that in the configuration; `new_identity` gives the machine
    new UUID and MAC addresses.
    """

    disk_format: FormatName | None = None
    disk_options: Annotated[dict[Option, Option], Field(max_length=64)] = {}
    strict: bool = False
    keep: Annotated[list[Option], Field(max_length=64)] = []
    uuid: Literal["guest", "text"] = "guest"
    new_identity: bool = False


class ConversionPolicy(BaseModel):
    """The rules of a node, which no request overrides.

    `naming` makes a target's name from {stem}, {suffix} (with its dot), {format} and {job}. `may_remove_source` lets a
    job ask for the source's removal. `formats` are the formats that may be written; None: any. `administrators_of` are
    the nodes whose administrators may send requests; None: every node, except for acts that govern the node. Jobs that
    have ended and transactions are deleted after `keep_days`, or if there are more than `keep_records` of a kind.
    Jobs begin within the window `between`. `datastore_parallel` limits the jobs at a time of datastores, as source or
    target, and `bandwidth` the bytes per second that jobs copy and write there.
    """

    naming: Naming = "{stem}{suffix}"
    may_remove_source: bool = False
    zero_copy: ZeroCopy = "auto"
    max_parallel: Parallel = 2
    formats: Annotated[list[Name], Field(max_length=64)] | None = None
    administrators_of: Annotated[list[NodeId], Field(max_length=1000)] | None = None
    between: WindowText | None = None
    datastore_parallel: Annotated[dict[DatastoreName, Parallel], Field(max_length=64)] = {}
    bandwidth: Annotated[dict[DatastoreName, Rate], Field(max_length=64)] = {}
    keep_days: Annotated[int, Field(ge=7, le=36_500)] = 90
    keep_records: Annotated[int, Field(ge=100, le=1_000_000)] = 10_000
