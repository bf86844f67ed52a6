"""One signature for many records, each of which can be verified without the others: a hash tree (Merkle, 1979).

proof of a record = number of its leaf (2 bytes) + the sibling on each level, from the leaf up (HASH bytes each)

Leaves and inner nodes are hashed with different prefixes, so that neither can stand for the other. The leaves are
filled up with zeros to a power of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

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


def root_of(payload: bytes, proof: bytes) -> bytes | None:
    """Returns the root of the tree that the proof places the payload in; None: it is no proof."""
    depth, rest = divmod(len(proof) - 2, HASH)
    if rest or not 0 <= depth <= MAX_DEPTH:
        return None
    number = int.from_bytes(proof[:2], "big")
    if number >> depth:
        return None
    node = _leaf(payload)
    for start in range(2, len(proof), HASH):
        sibling = proof[start : start + HASH]
        node = _inner(sibling, node) if number & 1 else _inner(node, sibling)
        number >>= 1
    return node


def _leaf(payload: bytes) -> bytes:
    return blake2b(payload, digest_size=HASH, person=b"vmconv leaf").digest()


def _inner(left: bytes, right: bytes) -> bytes:
    return blake2b(left + right, digest_size=HASH, person=b"vmconv inner").digest()
