"""People sign in at the console of a node: sessions, roles of groups, and what other sites and browsers cannot do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from fastapi import Request

from fleet.in_memory import Node, nodes
from fleet.openid import Browser, OpenIdProvider
from fleet.serving import Served, served
from vmconv_fleet.api import sessions
from vmconv_fleet.config import ConfigError
from vmconv_fleet.console import signin
from vmconv_fleet.errors import NotReadyError
from vmconv_fleet.node.activation import sign_in_of
from vmconv_fleet.oidc import people, places
from vmconv_fleet.oidc.places import Places
from vmconv_fleet.oidc.provider import SignedIn
from vmconv_fleet.oidc.settings import OidcSettings
from vmconv_fleet.replication.clock import wall_ms
from vmconv_fleet.replication.records import Change
from vmconv_fleet.testing import Lab
from vmconv_fleet.trust import tokens
from vmconv_fleet.trust.groups import group_id

START = "/login/oidc"


class House(NamedTuple):
    """Two nodes, a provider where the first lets people sign in, and a browser."""

    here: Node
    other: Node
    api: Served
    openid: OpenIdProvider
    browser: Browser

    def go(self, path: str, **headers: str) -> Any:
        return self.browser.go(self.api.url + path, None, **headers)

    def enter(self, path: str = START) -> Any:
        """Signs in; returns the page after the provider's."""
        return self.browser.follow(self.api.url + path)

    def group(self, name: str, role: str, **more: Any) -> None:
        self.api.local.call("POST", "/api/v1/groups", {"group": name, "role": role, **more})

    def sessions(self, node: Node) -> list[Any]:
        return [one for one in node.service.view().find("token") if one.body.get("person")]

    def form_key(self) -> str:
        text = self.go("/").text
        return str(text.partition('name="form_key" value="')[2].partition('"')[0])

    def scan(self, datastore: str) -> str:
        """Asks the other node for a scan in the console; returns what the page says."""
        form = {"form_key": self.form_key()}
        headers = {"Origin": self.api.url}
        page = self.browser.go(f"{self.api.url}/datastores/{self.other.id}/{datastore}/scan", form, **headers)
        return parse_qs(urlsplit(page.location).query).get("said", [page.location])[0]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with nodes(2, tmp_path) as (here, other), OpenIdProvider(tmp_path / "provider").running() as openid:
        openid.now = lambda: wall_ms() / 1000
        other.write(*(Change("datastore", name, {"path": f"/srv/{name}"}) for name in ("x", "y")))
        here.body_when(other.id, "datastore", "y", lambda _record: True)
        with served(here, sign_in=openid.settings) as api:
            yield House(here, other, api, openid, Browser(api.ca, openid.ca))


@pytest.fixture
def entered(house: House) -> House:
    house.group("ops", "operator")
    page = house.enter()
    assert page.status == 200, page.text
    return house


def test_a_person_signs_in_and_acts_by_name(entered: House, caplog: pytest.LogCaptureFixture) -> None:
    name = f"Anna Example [248289 at {urlsplit(entered.openid.issuer).netloc}]"
    with caplog.at_level(logging.INFO, "vmconv_fleet.audit"):
        assert entered.scan("x").startswith("Done")
    (request,) = [one for one in caplog.records if one.message == "request"]
    (transaction,) = entered.other.service.view().find("transaction", entered.other.id)
    for by in (transaction.body["by"], vars(request)["fields"]["by"]):
        assert (by["user"], by["issuer"], by["subject"]) == (name, entered.openid.issuer, "248289")
    assert name in entered.go("/").text
    assert name in entered.go("/history").text
    assert "operator" in entered.go("/tokens").text


