"""A snapshot of the fleet from one node's replica, for the API, the console and the metrics.

It knows only what the replica has: information about an unreachable node is as old as its last heartbeat, and the
snapshot states that age.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from pydantic import ValidationError

from vmconv.plugin import UsageError
from vmconv_fleet.catalogue.kinds import KINDS, Body, Granted, HeartbeatBody, NodeBody, TokenBody
from vmconv_fleet.catalogue.paging import Page, page_of, place_of
from vmconv_fleet.catalogue.searching import containing
from vmconv_fleet.catalogue.selection import Owner, Selection, condition
from vmconv_fleet.catalogue.windows import Waiting, waiting_of
from vmconv_fleet.replication.clock import MAX_AHEAD_MS
from vmconv_fleet.replication.indexing import ALL, Where
from vmconv_fleet.replication.records import Position, Record
from vmconv_fleet.replication.requests import response_id
from vmconv_fleet.replication.store import Listed, ReplicaView
from vmconv_fleet.words import role_text, trap_in

if TYPE_CHECKING:
    from vmconv_fleet.trust.rights import Rights

B = TypeVar("B", bound=Body)

NodeState = Literal["here", "up", "silent", "retired", "forked"]

_BEATS_MISSED = 3
_GRACE_MS = 3000
"""The age at which a node without a link counts as silent, unless others reach it."""

MAX_NAME = 80


class NodeView(NamedTuple):
    """A node as seen from here. `age_ms` is the age of its last heartbeat; None without one.

    `claims`: a name that it states, and that is not its own. `has_record`: it describes itself in a valid record.
    `lag`: records this node has that the other lacked when last heard from.
    """

    node: str
    name: str
    claims: str
    state: NodeState
    age_ms: int | None
    lag: int
    position: Position
    is_neighbour: bool
    body: NodeBody
    heartbeat: HeartbeatBody | None
    has_record: bool


class Snapshot:
    """The state of the fleet for one answer, from one view."""

    def __init__(
        self,
        view: ReplicaView,
        node: str,
        now_ms: int,
        *,
        neighbours: Iterable[str],
        retirements: Mapping[str, str],
        names: Mapping[str, str] = MappingProxyType({}),
        certified: Iterable[str] = (),
    ) -> None:
        """`retirements` are the nodes that the authority has retired, and their names; `names` those that it has given
        to nodes; `certified` the nodes that have a certificate.
        """
        self.view = view
        self.node = node
        self.now_ms = now_ms
        self._neighbours = frozenset(neighbours)
        self._positions = view.positions()
        self._retired = retirements
        self._given = names
        self._certified = frozenset(certified)
        self._in_use = {name.casefold() for name in names.values()}
        self._forked = view.forked()
        self._bodies = {one.owner: NodeBody.model_validate(one.body) for one in self._about_themselves("node")}

    def body(self, model: type[B], owner: str, kind: str, id: str) -> B | None:
        """Returns the body of a record; None if it is not here, or is not valid."""
        record = self.view.get(owner, kind, id)
        return model.model_validate(record.body) if record and _fits(model, record) else None

    def find(self, kind: str, owner: str | None = None) -> list[Record]:
        """Returns the records of a kind with valid bodies; other nodes may write invalid ones."""
        model = KINDS[kind]
        return [one for one in self.view.find(kind, owner) if _fits(model, one)]

    def signing(self) -> frozenset[tuple[str, str]]:
        """Returns the nodes and the keys that have signed their last heartbeats."""
        return frozenset((one.owner, one.key_id) for one in self._about_themselves("heartbeat"))

    def _about_themselves(self, kind: str) -> Iterable[Record]:
        """Returns the records that nodes have written about themselves: no node speaks for another."""
        return (one for one in self.find(kind) if one.id == one.owner)

    def name(self, node: str) -> str:
        """Returns the name of a node that the authority has given to it, or the beginning of its id.

        A node of an earlier version has the name that it states itself, unless that is another's, or a trap.
        """
        if node in self._given:
            return self._given[node]
        name = self._stated(node)
        return node[:8] if trap_in(name) or name.casefold() in self._in_use else name

    def claims(self, node: str) -> str:
        """Returns the name that a node states and that is not its own; empty if it does not."""
        stated = self._stated(node)
        return "" if stated == self.name(node) or node not in self._bodies else stated

    def _stated(self, node: str) -> str:
        body = self._bodies.get(node)
        return (body.name if body else self._retired.get(node, ""))[:MAX_NAME]

    def names(self, nodes: Iterable[str]) -> list[str]:
        """Returns the names of nodes, in their order."""
        return sorted(map(self.name, nodes))

    def nodes(self) -> list[NodeView]:
        """Returns all nodes by name, including this one, and certified ones without a valid record of themselves."""
        beats = {one.owner: HeartbeatBody.model_validate(one.body) for one in self._about_themselves("heartbeat")}
        known = {*self._bodies, *beats, *self._retired, *self._certified, self.node}
        reached = self._reached(beats)
        found = [self._node(one, beats.get(one), reached) for one in known]
        return sorted(found, key=lambda one: (one.name, one.node))

    def _node(self, node: str, beat: HeartbeatBody | None, reached: set[str]) -> NodeView:
        # A retired node, or one that has just joined, may have no record but its id.
        body = self._bodies.get(node) or NodeBody(name=node[:8], fleet="unknown")
        # A heartbeat by a clock that is far ahead would count as new until then.
        age = max(0, self.now_ms - beat.at_ms) if beat and beat.at_ms <= self.now_ms + MAX_AHEAD_MS else None
        state: NodeState = "silent"
        if node == self.node:
            state, age = "here", 0
        elif node in self._retired or body.retired:
            state = "retired"
        elif node in self._forked:
            state = "forked"
        elif node in self._neighbours or (age is not None and age <= _still_good_ms(beat, is_reached=node in reached)):
            state = "up"
        position = self._positions.get(node, Position(0, 0))
        lag = self._lag(node, beat) if beat and node != self.node else 0
        is_neighbour, has_record = node in self._neighbours, node in self._bodies
        return NodeView(
            node, self.name(node), self.claims(node), state, age, lag, position, is_neighbour, body, beat, has_record
        )

    def _reached(self, beats: Mapping[str, HeartbeatBody]) -> set[str]:
        """Returns the nodes that links lead to, directly or through others, by their last heartbeats."""
        reached: set[str] = set()
        waiting = list(self._neighbours)
        while waiting:
            node = waiting.pop()
            if node not in reached:
                reached.add(node)
                waiting += beats[node].neighbours if node in beats else []
        return reached

    def _lag(self, node: str, beat: HeartbeatBody) -> int:
        """Returns how many records of other owners the node lacked at its last heartbeat."""
        if not beat.positions:
            return 0
        return sum(
            max(0, mine.seq - beat.positions.get(owner, (0, 0))[1])
            for owner, mine in self._positions.items()
            if owner != node
        )

    def unseen(self, nodes: Iterable[NodeView]) -> list[NodeView]:
        """Returns the unreachable nodes."""
        return [one for one in nodes if one.state == "silent"]

    def find_node(self, named: str) -> str | None:
        """Returns the id of the node with this name, id, or unique beginning of an id, or None.

        A retired node does not make a name ambiguous. Raises UsageError if others do.
        """
        known = {one.node: one for one in self.nodes()}
        if named in known:
            return named
        fitting = [one for one in known.values() if one.name == named]
        fitting = fitting or [one for one in known.values() if len(named) >= 4 and one.node.startswith(named)]
        fitting = [one for one in fitting if one.state != "retired"] or fitting
        if len(fitting) > 1:
            ids = ", ".join(sorted(one.node for one in fitting))
            raise UsageError(f"{len(fitting)} nodes are called {named}", hint=f"use an id: {ids}")
        return fitting[0].node if fitting else None

    def owners(self) -> list[Owner]:
        """Returns the nodes whose disks are listed, by name; retired ones are not."""
        found = [
            Owner(number, self.name(node), node)
            for node, number in self.view.numbers().items()
            if node not in self._retired
        ]
        return sorted(found, key=lambda one: (one.name, one.node))

    def disks(
        self,
        selection: Selection | None = None,
        owner: str | None = None,
        *,
        search: str = "",
        sort: str = "node",
        after: str | None = None,
        limit: int,
    ) -> Page:
        """Returns the selected disks: by node, datastore and name, or by another field, which `-` reverses."""
        owners = self._owners(owner)
        where = _chosen("disk", selection, search, owners)
        if sort == "node":
            return self._disks_by_node(owners, where, after, limit)
        return self._sorted("disk", where, owners, sort, after, limit)

    def vms(
        self,
        selection: Selection | None = None,
        owner: str | None = None,
        *,
        search: str = "",
        sort: str = "name",
        after: str | None = None,
        limit: int,
    ) -> Page:
        """Returns the selected virtual machines by a field, which `-` reverses."""
        owners = self._owners(owner)
        return self._sorted("vm", _chosen("vm", selection, search, owners), owners, sort, after, limit)

    def _owners(self, owner: str | None) -> list[Owner]:
        return [one for one in self.owners() if owner in (None, one.node)]

    def _sorted(
        self, kind: str, where: Where, owners: Sequence[Owner], sort: str, after: str | None, limit: int
    ) -> Page:
        numbers = ", ".join(str(one.number) for one in owners)
        return self.page(
            kind,
            # The sign keeps SQLite from looking up the owners, and then sorting: the index of the order is quicker.
            where.also(f"+owner IN ({numbers})"),
            order=(sort.removeprefix("-").replace("-", "_"),),
            descending=sort.startswith("-"),
            after=after,
            limit=limit,
        )

    def _disks_by_node(self, owners: Sequence[Owner], where: Where, after: str | None, limit: int) -> Page:
        """Goes from node to node: the database does not know the order of their names."""
        name, node, *behind = place_of(after, 5) if after else ("", "", "", "", "")
        total, found = 0, list[Listed]()
        for one in owners:
            own = where.also("owner = ?", one.number)
            total += self.view.tally("disk", own)[0][0]
            if len(found) > limit or (one.name, one.node) < (name, node):
                continue
            place = (behind[0], behind[1], one.number, behind[2]) if (one.name, one.node) == (name, node) else ()
            more = self.view.listed("disk", own, order=("datastore", "name"), after=place, limit=limit + 1 - len(found))
            found += [(disk, (one.name, one.node, at[0], at[1], at[3])) for disk, at in more]
        return page_of(found, limit, total, self._fits)

    def page(
        self,
        kind: str,
        where: Where = ALL,
        *,
        owner: str | None = None,
        order: Sequence[str] = (),
        descending: bool = False,
        after: str | None = None,
        limit: int,
    ) -> Page:
        """Returns a page of an indexed kind."""
        if owner is not None:
            where = where.also("owner = ?", self.view.numbers().get(owner, -1))
        place = place_of(after, len(order) + 2) if after else ()
        found = self.view.listed(kind, where, order=order, descending=descending, after=place, limit=limit + 1)
        return page_of(found, limit, self.view.tally(kind, where)[0][0], self._fits)

    def records(self, kind: str, owner: str | None = None, *, after: str | None = None, limit: int) -> Page:
        """Returns a page of any kind, also one that this node does not know."""
        place = place_of(after, 2) if after else ()
        found = self.view.records(kind, owner=owner, after=place, limit=limit + 1)
        return page_of(found, limit, None)

    def _fits(self, record: Record) -> bool:
        return _fits(KINDS[record.kind], record)

    def response_of(self, request: Record) -> Record | None:
        """Returns the response to a request, if it has arrived."""
        identifier = response_id(request.owner, request.id)
        return self.view.get(str(request.body.get("target", "")), "response", identifier)

    def waiting_of(self, job: Record) -> Waiting:
        """Returns for what a queued job waits, by its own time and window and those of its node."""
        policy = self.view.get(job.owner, "policy", "conversion")
        return waiting_of(job.body, policy.body if policy else {}, self.now_ms)

    def since(self, moment_ms: int) -> int:
        return max(0, self.now_ms - moment_ms)

    def describe_role(self, granted: Granted | Rights) -> str:
        person = granted.person if isinstance(granted, TokenBody) else None
        groups = {"person": {"groups": person.groups}} if person else {}
        return role_text({"role": granted.role, "datastores": granted.datastores, **groups}, self.name)

    def describe_by(self, by: Mapping[str, Any] | None) -> str:
        """Returns the caller of a request as text."""
        if not by:
            return ""
        who = str(by.get("user") or "somebody")[:MAX_NAME]
        return f"{who} at {self.name(str(by.get('node', '')))}"


def _chosen(kind: str, selection: Selection | None, search: str, owners: Sequence[Owner]) -> Where:
    """Returns the condition of a selection and a search."""
    where = containing(kind, search)
    return where if selection is None else where.joined(condition(selection, owners))


def _still_good_ms(beat: HeartbeatBody | None, *, is_reached: bool) -> float:
    """Returns the age up to which a heartbeat shows that its node is up."""
    return _BEATS_MISSED * 1000 * beat.interval_s if beat and is_reached else _GRACE_MS


def _fits(model: type[Body], record: Record) -> bool:
    try:
        model.model_validate(record.body)
    except ValidationError:
        return False
    return True
