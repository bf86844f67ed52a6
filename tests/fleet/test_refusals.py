"""What a node refuses of the network: each of these gets no word in, and those who are in go on."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import queue
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import zenoh

from vmconv_fleet.config import NodeConfig
from vmconv_fleet.links import zenoh_link
from vmconv_fleet.links.probing import probe
from vmconv_fleet.links.sockets import give_up_after
from vmconv_fleet.links.watching import Watch
from vmconv_fleet.links.zenoh_config import ALL, LEASE_MS, link_key, zenoh_settings
from vmconv_fleet.links.zenoh_link import ZenohLink
from vmconv_fleet.replication.database import open_reader
from vmconv_fleet.replication.messages import LIVE, Live, encode
from vmconv_fleet.replication.records import Record, seal
from vmconv_fleet.replication.records import encode as payload
from vmconv_fleet.replication.store import Reader
from vmconv_fleet.testing import PATIENCE, Driven, Lab, agree, free_port, view_of, wait_until
from vmconv_fleet.trust import credentials
from vmconv_fleet.trust.authority import Authority
from vmconv_fleet.trust.identity import Ed25519Signer, Keys, new_node_id

HELLO = bytes((LIVE,)) + b"hello"
SILENCE = 1.0
"""Seconds without a word, after which a stranger's word counts as refused; a member's takes milliseconds."""


class Events:
    """Keeps what a transport tells."""

    def __init__(self) -> None:
        self.messages: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        self.neighbours: set[str] = set()

    def connected(self, peer: str) -> None:
        self.neighbours.add(peer)

    def disconnected(self, peer: str) -> None:
        self.neighbours.discard(peer)

    def received(self, peer: str, message: bytes) -> None:
        self.messages.put((peer, message))


class Node:
    """A node's links, without the rest of the node."""

    def __init__(self, config: NodeConfig, members: set[str]) -> None:
        self.config = config
        self.events = Events()
        self.revoked: set[str] = set()
        self.link = ZenohLink(config, members=lambda: members, is_revoked=lambda node: node in self.revoked)
        self.link.start(self.events)

    def hears(self) -> list[tuple[str, bytes]]:
        """Returns what has been said to it, after a silence."""
        found = []
        while True:
            try:
                found.append(self.events.messages.get(timeout=SILENCE))
            except queue.Empty:
                return found


