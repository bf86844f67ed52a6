"""What replicas say to each other. Skeleton: the kinds are the first byte of a message.

Only LIVE may be dropped at will; the others are few and small (pages: see PAGE_BYTES), and asked for one at a time.
"""

from __future__ import annotations

LIVE = ord("l")
DIGEST = ord("d")
PULL = ord("p")
PAGE = ord("g")
NOTICE = ord("n")

MAX_MESSAGE = 1 << 20
PAGE_BYTES = 192 << 10
TICK_MS = 50
