"""What all routes share: the node, the bus of its changes, the sessions of browsers."""

from __future__ import annotations

from typing import Annotated, Protocol, cast

from fastapi import Depends, Request

from vmconv_fleet.api.bus import Bus
from vmconv_fleet.api.sessions import Sessions
from vmconv_fleet.catalogue.snapshot import Picture
from vmconv_fleet.replication.clock import wall_ms
from vmconv_fleet.replication.problems import Problem
from vmconv_fleet.replication.service import NodeService
from vmconv_fleet.replication.store import View


class Link(Protocol):
    """The node's connection with the others, which the local administrator can cut and join."""

    @property
    def is_cut(self) -> bool: ...

    def cut(self) -> None: ...

    def join(self) -> None: ...

    def problems(self) -> list[Problem]: ...

    def neighbours(self) -> list[str]: ...


class State:
    """A running node, as the API sees it."""

    def __init__(self, service: NodeService, directory: str, link: Link | None) -> None:
        self.service = service
        self.directory = directory
        self.link = link
        self.bus = Bus(service)
        self.sessions = Sessions()

    @property
    def node(self) -> str:
        return self.service.node

    def view(self) -> View:
        return self.service.view()

    def now_ms(self) -> int:
        return wall_ms()

    def picture(self) -> Picture:
        return Picture(self.view(), self.node, self.now_ms(), self.service.neighbours())

    def problems(self) -> list[str]:
        """Returns what is wrong with the node itself, in words."""
        found = [problem.text for problem in self.service.problems()]
        if self.link:
            found += [problem.text for problem in self.link.problems()]
        return list(dict.fromkeys(found))


def state_of(request: Request) -> State:
    return cast("State", request.app.state.fleet)


StateOf = Annotated[State, Depends(state_of)]
