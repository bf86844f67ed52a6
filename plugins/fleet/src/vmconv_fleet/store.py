"""The replica's database: SQLite, WAL, synchronous=FULL. Skeleton; the contract is what stands here."""

from __future__ import annotations

from vmconv_fleet.records import Position, Record


class View:
    """Reads of the committed state; deleted records are not there."""

    def get(self, owner: str, kind: str, id: str) -> Record | None:
        """Returns the live record."""
        raise NotImplementedError

    def find(self, kind: str, owner: str | None = None) -> list[Record]:
        """Returns the live records of a kind, by owner and id."""
        raise NotImplementedError

    def positions(self) -> dict[str, Position]:
        """Returns how far this replica has each owner's records."""
        raise NotImplementedError


class Reader(View):
    """A View of its own read-only connection, for any number of threads."""

    def close(self) -> None:
        raise NotImplementedError


class Store(View):
    """The one writer connection, on the replica's thread; its View sees what is not yet committed, too."""

    @classmethod
    def open(cls, path: str, node: str) -> Store:
        """Opens or makes the database of a node; StoreError: damaged, of another node or of a newer version."""
        raise NotImplementedError

    def reader(self) -> Reader:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError
