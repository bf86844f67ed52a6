"""What the parts of a replica share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vmconv_fleet.replication.anti_entropy import AntiEntropy
from vmconv_fleet.replication.change_feed import ChangeFeed
from vmconv_fleet.replication.forks import Forks
from vmconv_fleet.replication.neighbours import NeighbourTable
from vmconv_fleet.replication.problems import ProblemLog
from vmconv_fleet.replication.signing import Trust
from vmconv_fleet.replication.store import Store
from vmconv_fleet.replication.verifier import Verifier


class Timing(NamedTuple):
    """Milliseconds.

    `patience`: how long a start waits for neighbours, who may have newer records of this node than its database; None:
    until there is one. `settle`: how long it waits for more of them once one has come. `digest`: how often each tells
    all how far it is, `tail`: how soon after news. `grace`: how long deletions are remembered, `floor`: how often old
    ones are looked for.
    """

    patience: int | None = 3000
    settle: int = 300
    digest: int = 5000
    tail: int = 100
    grace: int = 7 * 24 * 3600 * 1000
    floor: int = 3600 * 1000


class ReplicaContext(NamedTuple):
    """`now` is the wall clock, which may jump, `monotonic` the one that does not, both in milliseconds."""

    node: str
    store: Store
    trust: Trust
    verifier: Verifier
    neighbours: NeighbourTable
    anti_entropy: AntiEntropy
    forks: Forks
    feed: ChangeFeed
    problems: ProblemLog
    timing: Timing
    now: Callable[[], int]
    monotonic: Callable[[], int]
