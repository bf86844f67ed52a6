"""Which members a node dials, and what of a member's record: no sockets, no time of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from fleet.plain import node_id
from vmconv_fleet.config import NodeConfig
from vmconv_fleet.links.peers import DEGREE, MAX_EXPECTED, Dialler, dialled, links_of
from vmconv_fleet.links.zenoh_config import MESH
from vmconv_fleet.trust.addresses import MAX_ANNOUNCED, dialable

CONFIG = NodeConfig(directory="/", fleet="lab", node=node_id(0), name="n", listen=["10.0.0.1:7447"])


class World:
    """Nodes that know each other's records; a node answers at its address while it is up and on the same side."""

    def __init__(self, size: int) -> None:
        self.ids = [node_id(number) for number in range(size)]
        self.records: dict[str, Mapping[str, Any]] = {
            node: {"links": [f"10.0.{number // 256}.{number % 256}:7447"]} for number, node in enumerate(self.ids)
        }
        self.side = dict.fromkeys(self.ids, 0)
        self.probes: Counter[str] = Counter()
        self.links: set[frozenset[str]] = set()
        self.now = 0.0
        self.diallers = {node: self._dialler(node) for node in self.ids}

    def _dialler(self, me: str) -> Dialler:
        def meets(address: str) -> str | None:
            self.probes[address] += 1
            for node, record in self.records.items():
                if address in record["links"] and self.side[node] == self.side[me]:
                    return node
            return None

        return Dialler(replace(CONFIG, node=me), lambda: self.ids, self.records.__getitem__, meets)

    def step(self, seconds: float = 2.0) -> None:
        """Each running node looks once, and links with whom it found."""
        self.now += seconds
        of = {address: node for node, record in self.records.items() for address in record["links"]}
        for node, dialler in self.diallers.items():
            if self.side[node] >= 0:
                linked = [other for link in self.links if node in link for other in link if other != node]
                dialler.look(linked, self.now)
                found = [of[address] for address in dialler.endpoints() if address in of]
                self.links |= {frozenset((node, other)) for other in found if self.side[other] == self.side[node]}

    def split(self, sides: Mapping[str, int]) -> None:
        self.side.update(sides)
        self.links = {link for link in self.links if len({self.side[node] for node in link}) == 1}

    def parts(self) -> int:
        """Returns the number of parts of the running nodes without a link between them."""
        up = {node for node in self.ids if self.side[node] >= 0}
        parts = 0
        while up:
            parts, reached = parts + 1, {up.pop()}
            while reached:
                node = reached.pop()
                near = {other for link in self.links if node in link for other in link} & up
                up -= near
                reached |= near
        return parts


def test_nodes_without_their_founder_find_each_other() -> None:
    world = World(3)
    world.split({world.ids[0]: -1})
    world.step()
    assert not world.probes
    world.step()
    assert world.links == {frozenset(world.ids[1:])}


def test_a_small_fleet_is_linked_all_with_all() -> None:
    world = World(12)
    world.step()
    world.step()
    assert len(world.links) == 12 * 11 // 2


