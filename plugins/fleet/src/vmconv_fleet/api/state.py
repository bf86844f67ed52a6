"""The state shared by all routes: the node, its commits, the sessions of browsers."""

from __future__ import annotations

from typing import Annotated, Protocol, cast

from fastapi import Depends, Request

from vmconv_fleet.api.bus import Bus
from vmconv_fleet.api.sessions import BrowserSessions
from vmconv_fleet.catalogue.snapshot import Snapshot
from vmconv_fleet.errors import NotReadyError
from vmconv_fleet.replication.clock import wall_ms
from vmconv_fleet.replication.problems import NodeProblem
from vmconv_fleet.replication.service import NodeService
from vmconv_fleet.replication.store import ReplicaView

MERGE = "end all other copies of this node, then: vmconv node resume --merge"
RESUME = "if one is lost: vmconv node resume --without NODE, or --alone"


class Link(Protocol):
    """The links of the node, which the local administrator can disconnect and reconnect."""

    @property
    def is_disconnected(self) -> bool: ...

    def disconnect(self) -> None: ...

    def reconnect(self) -> None: ...

    def problems(self) -> list[NodeProblem]: ...

    def neighbours(self) -> list[str]: ...


class State:
    """A running node, as the API sees it."""

    def __init__(self, service: NodeService, directory: str, link: Link | None) -> None:
        self.service = service
        self.directory = directory
        self.link = link
        self.bus = Bus(service)
        self.sessions = BrowserSessions()

    @property
    def node(self) -> str:
        return self.service.node

    def view(self) -> ReplicaView:
        return self.service.view()

    def now_ms(self) -> int:
        return wall_ms()

    def snapshot(self) -> Snapshot:
        return Snapshot(
            self.view(),
            self.node,
            self.now_ms(),
            neighbours=self.service.neighbours(),
            retirements=self.service.retirements(),
            names=self.service.names(),
            certified=(one.node for one in self.service.certified_keys()),
        )

    def refuse_while_held(self) -> None:
        """Raises NotReadyError if this node writes nothing until other members or its administrator act."""
        if self.service.is_forked:
            raise NotReadyError("this node has two histories, and changes nothing until they are merged", hint=MERGE)
        if names := ", ".join(self.waits_for()):
            raise NotReadyError(
                f"this node has a restored database, and writes again once it has heard from {names}", hint=RESUME
            )

    def waits_for(self) -> list[str]:
        """Returns the names of the members that this node waits for before it writes."""
        if not self.service.is_restored:
            return []
        return self.snapshot().names(self.service.awaited()) or ["any other node"]

    def problems(self) -> list[str]:
        """Returns the node's own problems as text."""
        found = [problem.text for problem in self.service.problems()]
        if self.link:
            found += [problem.text for problem in self.link.problems()]
        return list(dict.fromkeys(found))


def state_of(request: Request) -> State:
    return cast("State", request.app.state.fleet)


StateOf = Annotated[State, Depends(state_of)]
