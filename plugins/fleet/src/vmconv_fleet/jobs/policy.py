"""The policy of a node, as its record states it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmconv_fleet.catalogue.places import is_container
from vmconv_fleet.errors import Refusal
from vmconv_fleet.replication.indexing import Where
from vmconv_fleet.replication.retention import DAY_MS, Ended, Keep

if TYPE_CHECKING:
    from vmconv_fleet.catalogue.conversion import ConversionPolicy
    from vmconv_fleet.catalogue.kinds import PolicyBody
    from vmconv_fleet.trust.rights import Records

POLICY = "conversion"
"""The id of the record."""


ENDED = (Ended("job", Where("ended"), "ended_ms"),)
"""Records of the catalogue that are deleted once they are old."""


def kept_of(node: str, records: Records) -> Keep:
    """Returns how long a node keeps ended records, by its policy."""
    record = records.get(node, "policy", POLICY)
    # Not the model, which takes memory that a node without jobs does not need.
    body = record.body if record else {}
    default = Keep()
    days, count = body.get("keep_days"), body.get("keep_records")
    return Keep(
        days * DAY_MS if isinstance(days, int) else default.age_ms, count if isinstance(count, int) else default.number
    )


def policy_of(node: str, records: Records) -> PolicyBody:
    """Returns the policy of a node; the defaults if it has no record."""
    # The models take memory that a node without jobs does not need.
    from vmconv_fleet.catalogue.kinds import PolicyBody

    record = records.get(node, "policy", POLICY)
    return PolicyBody.model_validate(record.body if record else {})


def refuse_ruled_out(policy: ConversionPolicy, format_name: str | None, *, keep_source: bool) -> None:
    """Raises Refusal if the policy keeps sources, or does not write the format of disks; None: a machine's own."""
    if not keep_source and not policy.may_remove_source:
        raise Refusal("the policy of this node keeps sources")
    if policy.formats is not None and format_name is not None and format_name not in policy.formats:
        allowed = ", ".join(policy.formats) or "nothing"
        raise Refusal(f"the policy of this node converts to {allowed}, not to {format_name}")


def refuse_beside(source: str, target: str | None, *, keeps: bool) -> None:
    """Raises Refusal for what is not possible in a container: a target in another datastore, or removing the source.

    `source` and `target` are the paths of datastores; None: that of the source.
    """
    if is_container(source):
        if target is not None:
            raise Refusal("in a container of objects a target is made beside its source")
        if not keeps:
            raise Refusal("objects share payload, so a source stays: vmconv unpublish removes it")
    elif target is not None and is_container(target):
        raise Refusal("a file is sent into a container of objects by its own node: vmconv publish")
