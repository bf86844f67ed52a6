"""One signature for many records, each of which can be verified without the others: a hash tree (Merkle, 1979).

proof of a record = number of its leaf (2 bytes) + the sibling on each level, from the leaf up (HASH bytes each)

Leaves and inner nodes are hashed with different prefixes, so that neither can stand for the other. The leaves are
filled up with zeros to a power of two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

HASH = 16
MAX_DEPTH = 10
MAX_LEAVES = 1 << MAX_DEPTH

_NOTHING = bytes(HASH)


def tree(payloads: Sequence[bytes]) -> tuple[bytes, list[bytes]]:
    """Returns the root of a tree over 1 to MAX_LEAVES payloads, and the proof of each."""
    levels = [[_leaf(payload) for payload in payloads]]
    while len(levels[-1]) > 1:
        level = levels[-1]
        if len(level) % 2:
            level.append(_NOTHING)
        levels.append([_inner(level[n], level[n + 1]) for n in range(0, len(level), 2)])
    proofs = []
    for number in range(len(payloads)):
        siblings = [level[number >> height ^ 1] for height, level in enumerate(levels[:-1])]
        proofs.append(number.to_bytes(2, "big") + b"".join(siblings))
    return levels[-1][0], proofs


class Proven:
    """What is known of one tree whose root is known: its nodes, each with the siblings from there up.

    The leaves of a tree mostly come one after the other: then the next one soon meets what the last one has proven.
    """

    def __init__(self) -> None:
        self._nodes: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def climb(self, payload: bytes, proof: bytes) -> Climb | None:
        """Returns the way from the payload up, to the root or to what is known; None: it is no proof."""
        depth, rest = divmod(len(proof) - 2, HASH)
        number = int.from_bytes(proof[:2], "big")
        if rest or not 0 <= depth <= MAX_DEPTH or number >> depth:
            return None
        # As in a heap: the root is 1, and below n are 2n and 2n + 1.
        number |= 1 << depth
        node = _leaf(payload)
        found: dict[int, bytes] = {}
        for start in range(2, len(proof), HASH):
            above = proof[start:]
            if self._nodes.get(number) == node + above:
                return Climb(None, found)
            sibling = above[:HASH]
            found[number] = node + above
            found[number ^ 1] = sibling + node + above[HASH:]
            node = _inner(sibling, node) if number & 1 else _inner(node, sibling)
            number >>= 1
        return Climb(None if self._nodes.get(1) == node else node, {**found, 1: node})

    def learn(self, climb: Climb) -> None:
        """Takes note of a way up whose root is good."""
        self._nodes.update(climb.nodes)


class Climb(NamedTuple):
    """The root that a proof leads to, None if it leads to what is known; and the nodes on the way and beside it."""

    root: bytes | None
    nodes: Mapping[int, bytes]


def _leaf(payload: bytes) -> bytes:
    return blake2b(payload, digest_size=HASH, person=b"vmconv leaf").digest()


def _inner(left: bytes, right: bytes) -> bytes:
    return blake2b(left + right, digest_size=HASH, person=b"vmconv inner").digest()
