"""How Zenoh is set up: peers that speak nothing but mutual TLS, and may put on their own key only.

vmconv/FLEET/link/FROM/TO    the key of what FROM tells TO, who are neighbours: Zenoh carries it over one link
vmconv/FLEET/link/FROM/all   what FROM tells all its neighbours: one put, however many there are
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from vmconv_fleet.config import NodeConfig

LEASE_MS = 3000
OPEN_TIMEOUT_MS = 1500
"""Short, because after a partition it is the next attempt that succeeds."""
PER_MEMBER_MS = 200
"""Both are longer in a large fleet: signs of life on all links are most of what a node does at rest, and when the fleet
starts all members make links at once, each of which is tried once."""
LONGEST_MS = 10_000
BLOCKED_US = 500_000
LIVE_BATCHES = 16
"""So many times 64 KiB of live messages may wait for a link before one is dropped; Zenoh's own 2 are less than one."""
MAX_MESSAGE = 2 << 20
"""What is taken from a peer at most, with room for Zenoh's own headers."""


ALL = "all"


def link_key(fleet: str, sender: str, receiver: str) -> str:
    return f"vmconv/{fleet}/link/{sender}/{receiver}"


def zenoh_settings(config: NodeConfig, members: Iterable[str]) -> str:
    """Returns Zenoh's configuration as JSON; `members` are the nodes that may tell this one something."""
    others = sorted({*members} - {config.node})
    settings = {
        "mode": "peer",
        "id": config.node,
        "listen": {"endpoints": [f"tls/{address}" for address in config.listen], "exit_on_failure": True},
        "connect": {
            "endpoints": [f"tls/{address}" for address in config.connect],
            # For ever, in the background: a fleet begins with its first node.
            "timeout_ms": -1,
            "exit_on_failure": False,
            "retry": {"period_init_ms": 500, "period_max_ms": 1000, "period_increase_factor": 2},
        },
        "scouting": {
            "multicast": {"enabled": False},
            # One of two connects, not both at once: half as many handshakes, and one link a neighbour.
            "gossip": {"enabled": config.gossip, "autoconnect_strategy": {"peer": {"to_peer": "greater-zid"}}},
        },
        "transport": _transport(config, len(others)),
        "access_control": _access(config.fleet, config.node, others),
        "adminspace": {"enabled": False},
    }
    return json.dumps(settings)


def lease_ms(size: int) -> int:
    """Returns for how long a node of so many others may be silent before a link with it has ended."""
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
                # By default a put waits five seconds for a peer that is gone.
                "queue": {
                    "size": {"interactive_high": LIVE_BATCHES},
                    "congestion_control": {"block": {"wait_before_close": BLOCKED_US}},
                },
            },
            "rx": {"max_message_size": MAX_MESSAGE},
        },
    }


def _access(fleet: str, node: str, members: list[str]) -> dict[str, Any]:
    """Returns the rules: nothing is allowed but what a neighbour tells this node under its own name, and the reverse.

    A member is who its certificate says. Rules are read when a session is opened: a new member means another session.
    """
    rules = [
        _rule("say", ["put"], "egress", link_key(fleet, node, "*")),
        _rule("subscribe", ["declare_subscriber"], "egress", *(link_key(fleet, "*", to) for to in (node, ALL))),
    ]
    # Without a member the rules would have no subject, which Zenoh refuses.
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
