"""The policy of a node, as its record states it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmconv_fleet.catalogue.kinds import PolicyBody
    from vmconv_fleet.trust.roles import Records

POLICY = "conversion"
"""The id of the record."""


def policy_of(node: str, records: Records) -> PolicyBody:
    """Returns the policy of a node; the defaults if it has no record."""
    # The models take memory that a node without jobs does not need.
    from vmconv_fleet.catalogue.kinds import PolicyBody

    record = records.get(node, "policy", POLICY)
    return PolicyBody.model_validate(record.body if record else {})
