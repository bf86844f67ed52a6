"""The REST API of a node: the same verbs as the command line, for the whole fleet, on any node."""

from __future__ import annotations

from vmconv_fleet.api.access import as_local
from vmconv_fleet.api.app import create_app

__all__ = ["as_local", "create_app"]
