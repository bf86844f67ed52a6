"""The peer of a TLS connection."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any


def common_name(connection: ssl.SSLSocket) -> str | None:
    """Returns the node in the peer's verified certificate; None without one."""
    # Typeshed is less precise: tuples of relative distinguished names, each of pairs.
    certificate: Mapping[str, Any] = connection.getpeercert() or {}
    names = {name: value for pairs in certificate.get("subject", ()) for name, value in pairs}
    return names.get("commonName")
