"""Files in a node's directory that tell the daemon what its database is."""

from __future__ import annotations

FOUNDED = "founded"
"""The node is new, so no neighbour can have newer records of it than its database."""
RESTORED = "restored"
"""Members may have later records of the node than its database, so it waits for all."""
