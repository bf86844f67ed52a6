"""One signature for many records, each of which can be verified without the others: a hash tree (Merkle, 1979).

proof of a record = number of its leaf (2 bytes) + the sibling on each level, from the leaf up (HASH bytes each)

Leaves and inner nodes are hashed with different prefixes, so that neither can stand for the other. The leaves are
padded with zeros to a power of two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

HASH = 16
MAX_DEPTH = 10
MAX_LEAVES = 1 << MAX_DEPTH

_NOTHING = bytes(HASH)
_LEAF = blake2b(digest_size=HASH, person=b"vmconv leaf")
_INNER = blake2b(digest_size=HASH, person=b"vmconv inner")


def tree(payloads: Sequence[bytes]) -> tuple[bytes, list[bytes]]:
    """Returns the root of the tree over 1 to MAX_LEAVES payloads, and the proof of each payload."""
    levels = [[_leaf(payload) for payload in payloads]]
    while len(levels[-1]) > 1:
        level = levels[-1]
        if len(level) % 2:
            level.append(_NOTHING)
        levels.append([_inner(level[n], level[n + 1]) for n in range(0, len(level), 2)])
    siblings = [b""]
    for level in reversed(levels[:-1]):
        siblings = [level[number ^ 1] + siblings[number >> 1] for number in range(len(level))]
    proofs = [number.to_bytes(2, "big") + siblings[number] for number in range(len(payloads))]
    return levels[-1][0], proofs


def root_of(leaves: Sequence[tuple[bytes, bytes]]) -> bytes | None:
    """Returns the root that the proofs of these payloads lead to; None if one is invalid or of another tree."""
    payloads = [payload for payload, _ in leaves]
    if 1 < len(payloads) <= MAX_LEAVES and leaves[-1][1][:2] == (len(payloads) - 1).to_bytes(2, "big"):
        # Probably all leaves of a tree: rebuilding it is faster than following each proof.
        root, proofs = tree(payloads)
        if proofs == [proof for _, proof in leaves]:
            return root
    return _followed(leaves)


def _followed(leaves: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """Returns the common root of any leaves of a tree; None if a proof is invalid.

    Each proof is followed only to the node that it shares with the one before; above, both must be equal.
    """
    way: list[bytes] = []
    before, at = b"", 0
    for payload, proof in leaves:
        number = int.from_bytes(proof[:2], "big")
        if not way:
            depth, rest = divmod(len(proof) - 2, HASH)
            if rest or not 0 <= depth <= MAX_DEPTH or number >> depth:
                return None
            way = _climb(_leaf(payload), number, proof, depth)
        else:
            meeting = (number ^ at).bit_length()
            end = 2 + HASH * meeting
            if len(proof) != len(before) or number >> depth or proof[end:] != before[end:]:
                return None
            below = _climb(_leaf(payload), number, proof, max(meeting - 1, 0))
            if meeting == 0:
                same = below[0] == way[0] and proof == before
            else:
                same = proof[end - HASH : end] == way[meeting - 1] and before[end - HASH : end] == below[-1]
            if not same:
                return None
            way[:meeting] = below[:meeting]
        before, at = proof, number
    return way[-1] if way else None


def _climb(node: bytes, number: int, proof: bytes, levels: int) -> list[bytes]:
    """Returns the nodes from a leaf to the root."""
    way = [node]
    for start in range(2, 2 + HASH * levels, HASH):
        sibling = proof[start : start + HASH]
        node = _inner(sibling, node) if number & 1 else _inner(node, sibling)
        way.append(node)
        number >>= 1
    return way


def _leaf(payload: bytes) -> bytes:
    return _hash(_LEAF, payload)


def _inner(left: bytes, right: bytes) -> bytes:
    return _hash(_INNER, left + right)


def _hash(kind: blake2b, content: bytes) -> bytes:
    # Copying is faster than building a new one.
    hasher = kind.copy()
    hasher.update(content)
    return hasher.digest()