def test_the_sign_in_is_logged(house: House, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vmconv_fleet.audit"):
        house.enter()
        house.group("ops", "viewer")
        house.enter()
    assert [one.message for one in caplog.records if "login" in one.message] == ["login refused", "login"]
    assert "none of your groups has a role" in vars(caplog.records[0])["fields"]["why"]


def test_cookies_are_for_this_host_and_its_pages_alone(entered: House) -> None:
    by_name = {one.partition("=")[0]: one for one in entered.browser.set if "Max-Age=0" not in one}
    assert by_name.keys() == {"__Host-vmconv-signin", "__Host-vmconv"}
    assert {"Max-Age=600", "SameSite=lax"} <= set(by_name["__Host-vmconv-signin"].split("; "))
    assert {"Max-Age=3600", "SameSite=strict"} <= set(by_name["__Host-vmconv"].split("; "))
    for one in entered.browser.set:
        assert {"HttpOnly", "Secure", "Path=/"} <= {part.strip() for part in one.split(";")}
    assert set(entered.browser.cookies[urlsplit(entered.api.url).netloc]) == {"__Host-vmconv"}


def test_the_page_after_the_sign_in_is_the_one_that_was_asked_for(house: House) -> None:
    house.group("ops", "viewer")
    page = house.go("/disks?select=format%3Draw")
    assert page.location == "/login?next=/disks%3Fselect%3Dformat%253Draw"
    door = house.go(page.location)
    start = door.text.partition('<a class="button" href="')[2].partition('"')[0]
    assert start == "/login/oidc?next=/disks%3Fselect%3Dformat%253Draw"
    assert 'content="0;url=/disks?select=format%3Draw"' in house.enter(start).text


@pytest.mark.parametrize("next_", ["//evil.example", "/\\evil.example", "https://evil.example", "javascript:alert(1)"])
def test_no_page_elsewhere_comes_after_the_sign_in(house: House, next_: str) -> None:
    house.group("ops", "viewer")
    door = house.go(f"/login?next={quote(next_)}").text
    assert "evil" not in door
    assert 'content="0;url=/"' in house.enter(f"{START}?next={quote(next_)}").text
    form = {"token": house.api.token("viewer")["token"], "next": next_}
    assert house.browser.go(f"{house.api.url}/login", form).location == "/"
    form["next"] = "/jobs"
    assert house.browser.go(f"{house.api.url}/login", form).location == "/jobs"


def test_another_address_of_the_console_leads_to_the_one_that_the_provider_knows(house: House) -> None:
    page = house.go(f"{START}?next=/jobs", Host="evil.example")
    assert page.location == f"{house.api.url}/login/oidc?next=/jobs"
    assert not house.browser.set


@pytest.mark.parametrize(
    ("more", "said"),
    [({"client": ""}, "node.toml: oidc: setting 'client' is missing"), ({"typo": 1}, "oidc: unknown setting 'typo'")],
)
def test_a_node_does_not_start_with_settings_that_are_not_valid(lab: Lab, more: dict[str, Any], said: str) -> None:
    good = {"issuer": "https://id.example", "client": "vmconv", "url": "https://n01.example:7449"}
    assert sign_in_of(replace(lab.add(), oidc=good)) == OidcSettings(**good)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=said):
        sign_in_of(replace(lab.add(), oidc=good | more))