class Pair:
    """Two neighbours of a fleet, and nodes that want to join them."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        configs = [lab.add(), lab.add()]
        self.members = {config.node for config in configs}
        self.nodes = [Node(config, self.members) for config in configs]
        self.victim, self.friend = self.nodes

    def wait(self) -> None:
        wait_until(lambda: all(node.link.neighbours() for node in self.nodes), PATIENCE, "the two are neighbours")

    def still_talk(self) -> bool:
        """Returns whether the friend is heard, as it was before."""
        self.wait()
        self.friend.link.send(self.victim.config.node, HELLO)
        return self.victim.events.messages.get(timeout=PATIENCE) == (self.friend.config.node, HELLO)

    def certified(self, **options: Any) -> NodeConfig:
        """Returns a third node with a certificate, whom the victim expects."""
        config = self.lab.add(**options)
        self.members.add(config.node)
        self.victim_opens_again(self.victim.link.members_changed)
        return config

    def victim_opens_again(self, because: Callable[[], None]) -> None:
        """Waits until the victim has renewed its rules."""
        before = self.victim.link.counters["opened"]
        because()
        wait_until(lambda: self.victim.link.counters["opened"] > before, PATIENCE, "the rules are renewed")
        self.wait()

    def shows(self, kind: str) -> bool:
        """Returns whether the victim reports a problem of this kind now."""
        return kind in [problem.kind for problem in self.victim.link.problems()]

    def say(
        self, settings: dict[str, Any], sender: str, *, is_heard: bool = False, shown: str | None = None
    ) -> list[tuple[str, bytes]]:
        """Opens a session with these settings, says hello in the sender's name, and returns what the victim hears.

        With `is_heard`, it continues until the victim receives a message; with `shown`, until the victim reports a
        problem of this kind, which is over when the session has ended.
        """
        messages = self.victim.events.messages
        with zenoh.open(zenoh.Config.from_json5(json.dumps(settings))) as session:
            # Again and again: a link takes a moment, if there is one.
            for count in range(int(PATIENCE * 10)):
                for receiver in (self.victim.config.node, ALL):
                    session.put(link_key("lab", sender, receiver), HELLO)
                time.sleep(0.1)
                waits = (is_heard and messages.empty()) or (shown is not None and not self.shows(shown))
                if count >= 9 and not waits:
                    break
            assert shown is None or self.shows(shown)
        if shown is not None:
            wait_until(lambda: not self.shows(shown), PATIENCE, f"{shown} is over")
        return self.victim.hears()


@contextlib.contextmanager
def linked(lab: Lab) -> Iterator[Pair]:
    made = Pair(lab)
    try:
        made.wait()
        yield made
    finally:
        for node in made.nodes:
            node.link.close()


@pytest.fixture
def pair(lab: Lab) -> Iterator[Pair]:
    with linked(lab) as made:
        yield made


def settings_of(config: NodeConfig) -> dict[str, Any]:
    """Returns what a node with these credentials would open, without the rules that it sets for itself."""
    settings: dict[str, Any] = json.loads(zenoh_settings(config, []))
    settings["listen"] = {"endpoints": []}
    settings["access_control"] = {"enabled": False}
    return settings


def test_a_members_messages_carry_its_own_name(pair: Pair) -> None:
    """What the refusals below are measured against."""
    member = pair.certified()
    assert set(pair.say(settings_of(member), member.node, is_heard=True)) == {(member.node, HELLO)}


def test_messages_of_a_new_member_are_accepted_after_the_rules_are_updated(pair: Pair) -> None:
    newcomer = pair.lab.add()
    assert pair.victim.link.counters["opened"] == 1
    assert set(pair.say(settings_of(newcomer), newcomer.node)) <= {(newcomer.node, HELLO)}
    pair.wait()
    assert pair.victim.link.counters["opened"] == 2
    assert set(pair.say(settings_of(newcomer), newcomer.node, is_heard=True)) == {(newcomer.node, HELLO)}


def test_no_certificate(pair: Pair) -> None:
    settings = settings_of(pair.certified())
    tls = settings["transport"]["link"]["tls"]
    del tls["connect_certificate"], tls["connect_private_key"]
    tls["enable_mtls"] = False
    assert pair.say(settings, pair.friend.config.node) == []
    assert pair.still_talk()


def test_another_authority(pair: Pair, tmp_path: Path) -> None:
    stranger = pair.certified()
    (tmp_path / "other").mkdir()
    authority, keys = Authority.found(str(tmp_path / "other"), "lab"), Keys.generate()
    request = keys.request(stranger.node, "lab", ["127.0.0.1"])
    credentials.install(stranger.directory, keys, authority.issue(request))
    assert pair.say(settings_of(stranger), stranger.node) == []
    assert probe(stranger, stranger.connect[0]).kind == "refused"
    shutil.copy(tmp_path / "other" / "ca.pem", stranger.directory)
    assert pair.say(settings_of(stranger), stranger.node) == []
    assert probe(stranger, stranger.connect[0]).kind == "untrusted"
    assert pair.still_talk()


def test_plain_tcp(pair: Pair) -> None:
    settings = settings_of(pair.certified())
    address = pair.victim.config.listen[0]
    settings["transport"]["link"] = {"protocols": ["tcp"]}
    settings["connect"]["endpoints"] = [f"tcp/{address}"]
    assert pair.say(settings, pair.friend.config.node) == []
    assert pair.still_talk()


@pytest.mark.parametrize("junk", [b"", b"GET / HTTP/1.0\r\n\r\n", bytes(100_000), b"\x16\x03\x01" + b"\xff" * 70_000])
def test_junk_on_the_port(pair: Pair, junk: bytes) -> None:
    host, _, port = pair.victim.config.listen[0].rpartition(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        # It may be refused in the middle.
        with contextlib.suppress(ConnectionError):
            connection.sendall(junk)
        assert pair.still_talk()


def test_a_member_that_writes_anothers_key(pair: Pair) -> None:
    member = pair.certified()
    assert pair.say(settings_of(member), pair.friend.config.node) == []
    assert pair.still_talk()


def test_a_member_cannot_read_messages_for_another(pair: Pair) -> None:
    member = pair.certified()
    heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with zenoh.open(zenoh.Config.from_json5(json.dumps(settings_of(member)))) as session:
        friend = link_key("lab", "*", pair.friend.config.node)
        for key in ("**", link_key("lab", "*", "*"), friend, link_key("lab", "*", member.node)):
            session.declare_subscriber(key, lambda sample: heard.put(sample.payload.to_bytes()))
        wait_until(lambda: member.node in pair.victim.events.neighbours, PATIENCE, "the member is a neighbour")
        for _ in range(10):
            pair.victim.link.send(pair.friend.config.node, b"l for the friend")
            pair.victim.link.send(member.node, b"l for the member")
            time.sleep(0.02)
        assert heard.get(timeout=PATIENCE) == b"l for the member"
    while not heard.empty():
        assert heard.get() == b"l for the member"


def test_a_member_that_calls_itself_by_anothers_id(pair: Pair) -> None:
    member = pair.certified()
    settings = settings_of(member)
    settings["id"] = other = new_node_id()
    pair.say(settings, other, shown="impostor")
    assert other not in pair.victim.events.neighbours
    assert pair.still_talk()


def test_a_cloned_node_makes_no_link_and_reports_it(pair: Pair, tmp_path: Path) -> None:
    """A copied virtual machine: the same id, the same keys, while the first one runs."""
    shutil.copytree(pair.friend.config.directory, tmp_path / "clone", symlinks=True)
    config = dataclasses.replace(
        pair.friend.config, directory=str(tmp_path / "clone"), listen=[f"127.0.0.1:{free_port()}"]
    )
    clone = Node(config, pair.members)
    try:
        watch = Watch(config, clone.link, lambda: credentials.load(config).bound, lambda: False)

        def noticed() -> bool:
            watch.look()
            return bool(clone.link.problems())

        wait_until(noticed, PATIENCE, "the clone knows that it is one")
        assert [problem.kind for problem in clone.link.problems()] == ["cloned"]
        assert clone.link.neighbours() == []
        assert pair.still_talk()
    finally:
        clone.link.close()


def test_an_expired_certificate(pair: Pair) -> None:
    expired = pair.certified(lifetime=datetime.timedelta(seconds=-5))
    assert pair.say(settings_of(expired), expired.node) == []
    found = probe(expired, expired.connect[0])
    assert found.kind == "refused"
    assert "expired" in found.text
    assert pair.still_talk()


def test_a_link_ends_when_the_certificate_does(pair: Pair) -> None:
    """And a new certificate makes it come again, without a restart of anything."""
    short = pair.certified(lifetime=datetime.timedelta(seconds=10))
    member = Node(short, pair.members)
    try:
        wait_until(lambda: short.node in pair.victim.events.neighbours, PATIENCE, "the certificate is good")
        wait_until(lambda: short.node not in pair.victim.events.neighbours, PATIENCE, "the certificate has expired")
        assert pair.lab.authority is not None
        keys = Keys.load(short.path("identity"))
        credentials.install(
            short.directory, keys, pair.lab.authority.issue(keys.request(short.node, "lab", ["127.0.0.1"]))
        )
        member.link.renew()
        wait_until(lambda: short.node in pair.victim.events.neighbours, PATIENCE, "the new certificate is good")
    finally:
        member.link.close()


def test_a_revoked_member(pair: Pair) -> None:
    member = pair.certified()
    pair.victim.revoked.add(member.node)
    pair.victim_opens_again(pair.victim.link.members_changed)
    assert pair.say(settings_of(member), member.node, shown="revoked") == []
    assert pair.still_talk()


def test_an_address_that_is_not_in_the_certificate(pair: Pair) -> None:
    """Nobody passes for another by answering at its address: the certificate names where its node is."""
    member = pair.certified()
    (host, _, port) = pair.victim.config.listen[0].rpartition(":")
    assert host == "127.0.0.1"
    relay = dataclasses.replace(member, connect=[f"127.0.0.2:{free_port('127.0.0.2')}"])
    with socket.create_server(("127.0.0.2", int(relay.connect[0].rpartition(":")[2]))) as listening:
        forward = _Forward(listening, (host, int(port)))
        found = probe(relay, relay.connect[0])
        forward.close()
    assert found.kind == "untrusted"
    assert "mismatch" in found.text.lower() or "not valid for" in found.text


def test_a_message_that_is_too_large_is_not_taken(pair: Pair) -> None:
    pair.friend.link.send(pair.victim.config.node, b"g" + bytes(3 << 20))
    assert pair.victim.hears() == []
    assert pair.still_talk()


def test_links_end_when_nothing_arrives_at_the_other_end(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zenoh waits for TCP to give up before it closes one, and a link that comes meanwhile does not work."""
    found: list[tuple[int, int]] = []

    def seen(links: Collection[tuple[str, str]], milliseconds: int) -> int:
        count = give_up_after(links, milliseconds)
        found.append((count, milliseconds))
        return count

    monkeypatch.setattr("vmconv_fleet.links.zenoh_link.give_up_after", seen)
    with linked(lab):
        assert found == [(1, LEASE_MS)] * 2


