"""The names and addresses of this machine, for its certificate and its record, and those that other records state."""

from __future__ import annotations

import fcntl
import ipaddress
import re
import socket
import struct

from vmconv.plugin import UsageError
from vmconv_fleet.config import NodeConfig, join_address, split_address

_SIOCGIFADDR = 0x8915
_LINK_LOCAL = "20"
MAX_ADDRESSES = 32
MAX_ANNOUNCED = 4
"""The number of addresses of one service of a member that are announced and dialled."""
_HOST = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")
_MAX_HOST = 253


def local_addresses() -> list[str]:
    """Returns the addresses of this machine's interfaces and its host name, at most `MAX_ADDRESSES`.

    Link-local addresses are omitted: they are valid on one interface only.
    """
    found = ["127.0.0.1", "::1", "localhost", socket.gethostname(), *_ipv4(), *_ipv6()]
    return list(dict.fromkeys(name for name in found if name))[:MAX_ADDRESSES]


def names_of(config: NodeConfig) -> list[str]:
    """Returns the names and addresses of this node: those of its settings, or all of this machine at present."""
    return config.addresses or local_addresses()


def is_loopback(host: str) -> bool:
    name = host.lower().rstrip(".")
    return name == "::1" or name.startswith("127.") or name.rpartition(".")[2] == "localhost"


def announced(config: NodeConfig, port_of: str) -> list[str]:
    """Returns where others reach a service of this node that listens at `port_of`, HOST:PORT; addresses first."""
    host, port = split_address(port_of)
    if host not in ("::", "0.0.0.0"):
        return [join_address(host, port)]
    names = [name for name in names_of(config) if not is_loopback(name)]
    addresses = [name for name in names if _is_address(name)]
    # The name of this machine may be unknown elsewhere, or that of another one.
    names = addresses if addresses and not config.addresses else sorted(names, key=lambda name: name not in addresses)
    return [join_address(name, port) for name in names[:MAX_ANNOUNCED]]


def dialable(stated: object, *, here: bool) -> list[str]:
    """Returns the addresses of a member's record that may be dialled, at most `MAX_ANNOUNCED`.

    A record is what its member says: anything may be in it. Loopback only if the fleet is `here`, on this machine.
    """
    if not isinstance(stated, list):
        return []
    return [text for text in stated[:MAX_ANNOUNCED] if isinstance(text, str) and _may_dial(text, here)]


def _may_dial(text: str, here: bool) -> bool:
    if len(text) > _MAX_HOST + 8:
        return False
    try:
        host, port = split_address(text)
    except UsageError:
        return False
    if text != join_address(host, port) or port == 0:
        return False
    if is_loopback(host):
        return here
    if not _is_address(host):
        return is_host_name(host)
    address = ipaddress.ip_address(host)
    # The kernel reads an IPv4 address mapped into IPv6 as the former.
    address = getattr(address, "ipv4_mapped", None) or address
    return not (address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified)


def is_host_name(host: str) -> bool:
    # Resolvers read a name that ends in a number as an address in another notation.
    return len(host) <= _MAX_HOST and _HOST.fullmatch(host) is not None and not host.rpartition(".")[2][0].isdigit()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _ipv4() -> list[str]:
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                # An interface without an IPv4 address.
                continue
            found.append(socket.inet_ntoa(answer[20:24]))
    return found


def _ipv6() -> list[str]:
    try:
        with open("/proc/net/if_inet6", encoding="ascii") as file:
            rows = [line.split() for line in file]
    except FileNotFoundError:
        # A kernel without IPv6.
        return []
    return [str(ipaddress.ip_address(bytes.fromhex(row[0]))) for row in rows if row[3] != _LINK_LOCAL]
