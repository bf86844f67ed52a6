"""The policy of a node, as its record states it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmconv_fleet.replication.indexing import Where
from vmconv_fleet.replication.retention import DAY_MS, Ended, Keep

if TYPE_CHECKING:
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
