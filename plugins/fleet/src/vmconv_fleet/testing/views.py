"""The records of a node, read from its database by another process."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import NamedTuple

from vmconv_fleet.config import NodeConfig
from vmconv_fleet.replication.database import open_reader
from vmconv_fleet.replication.store import Reader

Knowledge = dict[str, tuple[int, int, str]]


def view_of(config: NodeConfig) -> Knowledge:
    """Returns for each owner the node's position, and a hash of all live records."""
    if not os.path.exists(config.database):
        return {}
    with closing(sqlite3.connect(f"file:{config.database}?mode=ro", uri=True, timeout=10)) as database:
        # One transaction: the replica continues meanwhile.
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


def summaries_of(config: NodeConfig) -> Knowledge:
    """Returns the node's own position and state for each owner; this is fast."""
    with closing(sqlite3.connect(f"file:{config.database}?mode=ro", uri=True, timeout=10)) as database:
        rows = database.execute("SELECT owner, epoch, seq, state FROM owners WHERE seq > 0").fetchall()
    return {owner: (epoch, seq, state) for owner, epoch, seq, state in rows}


def agree(configs: Sequence[NodeConfig], view: Callable[[NodeConfig], Knowledge] = view_of) -> bool:
    """Returns whether all nodes have the same records; with `summaries_of`, whether their summaries are equal."""
    first, *others = (view(config) for config in configs)
    return len(first) == len(configs) and all(other == first for other in others)


class Ledger(NamedTuple):
    """The requests in a node's database: their number, those without or with several responses, and transactions."""

    requests: int
    unanswered: list[str]
    answered_twice: list[str]
    transactions: dict[str, list[int]]


def ledger_of(config: NodeConfig) -> Ledger:
    """Returns the requests, responses and transaction numbers (by owner, in order) that the node has of the fleet."""
    reader = Reader(open_reader(config.database))
    try:
        answers = Counter((one.body["requester"], one.body["request"]) for one in reader.find("response"))
        requests = {(one.owner, one.id) for one in reader.find("request")}
        numbers: dict[str, list[int]] = {}
        for one in reader.find("transaction"):
            numbers.setdefault(one.owner, []).append(one.body["number"])
    finally:
        reader.close()
    return Ledger(
        len(requests),
        sorted(id for owner, id in requests if not answers[owner, id]),
        sorted(id for (_, id), count in answers.items() if count > 1),
        {owner: sorted(found) for owner, found in numbers.items()},
    )