def test_a_node_without_the_library_says_what_to_install(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert sign_in_of(lab.add()) is None
    with pytest.raises(ConfigError, match="authlib is not installed"):
        sign_in_of(replace(lab.add(), oidc={"issuer": "x"}))


def test_the_sessions_of_a_person_in_browsers_are_limited(entered: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_OF_ONE", 1)
    cookies = entered.browser.cookies[urlsplit(entered.api.url).netloc]
    first = dict(cookies)
    cookies.clear()
    assert entered.enter().status == 200
    assert entered.go("/jobs").status == 200
    cookies.update(first)
    assert entered.go("/jobs").status == 303


# What other browsers and sites cannot do


def answer_for(house: House, browser: Browser) -> str:
    """Returns the address to which the provider sends a browser that began to sign in."""
    address = browser.go(house.api.url + START).location
    return str(browser.go(address).location)


def test_nobody_is_signed_in_by_a_link_of_another(house: House) -> None:
    """Login CSRF: the attacker's answer, opened in the victim's browser, before and while the victim signs in."""
    house.group("ops", "admin")
    attacker = Browser(house.api.ca, house.openid.ca)
    link = answer_for(house, attacker)
    page = house.browser.go(link)
    assert (page.status, "this browser has begun no sign-in here" in page.text) == (403, True)
    house.go(START)
    page = house.browser.go(link)
    assert (page.status, "belongs to another sign-in" in page.text) == (403, True)
    assert not house.sessions(house.here)
    assert not house.openid.count("/token")


def test_an_answer_is_good_once(house: House) -> None:
    house.group("ops", "admin")
    link = answer_for(house, house.browser)
    cookies = dict(house.browser.cookies[urlsplit(house.api.url).netloc])
    assert house.browser.go(link).status == 200
    assert "has begun no sign-in" in house.browser.go(link).text
    house.browser.cookies[urlsplit(house.api.url).netloc] = cookies
    page = house.browser.go(link)
    assert "refuses the code: &lt;b&gt;no such code&lt;/b&gt;" in page.text
    assert len(house.sessions(house.here)) == 1


@pytest.mark.parametrize("query", ["", "?state=", "?code=x", "?code=x&state=y", "?error=x", "?" + "x" * 9000])
def test_an_answer_that_is_none_is_refused(house: House, query: str) -> None:
    assert house.go("/login/callback" + query).status == 403
    house.go(START)
    assert house.go("/login/callback" + query).status == 403
    assert not house.openid.count("/token")


def test_a_lie_of_the_provider_enters_nobody(house: House) -> None:
    house.group("ops", "admin")
    house.openid.claims["aud"] = "another"
    page = house.enter()
    assert (page.status, "not for this sign-in" in page.text) == (403, True)
    assert not house.sessions(house.here)
    assert house.go("/").status == 303


def test_a_provider_that_is_away_is_told(house: House) -> None:
    house.openid.answers["/.well-known/openid-configuration"] = lambda: (503, {}, b"")
    page = house.go(START)
    assert (page.status, "answers with status 503" in page.text) == (403, True)


V4 = ["192.0.2.1", "192.0.2.2", "::ffff:192.0.2.3", "192.0.2.4"]
V6 = ["2001:db8:0:1::1", "2001:db8:0:2::1", "2001:db8:0:3::1", "2001:db8:0:4::1"]


def at(host: str) -> bytes:
    """Returns the address of a request."""
    return signin._address_of(Request({"type": "http", "client": (host, 1)}))


class Crowd:
    """Sign-ins at a time; each stays until it is told to leave."""

    def __init__(self) -> None:
        self.places = Places()
        self.entered: list[str] = []
        self.refused: list[str] = []
        self._gates: dict[str, asyncio.Event] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def come(self, *names: str) -> None:
        """Lets sign-ins come, each named HOST or HOST#NUMBER."""
        for name in names:
            self._gates[name] = asyncio.Event()
            self._tasks.append(asyncio.create_task(self._sign_in(name)))
            await asyncio.sleep(0)

    async def _sign_in(self, name: str) -> None:
        try:
            async with self.places.taken(at(name.partition("#")[0])):
                self.entered.append(name)
                await self._gates[name].wait()
        except NotReadyError:
            self.refused.append(name)

    async def leave(self, name: str) -> None:
        self._gates[name].set()
        for _ in range(4):
            await asyncio.sleep(0)

    async def cancel(self, number: int) -> None:
        self._tasks[number].cancel()
        for _ in range(4):
            await asyncio.sleep(0)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        assert (self.places._asking, self.places._waiting) == ([], [])


def floods(networks: int, each: int = places.OF_NETWORK) -> list[str]:
    return [f"10.0.{network}.{host}" for network in range(networks) for host in range(each)]


def test_strangers_do_not_take_all_threads(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "PATIENCE_S", 0.05)
    found = house.api.app.state.sign_in.places
    found._asking += [at(host) for host in floods(places.AT_ONCE, 1)]
    page = house.go(START)
    assert (page.status, "too many people sign in" in page.text) == (503, True)
    del found._asking[0]
    assert house.go(START).status == 303


@pytest.mark.parametrize("hosts", [V4, V6, [V4[0], f"{V4[0]}#2", f"{V4[0]}#3"]], ids=["v4", "v6", "one address"])
def test_one_network_does_not_take_all_places_of_the_sign_in(hosts: list[str]) -> None:
    async def act() -> None:
        async with Crowd() as crowd:
            await crowd.come(*hosts, "192.0.3.1", "2001:db8:1::1")
            assert crowd.refused == hosts[-1:]
            await crowd.leave(hosts[0])
            await crowd.come(f"{hosts[0].partition('#')[0]}#again")
            assert len(crowd.refused) == 1

    asyncio.run(act())


def test_a_person_gets_the_next_place_however_many_of_six_networks_wait() -> None:
    async def act() -> None:
        async with Crowd() as crowd:
            hosts = floods(6)
            await crowd.come(*hosts, "192.0.2.1")
            assert (len(crowd.entered), crowd.refused) == (places.AT_ONCE, [])
            await crowd.leave(hosts[0])
            assert crowd.entered[-1] == "192.0.2.1"
            await crowd.come(f"{hosts[0]}#2", "192.0.2.2", "192.0.3.1")
            await crowd.leave(hosts[1])
            assert crowd.entered[-1] == "192.0.3.1"
            await crowd.leave(hosts[2])
            # Its first network has no other place left; that of 192.0.2.2 has one.
            assert crowd.entered[-1] == f"{hosts[0]}#2"

    asyncio.run(act())


def test_of_many_that_wait_one_of_the_largest_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "WAITING", 4)

    async def act() -> None:
        async with Crowd() as crowd:
            full = floods(places.AT_ONCE, 1)
            await crowd.come(*full, "192.0.2.1", "192.0.3.1", "192.0.3.2", "192.0.4.1", "192.0.5.1")
            await asyncio.sleep(0.01)
            assert crowd.refused in (["192.0.3.1"], ["192.0.3.2"])
            await crowd.come("192.0.6.1")
            await asyncio.sleep(0.01)
            assert len(crowd.refused) == 2
            assert len(crowd.places._waiting) == 4

    asyncio.run(act())


def test_who_waits_too_long_is_refused_and_leaves_no_place_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "PATIENCE_S", 0.02)

    async def act() -> None:
        async with Crowd() as crowd:
            full = floods(places.AT_ONCE, 1)
            await crowd.come(*full, "192.0.2.1", "192.0.3.1")
            while len(crowd.refused) < 2:
                await asyncio.sleep(0.01)
            await crowd.come("192.0.2.1#2", "192.0.3.1#2")
            await crowd.cancel(len(full) + 2)
            await crowd.leave(full[0])
            assert crowd.entered[-1] == "192.0.3.1#2"

    asyncio.run(act())