def test_links_are_reopened_when_a_neighbour_does_not_listen(pair: Pair) -> None:
    """As when its session was closed and left the link behind: the next one of that node would never get a link."""
    member = pair.certified()
    before = pair.victim.link.counters["opened"]
    with zenoh.open(zenoh.Config.from_json5(json.dumps(settings_of(member)))):
        wait_until(lambda: pair.victim.link.counters["opened"] > before, PATIENCE, "it reopens its session")
    assert pair.still_talk()


class Stuck:
    """A session that does not close before it is let go."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.let_go = threading.Event()

    def close(self) -> None:
        self.let_go.wait()
        self._session.close()


def test_a_session_that_does_not_close_does_not_stop_the_others(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zenoh_link, "CLOSE_WITHIN", 0.2)
    link = pair.victim.link
    link._session = stuck = Stuck(link._session)  # type: ignore[assignment]
    link.renew()
    wait_until(lambda: "link" in [problem.kind for problem in link.problems()], PATIENCE, "its address is in use still")
    stuck.let_go.set()
    wait_until(lambda: link.counters["opened"] == 2, PATIENCE, "the next session is open")
    assert pair.still_talk()
    link.close()
    wait_until(lambda: not link.hangs, PATIENCE, "both are closed")


class _Forward:
    """Passes one connection on to another address."""

    def __init__(self, listening: socket.socket, target: tuple[str, int]) -> None:
        self._ends: list[socket.socket] = []

        def run() -> None:
            near, _ = listening.accept()
            far = socket.create_connection(target)
            self._ends += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=_pump, args=(source, sink), daemon=True).start()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._thread.join(5)
        for end in self._ends:
            end.close()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        return


# Whole nodes


@pytest.fixture
def three(lab: Lab, drive: Callable[..., Driven]) -> list[Driven]:
    """Three nodes, the middle one a neighbour of both others."""
    configs = [lab.add()]
    configs += [lab.add(connect=configs[0].listen), lab.add(connect=configs[0].listen)]
    nodes = [drive(config) for config in configs]
    wait_until(lambda: len(nodes[0].ask("state")["neighbours"]) == 2, PATIENCE, "neighbours")
    nodes[2].ask("write", count=3)
    wait_until(lambda: agree(configs), PATIENCE, "they agree")
    return nodes


def newest(node: Driven) -> Record:
    """Returns the last note that the node has written itself."""
    reader = Reader(open_reader(node.config.database))
    try:
        return max(reader.find("note", node.config.node), key=lambda record: record.position)
    finally:
        reader.close()


def forged(record: Record, **changes: Any) -> bytes:
    """Returns a live message with the record, changed after it was signed."""
    changed = record._replace(**changes)
    return encode(Live([seal(record.signature, payload(changed))]))


def test_a_forged_record_is_refused_and_reported(three: list[Driven]) -> None:
    """A member relays what it changed: the owner's signature tells."""
    victim, forger, owner = three
    record = newest(owner)
    before = view_of(victim.config)[owner.config.node]
    message = forged(record, body={"text": "forged"}, seq=before[1] + 1)
    forger.ask("forge", peer=victim.config.node, message=message.hex())
    wait_until(lambda: "forged" in victim.ask("state")["kinds"], PATIENCE, "the forgery is noticed")
    owner.ask("write", count=1)
    wait_until(lambda: agree([node.config for node in three]), PATIENCE, "they agree on what the owner wrote")
    reader = Reader(open_reader(victim.config.database))
    assert "forged" not in [record.body["text"] for record in reader.find("note")]
    reader.close()


