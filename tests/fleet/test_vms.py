"""Virtual machines in lists: chosen and ordered by the index as selections mean, and converted together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.in_memory import Node, nodes
from fleet.selecting import Facts, selects
from fleet.serving import Served, served
from fleet.written import NODES, Written
from vmconv.errors import AccessError, UsageError, VmconvError
from vmconv_fleet.catalogue.selection import VMS, Match, Number, Selection, parse
from vmconv_fleet.replication.records import Change

MACHINES = {"machines": {"libvirt": {"writes": True, "disks": "qcow2"}}, "formats": {"qcow2": {"writes": True}}}


def vm(name: str, **more: Any) -> dict[str, Any]:
    return {"datastore": "ds", "file": f"{name}.vmx", "name": name, **more}


numbers = st.sampled_from([0, 1, 2, 1 << 40])
bodies = st.fixed_dictionaries(
    {"datastore": st.sampled_from(["ds", "Prod"]), "file": st.just("x.vmx"), "name": st.text("aBß*", max_size=3)},
    optional={
        "system": st.sampled_from(["Debian 12", "windows"]),
        "firmware": st.sampled_from(["bios", "uefi"]),
        "memory": numbers,
        "processors": numbers,
        "disks": st.lists(st.just({"name": "x"}), max_size=2),
        "problem": st.sampled_from(["unreadable", ""]),
    },
)
texts = st.sampled_from(["name", "datastore", "system", "firmware", "node"])
selections: st.SearchStrategy[Selection] = st.one_of(
    st.builds(Match, texts, st.sampled_from(["=", "!="]), st.sampled_from(["a*", "debian 12", "*", "prod", "[a]", ""])),
    st.builds(
        Number, st.sampled_from(["memory", "processors", "disks"]), st.sampled_from(["=", "<", ">=", "!="]), numbers
    ),
)


def facts(owner: str, body: Mapping[str, Any]) -> Facts:
    return {
        "node": (owner[:8], owner),
        **{name: body.get(name, "") for name in ("datastore", "name", "system", "firmware")},
        **{name: body.get(name, 0) for name in ("memory", "processors")},
        "disks": len(body.get("disks", ())),
    }


@given(st.lists(bodies, min_size=1, max_size=5), st.lists(selections, min_size=1, max_size=4))
def test_sql_chooses_what_the_selection_means(made: list[dict[str, Any]], chosen: list[Selection]) -> None:
    base, known = Written(), dict[tuple[str, str], Facts]()
    for number, body in enumerate(made):
        owner = NODES[number % 2]
        base.write(owner, ("vm", f"v{number}", body))
        known[owner, f"v{number}"] = facts(owner, body)
    for selection in chosen:
        page = base.snapshot().vms(selection, limit=100)
        assert {(one.owner, one.id) for one in page.records} == {
            key for key, one in known.items() if selects(selection, one)
        }


@pytest.mark.parametrize("sort", ["name", "-name", "system", "memory", "-memory", "processors", "disks", "-disks"])
def test_pages_of_each_order_have_every_machine_once(sort: str) -> None:
    base = Written()
    for number in range(7):
        base.write(
            NODES[number % 2], ("vm", f"v{number}", vm(f"m{number % 3}", memory=number % 2, system="x" * number))
        )
    found, after = [], None
    while True:
        page = base.snapshot().vms(sort=sort, after=after, limit=2)
        found += [one.body.get(sort.removeprefix("-"), []) for one in page.records]
        after = page.next
        if after is None:
            break
    assert len(found) == page.total == 7
    if sort.removeprefix("-") != "disks":
        assert found == sorted(found, reverse=sort.startswith("-"))


def test_each_word_of_a_search_is_in_some_text() -> None:
    base = Written()
    base.write(NODES[0], ("vm", "v1", vm("Web", system="Debian")), ("vm", "v2", vm("web%", system="Windows")))
    snapshot = base.snapshot()

    def found(words: str) -> list[str]:
        return [one.id for one in snapshot.vms(search=words, limit=9).records]

    assert found("WEB debian") == ["v1"]
    assert found("web") == ["v1", "v2"]
    assert found("%") == ["v2"]
    assert found("' OR 1 --\0") == []
    assert found("debian windows") == []


def test_a_field_of_disks_is_none_of_machines() -> None:
    with pytest.raises(UsageError, match="where a field was expected"):
        parse("depth=1", VMS)


# Conversions of many


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Served, Sequence[Node]]]:
    with nodes(2, tmp_path) as made, served(made[0]) as api:
        here, other = made
        changes = [Change("vm", f"v{number}", vm(f"web-{number}")) for number in (1, 2)]
        changes.append(Change("vm", "broken", vm("broken", problem="no brand")))
        other.write(
            Change("datastore", "ds", {"path": "/srv/a"}), Change("capabilities", "installed", MACHINES), *changes
        )
        here.body_when(other.id, "vm", "broken", lambda _one: True)
        yield api, made


def post(api: Served, wait: int = 30, **wish: Any) -> list[dict[str, Any]]:
    body = {"format": "libvirt", **wish}
    answers: list[dict[str, Any]] = api.local.call(
        "POST", "/api/v1/machine-conversions", body, query={"wait": wait}
    ).content
    return answers


def test_all_selected_machines_are_requested_and_each_is_answered(pair: tuple[Served, Sequence[Node]]) -> None:
    api, _ = pair
    answers = post(api, select="node=n02", strict=True, keep=["tpm"])
    assert [(one["name"], one["answer"]["ok"]) for one in answers] == [
        ("broken", False),
        ("web-1", True),
        ("web-2", True),
    ]
    assert "cannot be read: no brand" in answers[0]["answer"]["reason"]
    jobs = [one["body"] for one in api.local.everything("/api/v1/jobs")]
    assert {(one["vm"], one["strict"], tuple(one["keep"])) for one in jobs} == {
        ("v1", True, ("tpm",)),
        ("v2", True, ("tpm",)),
    }
    assert len({one["batch"] for one in jobs}) == 1


def test_machines_are_chosen_one_by_one(pair: tuple[Served, Sequence[Node]]) -> None:
    api, (_, other) = pair
    item = {"owner": other.id, "id": "v2"}
    assert [one["vm"] for one in post(api, items=[item, item])] == ["v2"]
    with pytest.raises(VmconvError, match="vm v9 of"):
        post(api, items=[item, {"owner": other.id, "id": "v9"}])
    wishes: list[dict[str, Any]] = [{}, {"select": "", "items": [item]}, {"items": []}]
    for wish in wishes:
        with pytest.raises(UsageError):
            post(api, **wish)
    assert len(api.local.everything("/api/v1/jobs")) == 1


def test_viewers_convert_no_machines(pair: tuple[Served, Sequence[Node]]) -> None:
    api, (_, other) = pair
    body = {"format": "libvirt", "items": [{"owner": other.id, "id": "v1"}]}
    with api.client("viewer") as client, pytest.raises(AccessError, match="needs the role operator"):
        client.call("POST", "/api/v1/machine-conversions", body)


def test_of_several_machines_only_those_in_ones_datastores_are_converted(pair: tuple[Served, Sequence[Node]]) -> None:
    api, (here, other) = pair
    other.write(
        Change("datastore", "more", {"path": "/srv/b"}), Change("vm", "v3", vm("web-3") | {"datastore": "more"})
    )
    here.body_when(other.id, "vm", "v3", lambda _one: True)
    body = {"format": "libvirt", "items": [{"owner": other.id, "id": one} for one in ("v1", "v3")]}
    with api.client("operator", datastores=["n02:more"]) as client:
        answers = client.call("POST", "/api/v1/machine-conversions", body, query={"wait": 30}).content
    assert [one["answer"]["ok"] for one in answers] == [False, True]
    assert "needs the role operator" in answers[0]["answer"]["reason"]
