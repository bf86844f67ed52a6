#!/usr/bin/python
"""Ansible module: makes a disk image of another format from a disk of the catalogue, once."""

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
module: convert
short_description: Make a disk image of another format, once
description:
  - Requests the conversion of a disk of a vmconv fleet, and waits until the target is in the catalogue.
  - Nothing is changed if the target is there, with the format and the size of the source.
  - A conversion to the same target that is under way is not requested again.
extends_documentation_fragment: vmconv.fleet.node
options:
  disk:
    description: The source, C(NODE:NAME) with its path below the datastore, or its id in the catalogue.
    type: str
    required: true
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
    description: Looks for the target, and requests nothing.
  diff_mode:
    support: full
    description: Shows the target to make.
author: The vmconv authors (@vmconv)
"""

EXAMPLES = r"""
- name: web is a qcow2 image too
  vmconv.fleet.convert:
    node: https://n01.dc.example:7449
    token: "{{ fleet_token }}"
    ca: /etc/vmconv/ca.pem
    disk: n01:web.vmdk
    format: qcow2
    target: web.qcow2
"""

RETURN = r"""
target:
  description: The target in the catalogue; in check mode null if it is not there yet.
  returned: success
  type: dict
  sample: {"id": "4ee998591a02304a", "node": "n01", "datastore": "images", "name": "web.qcow2", "format": "qcow2"}
"""

_OWN = {
    "disk": {"type": "str", "required": True},
    "zero_copy": {"type": "str", "choices": ["auto", "require"], "default": "auto"},
}


def main() -> None:
    module = AnsibleModule({**ARGUMENTS, **TARGET, **_OWN}, supports_check_mode=True)
    wish = {name: module.params[name] for name in (*TARGET, "zero_copy")}
    try:
        node = Node(module.params)
        done = converge([Conversion(node, node.disk(module.params["disk"]), wish)], check=module.check_mode)
    except FleetError as exc:
        module.fail_json(msg=str(exc))
    (target,) = done.after
    module.exit_json(
        changed=done.changed, target=None if target is None else described(target), diff=difference([wish], done)
    )


if __name__ == "__main__":
    main()
