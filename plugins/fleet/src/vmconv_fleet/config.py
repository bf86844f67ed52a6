"""A node's directory, and the settings in `node.toml`.

node.toml      settings, written by `init` and `join`, edited by administrators
identity/      the node's certificate and keys; ca.pem is the certificate of the fleet's authority
members.pem    certificates of the members of the fleet at the time of joining
authority/     the authority, on nodes that hold it
store.sqlite   the replica
api.sock       where the local administrator connects
lock           held by the running node, with its process id
"""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import dataclass, field
from typing import Any

from vmconv.plugin import UsageError, os_errors
from vmconv_fleet.errors import FleetError
from vmconv_fleet.words import trap_in

LINK_PORT = 7447
JOIN_PORT = 7448
API_PORT = 7449
LIMITS = {
    "connections": 256,
    "connections_per_address": 64,
    "requests": 128,
    "join_connections": 64,
    "join_connections_per_address": 32,
}
"""The limits of listening sockets, unless `node.toml` has others in its table `limits`."""
MAX_LIMIT = 1 << 16
_LISTS = ("addresses", "authorities", "connect", "listen", "webhook_networks")
_TEXTS = ("api", "archive", "fleet", "join", "name", "node", "syslog", "webhook_ca")


class ConfigError(FleetError):
    """The settings of a node are missing or not valid."""


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """The settings of a node.

    `listen` and `connect` are HOST:PORT of the links between nodes, `api` that of HTTPS, `join` that of the service for
    nodes that join (only where the authority is); an empty text disables it. `authorities` are the join services
    that renew the certificate. `addresses` are the names in the certificate under which other nodes find this one.
    `syslog` is where events are logged. Webhooks may also connect to `webhook_networks`; `webhook_ca` is a file of the
    authorities of their servers, instead of the system's.
    `oidc` is where people sign in, as `oidc.settings` reads it.
    """

    directory: str
    fleet: str
    node: str
    name: str
    listen: list[str] = field(default_factory=lambda: [f"[::]:{LINK_PORT}"])
    connect: list[str] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    authorities: list[str] = field(default_factory=list)
    datastores: dict[str, str] = field(default_factory=dict)
    api: str = f"127.0.0.1:{API_PORT}"
    archive: str = ""
    join: str = f"[::]:{JOIN_PORT}"
    gossip: bool = True
    syslog: str = ""
    webhook_networks: list[str] = field(default_factory=list)
    webhook_ca: str = ""
    oidc: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)

    def limit(self, name: str) -> int:
        """Returns a limit of connections or requests."""
        return self.limits.get(name, LIMITS[name])

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def credential(self, name: str) -> str:
        return os.path.join(self.directory, "identity", name)

    @property
    def database(self) -> str:
        return self.path("store.sqlite")

    @property
    def socket(self) -> str:
        return self.path("api.sock")


def default_directory() -> str:
    """Returns the default of `--directory`."""
    named = os.environ.get("VMCONV_NODE")
    if named:
        return named
    state = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    if not os.path.isabs(state):
        # Without a home, "~" would be a directory of that name.
        raise ConfigError("no home directory for the node's state", hint="name the node with --directory")
    return os.path.join(state, "vmconv", "node")


def load(directory: str) -> NodeConfig:
    """Returns the settings of the node in this directory. Raises ConfigError if they are missing or not valid."""
    path = os.path.join(directory, "node.toml")
    try:
        with open(path, "rb") as file:
            found = tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(
            f"{directory}: is not a node", hint="vmconv node init creates a fleet, vmconv node join joins one"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    _check(path, found)
    return NodeConfig(directory=os.path.abspath(directory), **found)


def _check(path: str, found: dict[str, Any]) -> None:
    known = {*_LISTS, *_TEXTS, "datastores", "gossip", "limits", "oidc"}
    if unknown := sorted(set(found) - known):
        raise ConfigError(f"{path}: unknown setting {unknown[0]!r}", hint=f"known are {', '.join(sorted(known))}")
    if missing := sorted({"fleet", "node", "name"} - set(found)):
        raise ConfigError(f"{path}: setting {missing[0]!r} is missing")
    for name, value in found.items():
        if not _is_of_its_kind(name, value):
            raise ConfigError(f"{path}: setting {name!r} is {value!r}")
    _check_notices(path, found)
    for name in ("fleet", "name"):
        if problem := trap_in(found[name]):
            raise ConfigError(f"{path}: setting {name!r} {problem}: {found[name][:80]!r}")


def _check_notices(path: str, found: dict[str, Any]) -> None:
    """Refuses a destination of syslog and networks of webhooks that are not valid."""
    import ipaddress

    for text in found.get("webhook_networks", ()):
        try:
            ipaddress.ip_network(text)
        except ValueError as exc:
            raise ConfigError(f"{path}: setting 'webhook_networks': {exc}") from exc


def _is_of_its_kind(name: str, value: object) -> bool:
    if name in _LISTS:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if name == "limits":
        return isinstance(value, dict) and all(
            limit in LIMITS and type(number) is int and 1 <= number <= MAX_LIMIT for limit, number in value.items()
        )
    if name == "datastores":
        return isinstance(value, dict) and all(isinstance(path, str) for path in value.values())
    return isinstance(value, {"gossip": bool, "oidc": dict}.get(name, str))


def save(config: NodeConfig) -> None:
    """Writes the settings as TOML, for editing by hand."""
    lines = [f"{name} = {_text(getattr(config, name))}" for name in ("fleet", "node", "name")]
    for name in (*_LISTS, "api", "archive", "join", "gossip", "syslog", "webhook_ca"):
        lines.append(f"{name} = {_text(getattr(config, name))}")
    if config.limits:
        lines += ["", "[limits]", *(f"{name} = {number}" for name, number in config.limits.items())]
    lines += ["", "[datastores]"]
    lines += [f"{_text(name)} = {_text(path)}" for name, path in config.datastores.items()]
    if config.oidc:
        lines += ["", "[oidc]", *(f"{name} = {_text(value)}" for name, value in config.oidc.items())]
    with os_errors("writing the settings", ConfigError), open(config.path("node.toml"), "w", encoding="utf-8") as file:
        file.write("\n".join([*lines, ""]))


def _text(value: object) -> str:
    """Returns the value in TOML; strings, lists of strings and booleans are written as in JSON."""
    return json.dumps(value, ensure_ascii=False)


def join_address(host: str, port: int) -> str:
    """Returns HOST:PORT, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(text: str) -> tuple[str, int]:
    """Returns host and port of HOST:PORT, with an IPv6 address in brackets. Raises UsageError for anything else."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535 or not host:
        raise UsageError(f"{text!r} is not an address", hint="write HOST:PORT, an IPv6 address as [::1]:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)
