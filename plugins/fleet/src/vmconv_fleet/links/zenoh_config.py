"""The configuration of Zenoh: peers with mutual TLS only, which can put only on their own key.

vmconv/FLEET/link/FROM/TO    messages of FROM to its neighbour TO, over one link
vmconv/FLEET/link/FROM/all   messages of FROM to all its neighbours, by a single put
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from vmconv_fleet.config import NodeConfig

LEASE_MS = 3000
OPEN_TIMEOUT_MS = 1500
"""Short, because after a partition the next attempt succeeds."""
PER_MEMBER_MS = 200
"""Both grow with the fleet: keep-alives are most of a node's work at rest, and at the start of a fleet all members
connect at once, each with one attempt.
"""
LONGEST_MS = 10_000
BLOCKED_US = 500_000
MESH = 64
"""In a fleet of up to this many nodes all are linked with all."""
LIVE_BATCHES = 16
"""The number of batches of 64 KiB of live messages that may wait for a link before one is dropped. Zenoh's default, 2,
is less than one message.
"""
MAX_MESSAGE = 2 << 20
"""The largest message accepted from a peer, including Zenoh's headers."""


ALL = "all"


def link_key(fleet: str, sender: str, receiver: str) -> str:
    return f"vmconv/{fleet}/link/{sender}/{receiver}"


def zenoh_settings(config: NodeConfig, members: Iterable[str], connect: Iterable[str] | None = None) -> str:
    """Returns Zenoh's configuration as JSON; `members` are the nodes that may send to this one, `connect` the addresses
    to dial (default: the seeds of the settings).
    """
    others = sorted({*members} - {config.node})
    settings = {
        "mode": "peer",
        "id": config.node,
        "listen": {"endpoints": [f"tls/{address}" for address in config.listen], "exit_on_failure": True},
        "connect": {
            "endpoints": [f"tls/{address}" for address in (config.connect if connect is None else connect)],
            # Without limit, in the background: a fleet begins with its first node.
            "timeout_ms": -1,
            "exit_on_failure": False,
            "retry": {"period_init_ms": 500, "period_max_ms": 1000, "period_increase_factor": 2},
        },
        "scouting": {
            "multicast": {"enabled": False},
            # Only one of two nodes connects: half as many handshakes, and one link for each pair. Gossip links all with
            # all, which is too many in a large fleet.
            "gossip": {
                "enabled": config.gossip and len(others) < MESH,
                "autoconnect_strategy": {"peer": {"to_peer": "greater-zid"}},
            },
        },
        "transport": _transport(config, len(others)),
        "access_control": _access(config.fleet, config.node, others),
        "adminspace": {"enabled": False},
    }
    return json.dumps(settings)


def lease_ms(size: int) -> int:
    """Returns the silence after which a link ends, in a fleet with this many other nodes."""
    return _patience(LEASE_MS, size)


def _patience(least: int, size: int) -> int:
    return min(max(least, PER_MEMBER_MS * size), LONGEST_MS)


def _transport(config: NodeConfig, size: int) -> dict[str, Any]:
    certificate, key = config.credential("node.pem"), config.credential("tls.key")
    return {
        "unicast": {"open_timeout": _patience(OPEN_TIMEOUT_MS, size), "accept_timeout": LONGEST_MS},
        "shared_memory": {"enabled": False},
        "link": {
            "protocols": ["tls"],
            "tls": {
                "root_ca_certificate": config.path("ca.pem"),
                "listen_certificate": certificate,
                "listen_private_key": key,
                "connect_certificate": certificate,
                "connect_private_key": key,
                "enable_mtls": True,
                "verify_name_on_connect": True,
                "close_link_on_expiration": True,
            },
            "tx": {
                "lease": lease_ms(size),
                # By default a put waits five seconds for a dead peer.
                "queue": {
                    "size": {"interactive_high": LIVE_BATCHES},
                    "congestion_control": {"block": {"wait_before_close": BLOCKED_US}},
                },
            },
            "rx": {"max_message_size": MAX_MESSAGE},
        },
    }


def _access(fleet: str, node: str, members: list[str]) -> dict[str, Any]:
    """Returns the access rules: a neighbour may send under its own name, and this node likewise; all else is denied.

    A member is identified by its certificate. Zenoh reads the rules when a session opens: a new member needs a new
    session.
    """
    rules = [
        _rule("say", ["put"], "egress", link_key(fleet, node, "*")),
        _rule("subscribe", ["declare_subscriber"], "egress", *(link_key(fleet, "*", to) for to in (node, ALL))),
    ]
    # Zenoh refuses rules without a subject.
    for member in members or [node]:
        heard = [link_key(fleet, member, to) for to in (node, ALL)]
        told = [link_key(fleet, "*", to) for to in (member, ALL)]
        rules.append(_rule(f"hear-{member}", ["put"], "ingress", *heard))
        rules.append(_rule(f"tell-{member}", ["declare_subscriber"], "ingress", *told))
    subjects = [{"id": member, "cert_common_names": [member]} for member in members or [node]]
    policies = [
        {"rules": ["say", "subscribe", f"hear-{member}", f"tell-{member}"], "subjects": [member]}
        for member in members or [node]
    ]
    return {
        "enabled": True,
        "default_permission": "deny",
        "rules": rules,
        "subjects": subjects,
        "policies": policies,
    }


def _rule(name: str, messages: list[str], flow: str, *keys: str) -> dict[str, Any]:
    return {"id": name, "messages": messages, "flows": [flow], "permission": "allow", "key_exprs": [*keys]}
