"""Step functions over the clusters of a qcow2 file: stored reference counts, and counted references."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vmconv.plugin import Column, distinct


class Steps(NamedTuple):
    """A step function: `value[i]` from cluster `start[i]` to the next start; the first start is 0."""

    start: Column
    value: Column

    def at(self, cluster: Column) -> Column:
        return self.value[np.searchsorted(self.start, cluster, side="right") - 1]


NO_COUNTS = Steps(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))


def repeated(offset: Column) -> npt.NDArray[np.bool_]:
    """Returns a mask of the entries that an earlier one has, too; 0 is no entry."""
    there = np.flatnonzero(offset != 0)
    order = there[np.argsort(offset[there], kind="stable")]
    found = np.zeros(len(offset), dtype=bool)
    found[order[1:][np.diff(offset[order]) == 0]] = True
    return found


def decode_counts(data: bytes, order: int) -> Steps:
    """Returns the counts of refcount blocks. They are decoded where they change only: most are equal."""
    bits = 1 << order
    counts = np.frombuffer(data, dtype=f"u{max(8, bits) // 8}")
    if bits < 8:
        counts = np.stack([counts >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)], axis=1).ravel()
    start = np.flatnonzero(np.append(True, counts[1:] != counts[:-1]))
    value = counts[start].view(f">u{max(8, bits) // 8}").astype(np.uint64)
    # A count of 2^63 is as wrong as any larger one.
    return Steps(start, np.minimum(value, np.uint64((1 << 63) - 1)).astype(np.int64))


def settled(start: Column, value: Column) -> Steps:
    """Returns the steps without redundant ones; of two at one start, the later one counts."""
    last = np.append(start[1:] != start[:-1], True)
    start, value = start[last], value[last]
    changes = np.ones(len(start), dtype=bool)
    changes[1:] = value[1:] != value[:-1]
    return Steps(start[changes], value[changes])


def steps_of(runs: list[tuple[Column, Column]]) -> Steps:
    """Returns the number of runs `(first, count)` that cover each cluster.

    Each run is two edges, kept as one number: the cluster, and in the lowest bit whether the run begins or ends there.
    There may be millions, so they are sorted in place.
    """
    ends = [(first + count) * 2 for first, count in runs]
    edges = np.concatenate([[0], *ends, *(first * 2 + 1 for first, _ in runs)])
    del ends
    # Most runs are in order already.
    edges.sort(kind="stable")
    change = (edges & 1).astype(np.int8) * np.int8(2) - np.int8(1)
    # Counting begins at cluster 0.
    change[0] = 0
    edges >>= 1
    return settled(edges, np.cumsum(change, dtype=np.int64))


def differences(counted: Steps, stored: Steps, clusters: int) -> tuple[Column, Column, Column, Column]:
    """Returns `(first, end, references, stored count)` of the runs of clusters where the two differ."""
    cuts = distinct(np.concatenate([counted.start, stored.start, [clusters]]))
    # Past the end of the file, stored counts do not matter, but references do.
    references, counts = counted.at(cuts), np.where(cuts < clusters, stored.at(cuts), 0)
    end = np.append(cuts[1:], cuts[-1] + 1)
    differ = references != counts
    return cuts[differ], end[differ], references[differ], counts[differ]
