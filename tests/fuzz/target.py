"""The interface of a fuzz target."""

from __future__ import annotations

from abc import ABC, abstractmethod


class Target(ABC):
    """Something that reads strangers' bytes."""

    @abstractmethod
    def seeds(self) -> list[bytes]:
        """Returns inputs that are right, or nearly so."""

    @abstractmethod
    def run(self, data: bytes) -> None:
        """Gives the input to the code under test; any exception that comes out is a finding."""
