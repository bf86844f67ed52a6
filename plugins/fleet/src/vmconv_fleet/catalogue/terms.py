"""Roles and states, apart from the models of records: those take memory that a node at rest does not need."""

from __future__ import annotations

from typing import Literal

ENDED: frozenset[str] = frozenset({"done", "failed", "cancelled"})
"""The final states of a job."""

Role = Literal["viewer", "operator", "admin"]
