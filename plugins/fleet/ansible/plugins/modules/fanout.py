#!/usr/bin/python
"""Ansible module: makes several disk images from one disk of the catalogue, once."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmconv.fleet.plugins.module_utils.asking import ARGUMENTS, FleetError, Node
from ansible_collections.vmconv.fleet.plugins.module_utils.conversions import (
    TARGET,
    Conversion,
    converge,
    described,
    difference,
)

DOCUMENTATION = r"""
module: fanout
short_description: Make several disk images of one disk, once
description:
  - Requests the conversions of one disk of a vmconv fleet to several targets, and waits until all are in the catalogue.
  - Only the missing targets are made. A target is there if it has the format and the size of the source.
extends_documentation_fragment: vmconv.fleet.node
options:
  disk:
    description: The source, C(NODE:NAME) with its path below the datastore, or its id in the catalogue.
    type: str
    required: true
  targets:
    description: The images to make, with different names.
    type: list
    elements: dict
    required: true
    suboptions:
      format:
        description: The format of the target, such as C(qcow2).
        type: str
        required: true
      target:
        description: The name of the file to make, beside the source or in I(target_datastore).
        type: str
        required: true
      target_datastore:
        description: The datastore of the target, on the node of the source.
        type: str
      options:
        description: Options of the format.
        type: dict
        default: {}
  zero_copy:
    description: C(require) fails instead of copying.
    type: str
    choices: [auto, require]
    default: auto
attributes:
  check_mode:
    support: full
    description: Looks for the targets, and requests nothing.
  diff_mode:
    support: full
    description: Shows the targets to make.
author: The vmconv authors (@vmconv)
"""

EXAMPLES = r"""
- name: web is there for each hypervisor
  vmconv.fleet.fanout:
    node: https://n01.dc.example:7449
    token: "{{ fleet_token }}"
    disk: n01:web.vmdk
    targets:
      - {format: qcow2, target: web.qcow2}
      - {format: vhdx, target: web.vhdx, target_datastore: hyperv}
"""

RETURN = r"""
targets:
  description: The targets in the catalogue, in the order of the option; null for one that check mode does not make.
  returned: success
  type: list
  elements: dict
"""

_OWN = {
    "disk": {"type": "str", "required": True},
    "targets": {"type": "list", "elements": "dict", "required": True, "options": TARGET},
    "zero_copy": {"type": "str", "choices": ["auto", "require"], "default": "auto"},
}


def main() -> None:
    module = AnsibleModule({**ARGUMENTS, **_OWN}, supports_check_mode=True)
    wishes = [one | {"zero_copy": module.params["zero_copy"]} for one in module.params["targets"]]
    if len({(one["target_datastore"], one["target"]) for one in wishes}) < len(wishes):
        module.fail_json(msg="targets: two have the same name")
    try:
        node = Node(module.params)
        source = node.disk(module.params["disk"])
        done = converge([Conversion(node, source, one) for one in wishes], check=module.check_mode)
    except FleetError as exc:
        module.fail_json(msg=str(exc))
    targets = [None if one is None else described(one) for one in done.after]
    module.exit_json(changed=done.changed, targets=targets, diff=difference(wishes, done))


if __name__ == "__main__":
    main()
