"""The names and addresses that the fleet's authority may certify: the name constraints in its own certificate."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

from cryptography import x509

from vmconv.plugin import UsageError
from vmconv_fleet.trust.addresses import is_host_name, is_loopback
from vmconv_fleet.trust.identity import NODE_NAME, node_name

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

LOOPBACK = ("localhost", "127.0.0.0/8", "::1/128")
"""Always permitted: each node has them, for administrators on its machine."""
PRIVATE = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7", "internal", "home.arpa")
"""Permitted by default besides the founder's own names: addresses and domains that nobody owns on the internet."""
MAX_PERMITTED = 64


def constraints(permitted: Iterable[str]) -> x509.NameConstraints:
    """Returns the extension for domains and networks. Raises UsageError if one is neither."""
    names = list(dict.fromkeys([*LOOPBACK, *permitted]))
    if len(names) > MAX_PERMITTED:
        raise UsageError(f"{len(names)} permitted domains and networks, at most {MAX_PERMITTED} are allowed")
    return x509.NameConstraints([_subtree(name) for name in names], None)


def permitted_by_default(names: Iterable[str]) -> list[str]:
    """Returns what a new fleet permits: private addresses, and the founder's names, or the domains that they are in."""
    found = list(PRIVATE)
    for name in names:
        if _network(name) is not None:
            found.append(name)
        elif is_host_name(name):
            domain = name.partition(".")[2]
            found.append(domain if "." in domain else name)
    return list(dict.fromkeys(found))


def why_not(
    name: x509.GeneralName, authority: x509.Certificate, taken: Mapping[str, AbstractSet[str]], node: str
) -> str | None:
    """Returns why the authority does not certify a name or address for a node; None if it does.

    `taken` are the names in use, and by whom. A node keeps a name that others have too: bridges of containers have the
    same address on each machine, and nodes of earlier versions list them.
    """
    text = str(name.value)
    if isinstance(name, x509.DNSName) and not is_host_name(text):
        return f"{text!r} is not a host name"
    if not _is_permitted(name, authority):
        return f"{text} is not among the names that this fleet permits"
    owners = taken.get(text.lower(), frozenset())
    if not owners or node in owners or is_loopback(text):
        return None
    return f"{text} is in use by node {min(owners)}"


def why_not_called(name: str, taken: Mapping[str, AbstractSet[str]], node: str) -> str | None:
    """Returns why the authority does not give a node its name; None if it does. No two nodes have one name."""
    if len(name) in (8, 32) and not name.strip("0123456789abcdef"):
        return f"{name} may be taken for the id of a node"
    owners = taken.get(name_key(name), frozenset()) - {node}
    return f"{name} is the name of node {min(owners)}" if owners else None


def name_key(name: str) -> str:
    """Returns the key of a node's name among the names in use: names that differ in case alone are one."""
    return NODE_NAME + name.casefold()


def _is_permitted(name: x509.GeneralName, authority: x509.Certificate) -> bool:
    try:
        found = authority.extensions.get_extension_for_class(x509.NameConstraints).value.permitted_subtrees or ()
    except x509.ExtensionNotFound:
        # A fleet of an earlier version.
        return True
    return any(_is_within(name, subtree) for subtree in found)


def _is_within(name: x509.GeneralName, subtree: x509.GeneralName) -> bool:
    if isinstance(name, x509.DNSName) and isinstance(subtree, x509.DNSName):
        return f".{name.value.lower()}".endswith(f".{subtree.value.lower()}")
    if not isinstance(name, x509.IPAddress) or not isinstance(subtree, x509.IPAddress):
        return False
    network = subtree.value
    return isinstance(network, ipaddress.IPv4Network | ipaddress.IPv6Network) and name.value in network


def _subtree(text: str) -> x509.GeneralName:
    network = _network(text)
    if network is not None:
        return x509.IPAddress(network)
    if is_host_name(text):
        return x509.DNSName(text.lower())
    raise UsageError(f"{text!r} is neither a domain nor a network", hint="as dc.example or 192.0.2.0/24")


def _network(text: str) -> Network | None:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        return None


def names_in_use(certificates: Sequence[x509.Certificate]) -> dict[str, set[str]]:
    """Returns the nodes that use each name or address, from the newest certificate of each node."""
    found: dict[str, set[str]] = {}
    for certificate in certificates:
        (node,) = certificate.subject.get_attributes_for_oid(x509.oid.NameOID.COMMON_NAME)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if called := node_name(certificate.extensions):
            found.setdefault(name_key(called), set()).add(str(node.value))
        for kind in (x509.DNSName, x509.IPAddress):
            for name in names.get_values_for_type(kind):
                found.setdefault(str(name).lower(), set()).add(str(node.value))
    return found