def test_a_large_fleet_is_one_with_few_links_and_survives_losses() -> None:
    world, random = World(MESH + 40), Random(1)
    for _ in range(4):
        world.step()
    assert world.parts() == 1
    assert len(world.links) <= len(world.ids) * 8
    for node in random.sample(world.ids, len(world.ids) * 3 // 4):
        world.split({node: -1})
    for _ in range(20):
        world.step()
    assert world.parts() == 1
    alive = [node for node in world.ids if world.side[node] == 0]
    assert all(sum(node in link for link in world.links) >= 8 for node in alive)


def test_the_parts_of_a_large_fleet_come_together_after_a_partition() -> None:
    world = World(MESH + 40)
    world.step()
    world.step()
    world.split({node: number % 2 for number, node in enumerate(world.ids)})
    for _ in range(10):
        world.step()
    assert world.parts() == 2
    world.split(dict.fromkeys(world.ids, 0))
    for _ in range(3):
        world.step()
    assert world.parts() == 1


def test_a_missing_member_costs_less_and_less_probes() -> None:
    world = World(2)
    world.split({world.ids[1]: -1})
    for _ in range(1800):
        world.step()
    assert world.probes["10.0.0.1:7447"] < 100
    before = world.probes.total()
    world.split({world.ids[1]: 0})
    for _ in range(30):
        world.step()
    assert len(world.links) == 1
    assert world.probes.total() <= before + 3


def test_a_missing_member_is_probed_after_an_eighth_of_its_absence() -> None:
    """But not before two seconds, and after a minute at the latest."""
    probed: list[float] = []
    now = 0.0
    member = node_id(1)
    records = {member: {"links": ["10.0.0.2:7447"]}}
    config = replace(CONFIG, node=node_id(0))
    dialler = Dialler(config, lambda: [member], records.__getitem__, lambda _address: probed.append(now))
    while now < 2000:
        dialler.look([], now)
        now += 0.25
    expected = [2.0]
    while (following := expected[-1] + min(max(2.0, expected[-1] / 8), 60.0)) < 2000:
        # The next look.
        expected.append(-(-following // 0.25) * 0.25)
    assert probed == expected


def test_the_longest_absent_are_probed_last() -> None:
    probed: list[str] = []
    members: list[str] = []
    records = {node_id(n): {"links": [f"10.0.0.{n}:7447"]} for n in range(1, 60)}
    config = replace(CONFIG, node=node_id(0))
    dialler = Dialler(config, lambda: members, records.__getitem__, probed.append)
    members += [node_id(n) for n in range(30, 60)]
    dialler.look([], 0.0)
    dialler.look([], 2.0)
    assert len(probed) == 30
    members += [node_id(n) for n in range(1, 30)]
    dialler.look([], 2.5)
    # Those of before are due later than the new ones.
    dialler.look([], 4.0)
    assert len(probed) == 60
    probed.clear()
    dialler.look([], 10.0)
    assert {f"10.0.0.{n}:7447" for n in range(1, 30)} < {*probed}
    assert len(probed) == 32


def test_a_member_that_names_the_addresses_of_others_is_probed_seldom_and_not_dialled() -> None:
    world = World(3)
    world.records[world.ids[1]] = {"links": ["10.0.0.2:7447", "10.9.9.9:22"] * 50}
    for _ in range(1800):
        world.step()
    assert world.diallers[world.ids[0]].endpoints() == ["10.0.0.2:7447"]
    assert world.probes["10.9.9.9:22"] < 100 * 2 * MAX_ANNOUNCED


def test_changed_addresses_are_followed_and_former_members_forgotten() -> None:
    world = World(3)
    world.step()
    world.step()
    dialler = world.diallers[world.ids[0]]
    world.records[world.ids[1]] = {"links": ["10.7.7.7:7447"]}
    for _ in range(2):
        world.now += 2
        dialler.look([world.ids[2]], world.now)
    assert set(dialler.endpoints()) == {"10.7.7.7:7447", "10.0.0.2:7447"}
    world.ids.remove(world.ids[1])
    dialler.look([], world.now + 1)
    assert dialler.endpoints() == ["10.0.0.2:7447"]


def test_a_look_probes_a_bounded_number_of_members() -> None:
    world = World(MESH)
    world.split(dict.fromkeys(world.ids[1:], -1))
    world.step()
    world.step()
    assert world.probes.total() == 32


def test_a_node_that_joins_is_dialled_where_it_said_until_it_has_a_record() -> None:
    joined, records = node_id(1), dict[str, Mapping[str, Any]]()
    probed: list[str] = []

    def meets(address: str) -> str:
        probed.append(address)
        return joined

    dialler = Dialler(replace(CONFIG, node=node_id(0)), lambda: [joined], lambda node: records.get(node, {}), meets)
    dialler.expect(joined, ["127.0.0.1:7447", "10.0.0.9:0", 5, "10.0.0.2:7447"])
    assert not dialler.look([], 0.0)
    assert dialler.look([], 2.0)
    assert dialler.endpoints() == probed == ["10.0.0.2:7447"]
    records[joined] = {"links": ["10.0.0.3:7447"]}
    assert dialler.look([], 4.0)
    assert dialler.endpoints() == ["10.0.0.3:7447"]


def test_only_the_newest_nodes_that_joined_are_remembered() -> None:
    probed: list[str] = []
    members = [node_id(number) for number in range(1, MAX_EXPECTED + 2)]
    dialler = Dialler(replace(CONFIG, node=node_id(0)), lambda: members[:2], lambda _node: {}, probed.append)
    for number, member in enumerate(members):
        dialler.expect(member, [f"10.0.0.{number}:7447"])
    dialler.look([], 0.0)
    dialler.look([], 2.0)
    assert probed == ["10.0.0.1:7447"]


def test_without_gossip_only_the_seeds_are_dialled() -> None:
    probed: list[str] = []
    dialler = Dialler(
        replace(CONFIG, gossip=False), lambda: [node_id(1)], lambda _node: {"links": ["10.0.0.2:1"]}, probed.append
    )
    assert not dialler.look([], 1.0)
    assert probed == []


def test_the_choice_is_repeatable_and_differs_between_nodes() -> None:
    ids = [node_id(number) for number in range(200)]
    chosen = [tuple(dialled(node, ids, lambda _node: False)) for node in ids]
    assert chosen == [tuple(dialled(node, Random(5).sample(ids, 200), lambda _node: False)) for node in ids]
    assert len(set(chosen)) == 200
    assert {len(one) for one in chosen} == {DEGREE} == {8}
    assert max(Counter(node for one in chosen for node in one).values()) < 4 * DEGREE
    order = sorted(ids)
    following = dict(zip(order, [*order[1:], order[0]], strict=True))
    assert [one[0] for one in chosen] == [following[node] for node in ids]


@pytest.mark.parametrize(
    "links",
    [
        None,
        {},
        "10.0.0.1:7447",
        [7447],
        [None],
        ["10.0.0.1"],
        ["10.0.0.1:0"],
        ["10.0.0.1:99999"],
        ["10.0.0.1:-1"],
        ["10.0.0.1: 7"],
        ["10.0.0.1:07447"],
        ["169.254.169.254:80"],
        ["[fe80::1]:7447"],
        ["[fe80::1%eth0]:7447"],
        ["127.0.0.1:7447"],
        ["127.1:7447"],
        ["localhost:7447"],
        ["LocalHost:7447"],
        ["n.localhost:7447"],
        ["2130706433:7447"],
        ["n.0x7f000001:7447"],
        ["[::1]:7447"],
        ["[::ffff:127.0.0.1]:7447"],
        ["[::ffff:169.254.1.1]:7447"],
        ["0.0.0.0:7447"],
        ["[::]:7447"],
        ["224.0.0.1:7447"],
        ["-rf:7447"],
        ["a/b:7447"],
        ["a b:7447"],
        ["a\nb:7447"],
        ["tls/10.0.0.1:7447"],
        ["10.0.0.1:7447#iface=eth0"],
        ["a" * 300 + ":7447"],
        [".".join(["a" * 63] * 5) + ":7447"],
    ],
    ids=repr,
)
def test_what_a_hostile_record_states_is_not_dialled(links: object) -> None:
    assert dialable(links, here=False) == []


def test_what_a_record_may_state_is_dialled() -> None:
    links = ["10.0.0.1:7447", "[fd00::1]:7447", "n01.example:7447", "n02:1"]
    assert dialable(links, here=False) == links
    assert dialable(["127.0.0.1:7447", "[::1]:7447"], here=True) == ["127.0.0.1:7447", "[::1]:7447"]
    assert len(dialable(["10.0.0.1:7447"] * 1000, here=False)) == MAX_ANNOUNCED


def test_a_node_announces_where_it_listens_addresses_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert links_of(CONFIG) == ["10.0.0.1:7447"]
    everywhere = replace(CONFIG, listen=["[::]:7447"])
    assert links_of(replace(everywhere, addresses=["n01", "127.0.0.1", "10.0.0.9"])) == ["10.0.0.9:7447", "n01:7447"]
    machine = ["127.0.0.1", "localhost", "n01", *(f"10.0.0.{n}" for n in range(9))]
    monkeypatch.setattr("vmconv_fleet.trust.addresses.local_addresses", lambda: machine)
    assert links_of(everywhere) == [f"10.0.0.{n}:7447" for n in range(MAX_ANNOUNCED)]
    assert dialable(links_of(everywhere), here=False) == links_of(everywhere)