def test_a_place_that_is_given_to_a_request_that_ends_goes_to_the_next() -> None:
    async def act() -> None:
        async with Crowd() as crowd:
            full = floods(places.AT_ONCE, 1)
            await crowd.come(*full, "192.0.2.1", "192.0.3.1")
            crowd.places._leave(at(full[0]))
            crowd.places._asking.append(at(full[0]))
            await crowd.cancel(len(full))
            await crowd.leave(full[1])
            assert crowd.entered[-1] == "192.0.3.1"

    asyncio.run(act())


def test_a_new_session_replaces_the_browsers_old_one(entered: House) -> None:
    old = dict(entered.browser.cookies[urlsplit(entered.api.url).netloc])
    entered.enter()
    assert entered.go("/").status == 200
    entered.browser.cookies[urlsplit(entered.api.url).netloc] = old
    assert entered.go("/").location == "/login"


# Roles


def test_without_a_role_nobody_enters(house: House) -> None:
    page = house.enter()
    assert page.status == 403
    assert "Anna Example [248289 at" in page.text
    assert "vmconv fleet group set GROUP --role ROLE" in page.text
    house.openid.claims["groups"] = []
    assert house.enter().status == 403
    assert not house.sessions(house.here)


def test_a_group_operates_some_datastores_alone(house: House) -> None:
    house.group("ops", "operator", datastores=["n02:x"])
    house.enter()
    assert house.scan("x").startswith("Done")
    assert "scan in y needs the role operator" in house.scan("y")
    assert "operator of n02:x" in house.go("/").text


def test_a_session_follows_the_roles_of_its_groups(entered: House) -> None:
    assert entered.scan("x").startswith("Done")
    entered.group("ops", "viewer")
    assert "needs the role operator" in entered.scan("x")
    entered.api.local.call("DELETE", f"/api/v1/groups/{entered.here.id}/{group_id('ops')}")
    assert entered.go("/").location == "/login"
    entered.group("ops", "operator")
    assert entered.scan("x").startswith("Done")


def test_a_group_that_gets_a_role_later_counts_from_the_next_sign_in(entered: House) -> None:
    entered.group("staff", "admin")
    assert "New token" not in entered.go("/tokens").text
    entered.enter()
    assert "New token" in entered.go("/tokens").text
    assert "of ops, staff" in entered.go("/tokens").text


# The end of a session


def test_leaving_ends_the_session_on_all_nodes(entered: House) -> None:
    (session,) = entered.sessions(entered.here)
    entered.other.body_when(entered.here.id, "token", session.id, lambda _record: True)
    cookies = dict(entered.browser.cookies[urlsplit(entered.api.url).netloc])
    form = {"form_key": entered.form_key()}
    assert entered.browser.go(f"{entered.api.url}/logout", form, Origin=entered.api.url).location == "/login"
    entered.browser.cookies[urlsplit(entered.api.url).netloc] = cookies
    assert entered.go("/").location == "/login"
    entered.other.until(lambda: not entered.sessions(entered.other))


