"""A node's keys and certificate on disk: replaced together, or not at all.

identity -> identity.SERIAL   node.pem, tls.key, signing.key
ca.pem                        the fleet's authority
members.pem                   certificates of the members at the time of joining
"""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import secrets
from collections.abc import Iterable
from typing import NamedTuple

from cryptography import x509

from vmconv.plugin import os_errors
from vmconv_fleet.config import NodeConfig
from vmconv_fleet.trust.addresses import dialable, names_of
from vmconv_fleet.trust.authority import Authority
from vmconv_fleet.trust.identity import (
    MAX_MEMBERS,
    MAX_PEM,
    Binding,
    IdentityError,
    Keys,
    binding,
    read_authorities,
    read_certificate,
    write_private,
)

RENEW_AT = 2 / 3
"""The part of its lifetime after which a certificate is renewed."""
MAX_ASKED = 16
"""The number of addresses of authorities in records that are asked."""


class Credentials(NamedTuple):
    """The credentials of a node; `bound` is the content of its certificate."""

    keys: Keys
    certificate: bytes
    bound: Binding
    renew_at: datetime.datetime


def load(config: NodeConfig) -> Credentials:
    """Returns the credentials. Raises IdentityError if they are missing, damaged, or of another node or fleet."""
    keys = Keys.load(config.path("identity"))
    certificate = _read(config.credential("node.pem"))
    parsed, bound = _check(config, keys, certificate)
    begin, end = parsed.not_valid_before_utc, parsed.not_valid_after_utc
    return Credentials(keys, certificate, bound, begin + (end - begin) * RENEW_AT)


def _check(config: NodeConfig, keys: Keys, certificate: bytes) -> tuple[x509.Certificate, Binding]:
    """Returns the certificate and its content. Raises IdentityError unless it is for these keys of this node."""
    parsed = read_certificate(certificate)
    bound = binding(parsed, read_authorities(_read(config.path("ca.pem"))))
    if bound.node != config.node or bound.fleet != config.fleet:
        raise IdentityError(
            f"{config.directory}: the certificate is of node {bound.node} in fleet {bound.fleet!r}, "
            f"the settings are of node {config.node} in {config.fleet!r}"
        )
    if bound.key.public_bytes_raw() != keys.signing.public_key().public_bytes_raw():
        raise IdentityError(f"{config.directory}: the certificate does not match the signing key")
    if parsed.public_key() != keys.tls.public_key():
        raise IdentityError(f"{config.directory}: the certificate does not match the TLS key")
    return parsed, bound


def install(directory: str, keys: Keys, certificate: bytes) -> None:
    """Installs the node's credentials; after a crash the old or the new ones are there."""
    name = f"identity.{read_certificate(certificate).serial_number:x}"
    place, link = os.path.join(directory, name), os.path.join(directory, "identity")
    with os_errors("installing a certificate", IdentityError):
        os.makedirs(place, 0o700)
        keys.save(place)
        write_private(os.path.join(place, "node.pem"), certificate)
        temporary = f"{link}.{secrets.token_hex(4)}"
        os.symlink(name, temporary)
        os.replace(temporary, link)
        for other in os.listdir(directory):
            if other.startswith("identity.") and other != name:
                # With two compression libraries; a node at rest needs none.
                import shutil

                with contextlib.suppress(OSError):
                    shutil.rmtree(os.path.join(directory, other))


def keep_members(directory: str, certificates: Iterable[bytes]) -> None:
    """Stores members' certificates, so that the node knows its neighbours before it has their records."""
    with os_errors("keeping the members' certificates", IdentityError):
        write_private(os.path.join(directory, "members.pem"), b"".join(certificates))


def read_members(config: NodeConfig) -> bytes:
    """Returns the stored certificates, possibly none, unverified."""
    path = config.path("members.pem")
    if not os.path.exists(path):
        return b""
    with os_errors("reading the members' certificates", IdentityError), open(path, "rb") as file:
        return file.read(MAX_MEMBERS)


def request_new(config: NodeConfig, *, new_keys: bool = False) -> Credentials:
    """Requests a new certificate from an authority, possibly this node's own, and installs it.

    `new_keys`: for new keys. Earlier signatures stay valid.
    """
    keys = Keys.generate() if new_keys else Keys.load(config.path("identity"))
    request = keys.request(config.node, config.fleet, names_of(config))
    if holds_authority(config):
        authority, drops = Authority.load(config.directory), not config.addresses
        certificate = authority.issue(request, node=config.node, drops=drops, name=config.name)
    else:
        # Its modules take memory and are needed once in months.
        from vmconv_fleet.trust.joining import first_that_answers, renew

        def ask(address: str) -> bytes:
            # Any member may pretend to hold the authority: its answer must be the authority's, for this node's keys.
            granted: bytes = renew(config, address, request).certificate
            _check(config, keys, granted)
            return granted

        certificate = first_that_answers(authorities_of(config), ask)
    install(config.directory, keys, certificate)
    return load(config)


def holds_authority(config: NodeConfig) -> bool:
    return os.path.exists(config.path(os.path.join("authority", "ca.key")))


def authorities_of(config: NodeConfig) -> list[str]:
    """Returns where authorities may be reached: from the settings and from the records of the nodes that hold it."""
    found = []
    if os.path.exists(config.database):
        from vmconv_fleet.replication.database import open_reader
        from vmconv_fleet.replication.store import Reader

        with contextlib.closing(Reader(open_reader(config.database))) as reader:
            found = [dialable(record.body.get("authority"), here=True) for record in reader.find("node")]
    known = [address for one in found for address in one]
    return [*config.authorities, *random.sample(known, min(len(known), MAX_ASKED))]


def _read(path: str) -> bytes:
    with os_errors("reading a certificate", IdentityError), open(path, "rb") as file:
        return file.read(MAX_PEM)
