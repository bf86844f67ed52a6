"""The names and addresses of this machine, for its certificate."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct

from vmconv_fleet.config import NodeConfig

_SIOCGIFADDR = 0x8915
_LINK_LOCAL = "20"
MAX_ADDRESSES = 32


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
