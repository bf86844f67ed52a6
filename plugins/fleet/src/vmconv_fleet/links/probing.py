"""Probes an address without a link: Zenoh does not report refused handshakes, so this makes one to find the reason."""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import NamedTuple

from vmconv_fleet.config import NodeConfig, split_address
from vmconv_fleet.resolving import Resolver, connected
from vmconv_fleet.trust.peers import common_name

TIMEOUT = 2.0
_RESOLVER = Resolver()
_REFUSAL_WAIT = 0.5
"""Time for the other end to refuse: in TLS 1.3 it checks our certificate after our handshake has ended."""


class Probe(NamedTuple):
    """The result of a probe: the node at the address if its certificate is valid, and what prevents a link."""

    node: str | None
    kind: str = ""
    text: str = ""
    hint: str | None = None


def probe(config: NodeConfig, address: str) -> Probe:
    """Returns the node at the address and the state of TLS, within a few seconds."""
    host, port = split_address(address)
    try:
        context = ssl.create_default_context(cafile=config.path("ca.pem"))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(config.credential("node.pem"), config.credential("tls.key"))
    except (OSError, ssl.SSLError) as exc:
        return Probe(None, "certificate", f"own certificate or key cannot be used: {exc}")
    try:
        with connected(_RESOLVER, host, port, TIMEOUT) as plain:
            return _handshake(context, plain, host, address)
    except OSError as exc:
        return Probe(None, "unreachable", f"{address}: cannot be reached: {exc.strerror or exc}")


def _handshake(context: ssl.SSLContext, plain: socket.socket, host: str, address: str) -> Probe:
    try:
        secured = context.wrap_socket(plain, server_hostname=host)
    except ssl.SSLCertVerificationError as exc:
        return Probe(
            None,
            "untrusted",
            f"{address}: its certificate is not accepted: {exc.verify_message}",
            "check that the node is of this fleet, its certificate is not expired, and lists this address",
        )
    except ssl.SSLError as exc:
        return Probe(None, "no-tls", f"{address}: does not speak TLS like a node: {_reason(exc)}")
    except OSError as exc:
        return Probe(None, "no-tls", f"{address}: ends the connection instead of a TLS handshake: {exc}")
    node = common_name(secured)
    try:
        secured.settimeout(_REFUSAL_WAIT)
        with contextlib.suppress(TimeoutError):
            secured.recv(1)
    except ssl.SSLError as exc:
        return Probe(
            node,
            "refused",
            f"{address}: refuses the certificate of this node: {_reason(exc)}",
            "vmconv node renew gets a new one, unless this node was revoked",
        )
    except OSError:
        # Closed without an alert, unlike a refusal.
        pass
    finally:
        secured.close()
    return Probe(node)


def _reason(exc: ssl.SSLError) -> str:
    """Returns the alert or failure in lower case words, as `certificate expired`."""
    reason = exc.reason or str(exc)
    for prefix in ("TLSV1_ALERT_", "TLSV13_ALERT_", "SSLV3_ALERT_"):
        reason = reason.removeprefix(prefix)
    return reason.replace("_", " ").lower()
