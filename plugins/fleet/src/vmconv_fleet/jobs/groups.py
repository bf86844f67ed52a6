"""The handlers of the verbs about groups of people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmconv_fleet.errors import Refusal
from vmconv_fleet.replication.records import Change
from vmconv_fleet.replication.requests import Context, IncomingRequest, Outcome
from vmconv_fleet.trust.groups import KIND, group_id

if TYPE_CHECKING:
    from vmconv_fleet.jobs.arguments import GroupRemove, GroupSet

MAX_GROUPS = 1000


def set_group(context: Context, _request: IncomingRequest, wanted: GroupSet) -> Outcome:
    identifier = group_id(wanted.group)
    if context.get(context.node, KIND, identifier) is None and len(context.find(KIND, context.node)) >= MAX_GROUPS:
        raise Refusal(f"this node already has {MAX_GROUPS} groups")
    return Outcome([Change(KIND, identifier, wanted.given())], {"group": identifier})


def remove_group(context: Context, _request: IncomingRequest, wanted: GroupRemove) -> Outcome:
    if context.get(context.node, KIND, wanted.id) is None:
        raise Refusal(f"group {wanted.id} does not exist on this node")
    return Outcome([Change(KIND, wanted.id, None)], {"group": wanted.id})
