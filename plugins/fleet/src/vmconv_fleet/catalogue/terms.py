"""Roles, states and the revision of the schema, apart from the models of records.

Those take memory that a node at rest does not need.
"""

from __future__ import annotations

from typing import Literal

SCHEMA = 6
"""The revision of the bodies of records, see `kinds`."""

ENDED: frozenset[str] = frozenset({"done", "failed", "cancelled"})
"""The final states of a job."""

Role = Literal["viewer", "operator", "admin"]
