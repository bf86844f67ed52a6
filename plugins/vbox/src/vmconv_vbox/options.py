"""Options of the writer."""

from __future__ import annotations

from dataclasses import dataclass

from vmconv.plugin import option


@dataclass(frozen=True)
class Options:
    """What the target's host calls things."""

    bridge: str | None = option(None, "network interface of the host for bridged cards; by default the source's name")

    def __post_init__(self) -> None:
        if self.bridge is not None and not (self.bridge.strip() and self.bridge.isprintable()):
            raise ValueError("bridge is the name of a network interface")
