"""The findings of a structural check: all are counted, the first ones are described."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vmconv.interface.format import CheckReport
from vmconv.model.extents import Column
from vmconv.model.usage import Usage

SHOWN = 100
"""Findings of each kind with a text."""

ENOUGH = 1 << 20
"""Number of corruptions after which a check may stop."""


class Findings:
    """The findings of a running check."""

    def __init__(self) -> None:
        self.corruptions: list[str] = []
        self.leaks: list[str] = []
        self.doubts: list[str] = []
        self.corruption_count = 0
        self.leak_count = 0

    @property
    def enough(self) -> bool:
        """True if the check may stop: a malformed image can have more corruptions than there is time to count."""
        return self.corruption_count >= ENOUGH

    def corrupt(self, text: str, count: int = 1) -> None:
        """Adds `count` corruptions with one text."""
        self.corruption_count += count
        if len(self.corruptions) < SHOWN:
            self.corruptions.append(text)

    def corrupt_where(
        self, bad: npt.NDArray[np.bool_], text: Callable[[int], str], counts: Column | None = None
    ) -> None:
        """Adds a corruption for each true value of the mask, or the number in `counts`; `text` describes an index."""
        self.corruption_count += _add_where(self.corruptions, bad, text, counts)

    def leak_where(self, bad: npt.NDArray[np.bool_], text: Callable[[int], str], counts: Column | None = None) -> None:
        """Adds leaked clusters as `corrupt_where` adds corruptions."""
        self.leak_count += _add_where(self.leaks, bad, text, counts)

    def leak(self, text: str, count: int = 1) -> None:
        """Adds `count` leaked clusters with one text."""
        self.leak_count += count
        if len(self.leaks) < SHOWN:
            self.leaks.append(text)

    def doubt(self, text: str) -> None:
        """Adds a finding that the check cannot decide."""
        if len(self.doubts) < SHOWN:
            self.doubts.append(text)

    def overlaps(self, usage: Usage, unit: int) -> None:
        """Adds the overlaps of a file: one corruption for each `unit` bytes with two users."""
        found = usage.overlaps()
        if not found:
            return
        self.corrupt_where(np.ones(len(found.offset), dtype=bool), found.text, -(-found.length // unit))

    def unused(self, usage: Usage, unit: int, start: int, end: int) -> None:
        """Adds the unused whole units of `[start, end)` as leaks."""
        begin, length = usage.unused(start, end)
        count: Column = length // unit
        self.leak_count += int(count.sum())
        for at, units in zip(begin[count > 0][:SHOWN].tolist(), count[count > 0][:SHOWN].tolist(), strict=True):
            # Counted above.
            self.leak(f"cluster at {at:#x}" if units == 1 else f"{units} clusters from {at:#x} on", 0)

    def report(self, *, allocated: int, total: int, end: int) -> CheckReport:
        """Returns the report; `end` is the end of the last cluster in use, bytes."""
        return CheckReport(
            tuple(self.corruptions),
            tuple(self.leaks),
            self.corruption_count,
            self.leak_count,
            allocated,
            total,
            end,
            tuple(self.doubts),
        )


def _add_where(texts: list[str], bad: npt.NDArray[np.bool_], text: Callable[[int], str], counts: Column | None) -> int:
    """Adds the texts of the first bad indices, and returns the number of all, or the sum of their counts."""
    chosen = np.flatnonzero(bad)
    texts += [text(index) for index in chosen[: max(0, SHOWN - len(texts))].tolist()]
    return len(chosen) if counts is None else int(counts[chosen].sum())
