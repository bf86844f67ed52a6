"""Two sources of different bytes, for tables."""

from __future__ import annotations

from vmconv.model.sources import Blob

A, B = Blob("a", bytes(range(200))), Blob("b", bytes(range(255, 55, -1)))

SOURCES = (A, B)
