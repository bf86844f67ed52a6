"""Who is at the other end of a TLS connection of ours."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any


def common_name(connection: ssl.SSLSocket) -> str | None:
    """Returns the node that the other end's verified certificate names, or None when it has shown none."""
    # Typeshed says less of it than there is: tuples of relative distinguished names, each of pairs.
    certificate: Mapping[str, Any] = connection.getpeercert() or {}
    names = {name: value for pairs in certificate.get("subject", ()) for name, value in pairs}
    return names.get("commonName")