def test_a_record_in_anothers_name_is_refused(three: list[Driven]) -> None:
    """A member signs with its own key what is to be another's."""
    victim, forger, owner = three
    at = view_of(victim.config)[owner.config.node]
    record = newest(owner)._replace(body={"text": "forged"}, seq=at[1] + 1)
    signer = Ed25519Signer(owner.config.node, credentials.load(forger.config).keys.signing)
    for key_id in (signer.key_id, record.key_id):
        text = payload(record._replace(key_id=key_id))
        message = encode(Live([seal(signer.sign(text), text)]))
        forger.ask("forge", peer=victim.config.node, message=message.hex())
    wait_until(lambda: "forged" in victim.ask("state")["kinds"], PATIENCE, "the forgery is noticed")
    owner.ask("write", count=1)
    wait_until(lambda: agree([node.config for node in three]), PATIENCE, "they agree on what the owner wrote")


def test_a_replayed_record_changes_nothing(three: list[Driven]) -> None:
    victim, forger, owner = three
    old = newest(owner)
    owner.ask("write", count=5)
    wait_until(lambda: agree([node.config for node in three]), PATIENCE, "they agree")
    for _ in range(3):
        forger.ask("forge", peer=victim.config.node, message=encode(Live([old.wire])).hex())
    owner.ask("write", count=1)
    wait_until(lambda: agree([node.config for node in three]), PATIENCE, "they agree")
    assert victim.ask("state")["kinds"] == []


