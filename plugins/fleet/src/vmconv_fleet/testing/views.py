"""What a node knows, read from its database from outside, whether it runs or not."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing

from vmconv_fleet.config import NodeConfig

View = dict[str, tuple[int, int, str]]


def view_of(config: NodeConfig) -> View:
    """Returns for each owner how far the node has its records, and a hash of all that are live."""
    if not os.path.exists(config.database):
        return {}
    with closing(sqlite3.connect(f"file:{config.database}?mode=ro", uri=True, timeout=10)) as database:
        # One transaction: the replica goes on meanwhile.
        database.execute("BEGIN")
        owners = database.execute("SELECT number, owner, epoch, seq FROM owners WHERE seq > 0").fetchall()
        found = {}
        for number, owner, epoch, seq in owners:
            rows = database.execute(
                "SELECT wire FROM records WHERE owner = ? AND NOT deleted ORDER BY kind, id", (number,)
            )
            digest = hashlib.sha256()
            for (wire,) in rows:
                digest.update(len(wire).to_bytes(4, "big") + wire)
            found[owner] = (epoch, seq, digest.hexdigest())
        return found


def agree(configs: Sequence[NodeConfig]) -> bool:
    """Returns whether all nodes know the same of all."""
    first, *others = (view_of(config) for config in configs)
    return len(first) == len(configs) and all(other == first for other in others)
