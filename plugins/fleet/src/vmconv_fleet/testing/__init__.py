"""Fleets on one machine, for tests and benchmarks: real nodes, real certificates, real processes."""

from __future__ import annotations

from vmconv_fleet.testing.lab import Lab, free_port
from vmconv_fleet.testing.namespaces import Network, why_no_namespaces
from vmconv_fleet.testing.process import PATIENCE, Driven, wait_until
from vmconv_fleet.testing.views import agree, ledger_of, summaries_of, view_of

__all__ = [
    "PATIENCE",
    "Driven",
    "Lab",
    "Network",
    "agree",
    "free_port",
    "ledger_of",
    "summaries_of",
    "view_of",
    "wait_until",
    "why_no_namespaces",
]
