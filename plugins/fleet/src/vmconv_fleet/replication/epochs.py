"""An owner's epochs and floor: they tell whether a position belongs to the owner's history.

They are a record of kind `epoch` with the id `history`: the first record after each start, rewritten when the floor
rises. So they are signed, and a replica with a state also has the history of that state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vmconv_fleet.replication.records import MAX_NUMBER, Position, Record

KIND = "epoch"
ID = "history"
MAX_EPOCHS = 64
CLONED = "cloned"
"""The field by which an owner says that another process writes as it: the other one's record, in hex."""


class History(NamedTuple):
    """The owner's epochs: `starts` are (epoch, seq of its first record), ascending, the newest MAX_EPOCHS.

    `floor`: deletions up to this seq are forgotten, so a replica below it cannot learn what to delete. `beyond`: the
    newest epoch of another history that the owner knew when it began its own last one; 0 if it knew none.
    """

    starts: tuple[tuple[int, int], ...] = ()
    floor: int = 0
    beyond: int = 0

    def begun(self, epoch: int, seq: int, beyond: int = 0) -> History:
        """Returns the history with one more epoch, which begins with this record."""
        return self._replace(starts=(*self.starts, (epoch, seq))[-MAX_EPOCHS:], beyond=beyond)

    def holds(self, position: Position) -> bool:
        """Returns whether a replica at the position has a part of this history, and can be sent the rest."""
        return position.seq >= self.floor and self._passed(position)

    def follows(self, position: Position) -> bool:
        """Returns whether this history continues from the position, as far as it is recorded."""
        forgotten = len(self.starts) == MAX_EPOCHS and position < self.starts[0]
        return forgotten or self._passed(position)

    def knows(self) -> set[int]:
        """Returns the epochs that the writer knew, those of other histories included."""
        return {self.beyond, *(epoch for epoch, _ in self.starts)}

    def _passed(self, position: Position) -> bool:
        for number, (epoch, first) in enumerate(self.starts):
            if epoch == position.epoch:
                following = self.starts[number + 1 : number + 2]
                return first <= position.seq and all(position.seq < start for _, start in following)
        return False

    def body(self) -> dict[str, Any]:
        return {"starts": [list(start) for start in self.starts], "floor": self.floor, "beyond": self.beyond}


def history_of(record: Record | None) -> History:
    """Returns the history that a record states; an empty one for no record or an invalid one."""
    if record is None:
        return History()
    try:
        starts = tuple((_number(epoch), _number(first)) for epoch, first in record.body["starts"])
        return History(starts[-MAX_EPOCHS:], _number(record.body["floor"]), _number(record.body.get("beyond", 0)))
    except (KeyError, TypeError, ValueError):
        return History()


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_NUMBER:
        raise ValueError(f"{value} is not a number from 0 to {MAX_NUMBER}")
    return value