def test_a_token_stays_when_its_browser_leaves(house: House) -> None:
    token = house.api.token("viewer")["token"]
    house.browser.go(f"{house.api.url}/login", {"token": token})
    house.browser.go(f"{house.api.url}/logout", {"form_key": house.form_key()}, Origin=house.api.url)
    assert house.go("/").location == "/login"
    assert house.browser.go(f"{house.api.url}/login", {"token": token}).location == "/"


def test_a_session_has_an_end(entered: House, monkeypatch: pytest.MonkeyPatch) -> None:
    (session,) = entered.sessions(entered.here)
    assert session.body["expires_ms"] - session.body["created_ms"] == 60 * 60_000
    monkeypatch.setattr(entered.api.app.state.fleet, "now_ms", lambda: session.body["expires_ms"])
    assert entered.go("/").location == "/login"


def test_an_administrator_ends_a_session(entered: House) -> None:
    (session,) = entered.sessions(entered.here)
    entered.api.local.call("DELETE", f"/api/v1/tokens/{entered.here.id}/{session.id}")
    assert entered.go("/").location == "/login"


def person(
    subject: str = "1", name: str = "Anna", issuer: str = "https://id.example", groups: Any = ("ops",)
) -> SignedIn:
    return SignedIn(issuer, subject, name, groups)


def test_sessions_are_limited_and_ended_ones_removed(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.group("ops", "viewer")
    monkeypatch.setattr(people, "MAX_OF_ONE", 2)
    monkeypatch.setattr(people, "MAX_SESSIONS", 3)
    kept = tokens.make(house.here.id)
    house.here.write(Change("token", kept.id, {"label": "x", "role": "viewer", "hash": kept.hash, "expires_ms": 1}))

    def enter(subject: str, now_ms: int) -> str:
        text = people.enter(house.here.service, person(subject), now_ms=now_ms, minutes=10)
        return str(tokens.reference(text)[1])  # type: ignore[index]

    def ids() -> set[str]:
        return {one.id for one in house.sessions(house.here)}

    first, second, third = (enter("1", at) for at in (1, 2, 3))
    assert ids() == {second, third}
    other = enter("2", 4)
    assert ids() == {second, third, other}
    last = enter("3", 5)
    assert ids() == {third, other, last}
    late = enter("4", 3 + 600_000)
    assert ids() == {other, last, late}
    assert house.here.service.view().get(house.here.id, "token", kept.id)
    assert first != second


@pytest.mark.parametrize(
    ("name", "issuer", "label"),
    [
        ("Anna", "https://id.example/realms/dc/", "Anna [1 at id.example/realms/dc]"),
        ("root [0 at id.example]", "https://x.example", "root (0 at id.example) [1 at x.example]"),
        ("\u202eanna\nx", "https://x.example", "\\u202eanna\\nx [1 at x.example]"),
        ("\ud800", "https://x.example", "\\ud800 [1 at x.example]"),
        ("--help", "https://x.example", "help [1 at x.example]"),
        (" . ", "https://x.example", "somebody [1 at x.example]"),
        ("x" * 300, "https://x.example", "x" * 60 + " [1 at x.example]"),
    ],
    ids=["plain", "brackets", "directions", "surrogate", "option", "dots", "long"],
)
def test_names_of_people_are_shown_as_text(name: str, issuer: str, label: str) -> None:
    assert people.label_of(person(name=name, issuer=issuer)) == label


def test_two_people_of_one_name_are_told_apart() -> None:
    assert people.label_of(person("1")) != people.label_of(person("2"))
    longest = people.label_of(person("\\" * 255, "\u202e" * 300, "https://" + "x" * 300))
    assert len(longest) <= 255


def test_a_name_is_no_markup(house: House) -> None:
    house.group("ops", "admin")
    house.openid.claims["name"] = "<script>alert(1)</script>"
    house.enter()
    assert house.scan("x").startswith("Done")
    for path in ("/", "/tokens", "/history", "/requests"):
        assert "<script>alert" not in house.go(path).text
        assert "&lt;script&gt;" in house.go(path).text
