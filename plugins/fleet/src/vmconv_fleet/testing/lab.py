"""Directories of the nodes of one fleet, made without a network: the authority signs in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import random
import socket

from vmconv_fleet import config as settings
from vmconv_fleet.config import NodeConfig, split_address
from vmconv_fleet.node.marks import FOUNDED
from vmconv_fleet.trust import credentials
from vmconv_fleet.trust.authority import NODE_LIFETIME, Authority
from vmconv_fleet.trust.identity import Keys, new_node_id

PORTS = range(20_000, 32_000)
"""Below the ports that the kernel gives to connections."""


def free_port(host: str = "127.0.0.1") -> int:
    """Returns an unused port that no connection gets by chance."""
    for _ in range(1000):
        port = random.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise OSError(f"no port from {PORTS.start} to {PORTS.stop} is free")


class Lab:
    """A fleet below a directory; its authority is with the first node."""

    def __init__(self, directory: str, fleet: str = "lab") -> None:
        self.directory = directory
        self.fleet = fleet
        self.authority: Authority | None = None
        self.nodes: list[NodeConfig] = []
        self._certificates: list[bytes] = []

    def add(
        self,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        connect: list[str] | None = None,
        gossip: bool = False,
        lifetime: datetime.timedelta = NODE_LIFETIME,
        founded: bool = True,
        api: str = "",
        join: str = "",
        moves: bool = False,
    ) -> NodeConfig:
        """Adds a node that listens at host:port and connects to `connect` (default: the first node).

        `founded`: the database is new because the node is; otherwise the node waits for a neighbour, as after a loss.
        `moves`: it has the addresses of its machine at each time.
        """
        number = len(self.nodes)
        directory = os.path.join(self.directory, f"node{number}")
        os.makedirs(directory, 0o700)
        node, keys = new_node_id(), Keys.generate()
        if self.authority is None:
            self.authority = Authority.found(directory, self.fleet)
        else:
            # Not by shutil, which imports two compression libraries into nodes whose memory is measured.
            with open(os.path.join(self.nodes[0].directory, "ca.pem"), "rb") as file:
                authority = file.read()
            with open(os.path.join(directory, "ca.pem"), "wb") as file:
                file.write(authority)
        if connect is None:
            connect = self.nodes[0].listen if self.nodes else []
        config = NodeConfig(
            directory=directory,
            fleet=self.fleet,
            node=node,
            name=f"node{number}",
            listen=[f"{host}:{port or free_port(host)}"],
            connect=connect,
            addresses=list(dict.fromkeys([host, "127.0.0.1", "localhost"])),
            api=api,
            join=join,
            gossip=gossip,
        )
        request = keys.request(node, self.fleet, config.addresses)
        certificate = self.authority.issue(request, lifetime=lifetime, name=config.name)
        credentials.keep_members(directory, self._certificates)
        credentials.install(directory, keys, certificate)
        if moves:
            config = dataclasses.replace(config, addresses=[], listen=[f"[::]:{split_address(config.listen[0])[1]}"])
        self._certificates.append(certificate)
        settings.save(config)
        if founded:
            with open(config.path(FOUNDED), "w", encoding="ascii"):
                pass
        self.nodes.append(config)
        return config

    def introduce(self) -> None:
        """Stores all certificates on each node, those of later nodes too, as if it had run."""
        for config in self.nodes:
            credentials.keep_members(config.directory, self._certificates)
