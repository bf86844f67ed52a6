"""The context shared by the parts of a replica."""

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
    """All in milliseconds.

    `patience`: how long a start waits for neighbours that may have newer records of this node than its database; None:
    until all members have been heard. `settle`: how long it waits for more neighbours after the first. `digest`: the
    interval of whole digests; `tail`: the delay of the digest after a live message. `grace`: how long deletions are
    remembered; `floor`: the interval at which old ones are dropped.
    """

    patience: int | None = 3000
    settle: int = 300
    digest: int = 5000
    tail: int = 100
    grace: int = 7 * 24 * 3600 * 1000
    floor: int = 3600 * 1000


class ReplicaContext(NamedTuple):
    """`now` is the wall clock, which may jump; `monotonic` does not. Both in milliseconds."""

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
