"""The addresses that a webhook may connect to.

The URL of a webhook comes from an administrator of the fleet, who may know less of the node's network than the node.
Services of the machine itself and of its cloud trust each caller that reaches them, so they are refused.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any, NamedTuple

from vmconv_fleet.errors import FleetError
from vmconv_fleet.resolving import LOOK_UP_S, Resolver

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_METADATA = tuple(
    ipaddress.ip_address(text)
    for text in ("169.254.169.254", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254")
)
"""Services of clouds that give credentials to their machines, outside of link-local networks too."""
_RESOLVER = Resolver()
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_ISATAP = 0x5EFE
"""The upper half of an interface identifier with an IPv4 address (RFC 5214, 6.1)."""
_ISATAP_MASK = 0xFCFFFFFF
"""Without the bits that say whether the identifier is universal, and of a group."""


class ForbiddenAddressError(FleetError):
    """A host has no address that may be connected to."""


class Place(NamedTuple):
    """Where to connect: arguments of a socket."""

    family: int
    address: Any


def network(text: str) -> Network:
    """Returns a network of the settings. Raises ValueError."""
    return ipaddress.ip_network(text)


def why_refused(address: Address, allowed: Sequence[Network]) -> str | None:
    """Returns why an address is refused; None if it may be connected to."""
    if any(address in one for one in allowed):
        return None
    judged = (one for one in _judged(address) if not any(one in network for network in allowed))
    return next(filter(None, map(_reason, judged)), None)


def _reason(address: Address) -> str | None:
    if address in _METADATA:
        return "a cloud's metadata service"
    for name in ("loopback", "link_local", "site_local", "multicast", "unspecified", "reserved"):
        # An IPv4 address has no `is_site_local`.
        if getattr(address, f"is_{name}", False):
            return name.replace("_", "-")
    return None


def _judged(address: Address) -> list[Address]:
    """Returns the address, and the IPv4 addresses in it that packets to it may reach."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    last = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address.ipv4_mapped or address in _NAT64:
        return [last]
    isatap = (int(address) >> 32) & _ISATAP_MASK == _ISATAP
    embedded = [address.sixtofour, *(address.teredo or ()), last if isatap else None]
    return [address, *(one for one in embedded if one is not None)]


def places_of(host: str, port: int, allowed: Sequence[Network], *, within: float = LOOK_UP_S) -> list[Place]:
    """Returns the permitted addresses of a host, `within` seconds.

    Raises ForbiddenAddressError if it has none, OSError if it is unknown or not answered in time.

    Connect to these, not to the name, which may have another address the next time.
    """
    found = _RESOLVER.addresses(host, port, within=within)
    reasons = [(one, why_refused(ipaddress.ip_address(str(one[4][0]).partition("%")[0]), allowed)) for one in found]
    places = [Place(one[0], one[4]) for one, reason in reasons if reason is None]
    if not places:
        (*_, address), reason = reasons[0]
        raise ForbiddenAddressError(
            f"{host} is {address[0]}: {reason} addresses are refused",
            hint="list networks that are allowed as webhook_networks in node.toml",
        )
    return places
