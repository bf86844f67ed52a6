"""The input of a worker: one conversion, with the paths and the rules of its node."""

from __future__ import annotations

from typing import Literal, NamedTuple

from vmconv_fleet.jobs.throttle import Bandwidth


class Task(NamedTuple):
    """A conversion of `name` below the datastore at `root`: a disk, or a machine's configuration (`is_machine`).

    Only files below `roots` may be touched. A container of objects has to belong to one of `owners`. `target` is the
    name of the file to make, or of the machine's directory, at `target_root` or beside the source (None); without it
    `naming` makes the name. `journal` is the path of the job's journal. `removable`: the source may be removed
    afterwards. Only machines have the fields between `removable` and `bandwidth`, which limits the datastores of source
    and target.
    """

    job: str
    root: str
    name: str
    roots: list[str]
    format: str
    options: dict[str, str]
    target: str | None
    target_root: str | None
    naming: str
    zero_copy: Literal["auto", "require"]
    journal: str
    dry_run: bool
    removable: bool
    is_machine: bool
    disk_format: str | None
    disk_options: dict[str, str]
    strict: bool
    keep: list[str]
    uuid: Literal["guest", "text"]
    new_identity: bool
    bandwidth: list[Bandwidth]
    owners: list[str]
