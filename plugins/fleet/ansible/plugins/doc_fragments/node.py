"""The options of all modules: the node to ask."""

from __future__ import annotations


class ModuleDocFragment:
    """Read by ansible-doc."""

    DOCUMENTATION = r"""
options:
  node:
    description:
      - The node to ask, C(https://HOST:7449) with I(token), or a node's directory on the machine where the module runs.
      - Any node of the fleet will do.
    type: str
    required: true
  token:
    description: The token for https. C(vmconv fleet token create) makes one.
    type: str
  ca:
    description: The certificate of the fleet's authority, for https. C(ca.pem) in each node's directory.
    type: path
  timeout:
    description: Seconds to wait for the owner of the record, and for the end of conversions.
    type: int
    default: 3600
"""
