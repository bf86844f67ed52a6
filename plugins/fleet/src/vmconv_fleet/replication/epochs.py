"""An owner's epochs and floor: they tell whether a position belongs to the owner's history.

They are a record of kind `epoch` with the id `history`: the first record after each start, rewritten when the floor
rises. So they are signed, and a replica with a state also has the history of that state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from vmconv_fleet.replication.records import MAX_NUMBER, Position, Record

KIND = "epoch"
ID = "history"
MAX_EPOCHS = 64


class History(NamedTuple):
    """The owner's epochs: `starts` are (epoch, seq of its first record), ascending, the newest MAX_EPOCHS.

    `floor`: deletions up to this seq are forgotten, so a replica below it cannot learn what to delete. `merged`: the
    ends, (epoch, last seq), of other histories that the owner's administrator has merged into this one.
    """

    starts: tuple[tuple[int, int], ...] = ()
    floor: int = 0
    merged: tuple[tuple[int, int], ...] = ()

    def begun(self, epoch: int, seq: int, merged: Iterable[tuple[int, int]] = ()) -> History:
        """Returns the history with one more epoch, which begins with this record."""
        starts = (*self.starts, (epoch, seq))[-MAX_EPOCHS:]
        return self._replace(starts=starts, merged=(*self.merged, *merged)[-MAX_EPOCHS:])

    def holds(self, position: Position) -> bool:
        """Returns whether a replica at the position has a part of this history, and can be sent the rest."""
        return position.seq >= self.floor and self.passed(position)

    def follows(self, position: Position) -> bool:
        """Returns whether this history contains the position, as far as it is recorded, also as a merged one."""
        forgotten = len(self.starts) == MAX_EPOCHS and position < self.starts[0]
        return forgotten or self.passed(position) or self.has_merged(position)

    def has_merged(self, position: Position) -> bool:
        """Returns whether the position is in another history, which was merged into this one."""
        return any(epoch == position.epoch and position.seq <= last for epoch, last in self.merged)

    def passed(self, position: Position) -> bool:
        """Returns whether the owner itself was at the position in this history."""
        for number, (epoch, first) in enumerate(self.starts):
            if epoch == position.epoch:
                following = self.starts[number + 1 : number + 2]
                return first <= position.seq and all(position.seq < start for _, start in following)
        return False

    def shared(self, other: History) -> int:
        """Returns the seq of the last record that two histories have in common; 0 if none is known."""
        ours, theirs = dict(self.starts), dict(other.starts)
        last = max(ours.keys() & theirs.keys(), default=0)
        following = [first for epoch, first in (*self.starts, *other.starts) if epoch > last]
        return min(following, default=ours[last]) - 1 if last else 0

    def body(self) -> dict[str, Any]:
        merged = {"merged": [list(end) for end in self.merged]} if self.merged else {}
        return {"starts": [list(start) for start in self.starts], "floor": self.floor, **merged}


def history_of(record: Record | None) -> History:
    """Returns the history that a record states; an empty one for no record or an invalid one."""
    if record is None:
        return History()
    try:
        starts = tuple((_number(epoch), _number(first)) for epoch, first in record.body["starts"])
        merged = tuple((_number(epoch), _number(last)) for epoch, last in record.body.get("merged", ()))
        return History(starts[-MAX_EPOCHS:], _number(record.body["floor"]), merged[-MAX_EPOCHS:])
    except (KeyError, TypeError, ValueError):
        return History()


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_NUMBER:
        raise ValueError(f"{value} is not a number from 0 to {MAX_NUMBER}")
    return value
