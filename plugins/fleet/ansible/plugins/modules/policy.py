#!/usr/bin/python
"""Ansible module: the rules of a node."""

from __future__ import annotations

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmconv.fleet.plugins.module_utils.asking import ARGUMENTS, FleetError, Node

DOCUMENTATION = r"""
module: policy
short_description: Set how a node of a vmconv fleet converts
description:
  - Sets the given rules of a node. The others stay.
  - A rule that the node's record does not state is set, even to its default.
extends_documentation_fragment: vmconv.fleet.node
options:
  of:
    description: The node whose rules these are, by name or id.
    type: str
    required: true
  naming:
    description: Names of targets, from C({stem}), C({suffix}), C({format}) and C({job}).
    type: str
  max_parallel:
    description: Conversions at a time.
    type: int
  zero_copy:
    description: With C(require) no conversion copies payload.
    type: str
    choices: [auto, require]
  may_remove_source:
    description: Whether jobs may remove sources.
    type: bool
  formats:
    description: Formats that may be written; the one item C(all) for any.
    type: list
    elements: str
  administrators_of:
    description: Nodes whose administrators are accepted, by name or id; the one item C(all) for any.
    type: list
    elements: str
  between:
    description: The window in which jobs begin, such as C(22:00-05:00); C(none) for any time.
    type: str
  datastore_parallel:
    description: Conversions at a time by datastore.
    type: dict
  bandwidth:
    description: Bytes per second by datastore.
    type: dict
  keep_days:
    description: Days to keep ended jobs and the history.
    type: int
  keep_records:
    description: Limit of ended jobs, and of transactions.
    type: int
attributes:
  check_mode:
    support: full
    description: Compares the rules, and changes nothing.
  diff_mode:
    support: full
    description: Shows the rules that change.
author: The vmconv authors (@vmconv)
"""

EXAMPLES = r"""
- name: n01 converts at night, and keeps sources
  vmconv.fleet.policy:
    node: https://n01.dc.example:7449
    token: "{{ fleet_token }}"
    of: n01
    between: 22:00-05:00
    may_remove_source: false
"""

RETURN = r"""
policy:
  description: The rules that the node's record states, after the task.
  returned: success
  type: dict
"""

_RULES: dict[str, dict[str, Any]] = {
    "naming": {"type": "str"},
    "max_parallel": {"type": "int"},
    "zero_copy": {"type": "str", "choices": ["auto", "require"]},
    "may_remove_source": {"type": "bool"},
    "formats": {"type": "list", "elements": "str"},
    "administrators_of": {"type": "list", "elements": "str"},
    "between": {"type": "str"},
    "datastore_parallel": {"type": "dict"},
    "bandwidth": {"type": "dict"},
    "keep_days": {"type": "int"},
    "keep_records": {"type": "int"},
}
_ANY: dict[str, Any] = {"formats": ["all"], "administrators_of": ["all"], "between": "none"}
"""The values that stand for no rule."""


def wished(node: Node, params: dict[str, Any], owner: str) -> dict[str, Any]:
    """Returns the given rules as the API takes them."""
    wish = {name: params[name] for name in _RULES if params[name] is not None}
    for name, none in _ANY.items():
        if wish.get(name) == none:
            wish[name] = None
    if wish.get("administrators_of") is not None:
        # The node always accepts its own.
        wish["administrators_of"] = sorted({owner, *map(node.id_of, wish["administrators_of"])})
    for name in ("datastore_parallel", "bandwidth"):
        if name in wish:
            wish[name] = {datastore: int(limit) for datastore, limit in wish[name].items()}
    return wish


def differ(stated: dict[str, Any], name: str, value: Any) -> bool:
    """Returns whether a rule has to be set; the order of lists means nothing."""
    if name not in stated:
        # The record of a rule that is reset may lack it.
        return value is not None
    found = stated[name]
    return bool(
        sorted(found) != sorted(value) if isinstance(found, list) and isinstance(value, list) else found != value
    )


def main() -> None:
    module = AnsibleModule({**ARGUMENTS, "of": {"type": "str", "required": True}, **_RULES}, supports_check_mode=True)
    try:
        node = Node(module.params)
        owner = node.id_of(module.params["of"])
        stated: dict[str, Any] = next((one["body"] for one in node.everything("/policies", node=owner)), {})
        wish = wished(node, module.params, owner)
        changes = {name: value for name, value in wish.items() if differ(stated, name, value)}
        if changes and not module.check_mode:
            node.send("PATCH", f"/nodes/{owner}/policy", changes)
    except (FleetError, ValueError) as exc:
        module.fail_json(msg=str(exc))
    diff = {"before": {name: stated.get(name) for name in changes}, "after": changes}
    module.exit_json(changed=bool(changes), policy={**stated, **changes}, diff=diff)


if __name__ == "__main__":
    main()
