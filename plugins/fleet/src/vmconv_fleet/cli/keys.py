"""The keys of nodes, by the certificates and revocations in the records of the fleet."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple
from urllib.parse import quote

from vmconv_fleet.cli.client import NodeClient

KeyState = Literal["in use", "unused", "revoked"]


class NodeKey(NamedTuple):
    """A key of a node; `until` is the end of its last certificate. A key in use signs the node's heartbeats."""

    node: str
    name: str
    key: str
    state: KeyState
    until: str


def keys_of(client: NodeClient, named: str | None) -> list[NodeKey]:
    """Returns the keys of a node, or of all nodes, by the name of the node."""
    names = {one["node"]: one["name"] for one in client.everything("/api/v1/nodes")}
    only = client.get(f"/api/v1/nodes/{quote(named, safe='')}")["node"] if named else None
    until: dict[tuple[str, str], str] = {}
    for record in client.everything("/api/v1/records/certificate"):
        place = str(record["body"].get("node")), record["id"]
        if only in (None, place[0]):
            until[place] = max(until.get(place, ""), _end(record["body"]))
    revoked = {(one["body"]["node"], one["body"]["key_id"]) for one in client.everything("/api/v1/records/revocation")}
    signing = {(one["owner"], one["key"]) for one in client.everything("/api/v1/records/heartbeat")}
    found = [
        NodeKey(node, names.get(node, node), key, _state(node, key, revoked, signing), end)
        for (node, key), end in until.items()
    ]
    return sorted(found, key=lambda one: (one.name, one.node, one.state, one.key))


def _state(node: str, key: str, revoked: set[tuple[Any, Any]], signing: set[tuple[Any, Any]]) -> KeyState:
    if {(node, key), (node, None)} & revoked:
        return "revoked"
    return "in use" if (node, key) in signing else "unused"


def _end(body: dict[str, Any]) -> str:
    """Returns the end of a certificate; replicas keep only those that can be read."""
    from cryptography import x509

    return x509.load_pem_x509_certificate(str(body["pem"]).encode()).not_valid_after_utc.isoformat(timespec="seconds")