def test_rotation_needs_no_restart(lab: Lab, three: list[Driven]) -> None:
    """The node and its neighbours use new keys and a new certificate."""
    hub, node, _ = three
    before = credentials.load(node.config)
    keys = Keys.generate()
    assert lab.authority is not None
    request = keys.request(node.config.node, "lab", node.config.addresses)
    credentials.install(node.config.directory, keys, lab.authority.issue(request))
    opened = node.ask("state")["counters"]["opened"]
    node.signal(signal.SIGHUP)
    wait_until(lambda: "certificate renewed" in node.log(), PATIENCE, "the new key is used")
    wait_until(lambda: node.ask("state")["counters"]["opened"] > opened, PATIENCE, "the link was reopened")
    wait_until(lambda: node.ask("state")["neighbours"] == [hub.config.node], PATIENCE, "neighbours again")
    node.ask("write", count=2)
    assert newest(node).key_id == credentials.load(node.config).bound.key_id != before.bound.key_id
    wait_until(lambda: agree([one.config for one in three]), PATIENCE, "all take what the new key signs")
    assert [one.ask("state")["kinds"] for one in three] == [[], [], []]


def test_a_revoked_node_is_left_alone_by_all(lab: Lab, three: list[Driven]) -> None:
    """No node restarts for it; its earlier records stay, and it learns why it is alone."""
    hub, revoked, other = three
    gone = revoked.config.node
    answer = hub.ask("request", target=hub.config.node, verb="revoke", arguments={"node": gone})
    assert answer["ok"], answer
    wait_until(
        lambda: hub.ask("state")["neighbours"] == [other.config.node], PATIENCE, "it has no link with the revoked one"
    )
    revoked.ask("write", count=1)
    other.ask("write", count=1)
    known = [other.config.node, hub.config.node, gone]
    wait_until(
        lambda: [view_of(hub.config).get(one) for one in known] == [view_of(other.config).get(one) for one in known],
        PATIENCE,
        "the others agree",
    )
    assert view_of(hub.config)[gone][:2] < view_of(revoked.config)[gone][:2]
