"""The indexes of the database: equal to the records after any writes, and to what selections mean."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.selecting import Facts, selects
from fleet.written import NODES, Written
from vmconv.errors import UsageError
from vmconv_fleet.catalogue.indexes import INDEXES
from vmconv_fleet.catalogue.selection import Every, Flag, Match, Not, Number, Selection, Some, parse
from vmconv_fleet.errors import StoreError
from vmconv_fleet.replication.database import VERSION
from vmconv_fleet.replication.indexing import REQUESTS, InvalidColumnError
from vmconv_fleet.replication.store import Store


def disk(name: str, **more: Any) -> dict[str, Any]:
    return {"datastore": "ds", "name": name, **more}


# Selections: SQL against the oracle

# Few letters, so that patterns fit; among them those that shells, GLOB and case-folding treat in their own ways.
letters = st.text("aAbß1İ.]^!-\\%_ é\U0001f600", max_size=6)
patterns = st.text("aAbß1*?[]^!-\\%_ é\U0001f600", max_size=8).map(str.casefold)
numbers = st.sampled_from([0, 1, 2, 1 << 40, (1 << 63) - 1])
bodies = st.fixed_dictionaries(
    {"datastore": st.sampled_from(["ds", "Prod"]), "name": letters.filter(bool)},
    optional={
        "format": st.sampled_from(["raw", "qcow2", ""]),
        "identity": letters,
        "virtual_size": numbers,
        "actual_size": numbers,
        "chain": st.lists(st.just({"name": "x"}), max_size=2),
        "in_use": st.booleans(),
        "problem": st.sampled_from(["unreadable", ""]),
    },
)
signs = st.sampled_from(["=", "!="])
terms: st.SearchStrategy[Selection] = st.one_of(
    st.builds(Match, st.sampled_from(["datastore", "format", "id", "identity", "name", "node"]), signs, patterns),
    st.builds(
        Number,
        st.sampled_from(["size", "actual-size", "depth"]),
        st.sampled_from(["=", "!=", "<", "<=", ">", ">="]),
        st.one_of(numbers, st.just(1 << 63), st.just(1 << 200)),
    ),
    st.builds(Flag, st.sampled_from(["in-use", "problem"]), st.booleans()),
)
selections = st.recursive(
    terms,
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.builds(Some, st.lists(inner, min_size=2, max_size=3).map(tuple)),
        st.builds(Every, st.lists(inner, min_size=2, max_size=3).map(tuple)),
    ),
    max_leaves=6,
)


def facts(owner: str, name: str, id: str, body: Mapping[str, Any]) -> Facts:
    return {
        "id": id,
        "node": (name, owner),
        "datastore": body["datastore"],
        "name": body["name"],
        "format": body.get("format", ""),
        "identity": body.get("identity", ""),
        "size": body.get("virtual_size", 0),
        "actual-size": body.get("actual_size", 0),
        "depth": len(body.get("chain", ())),
        "in-use": bool(body.get("in_use")),
        "problem": bool(body.get("problem")),
    }


@given(st.lists(bodies, min_size=1, max_size=6), st.lists(selections, min_size=1, max_size=5))
def test_sql_chooses_what_the_selection_means(made: list[dict[str, Any]], chosen: list[Selection]) -> None:
    base = Written()
    known = {}
    for number, body in enumerate(made):
        owner, id = NODES[number % 2], f"D{number}a"
        base.write(owner, ("disk", id, body))
        known[owner, id] = facts(owner, owner[:8], id, body)
    for selection in chosen:
        page = base.snapshot().disks(selection, limit=100)
        found = {(one.owner, one.id) for one in page.records}
        assert found == {key for key, one in known.items() if selects(selection, one)}
        assert page.total == len(found)


@pytest.mark.parametrize("pattern", ["*a" * 100 + "b", "*a*" * 30 + "[b]"])
def test_no_pattern_takes_long(pattern: str) -> None:
    base = Written()
    base.write(NODES[0], ("disk", "d", disk("a" * 4000)))
    steps = 0

    def step() -> bool:
        nonlocal steps
        steps += 1
        return steps > 1000

    base.connection.set_progress_handler(step, 1000)
    assert base.snapshot().disks(parse(f"name='{pattern}'"), limit=10).records == []


@pytest.mark.parametrize("sort", ["name", "-name", "size", "-size", "actual-size", "-actual-size", "format"])
def test_no_order_of_disks_is_sorted_at_each_page(sort: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Written()
    base.write(NODES[0], ("disk", "d1", disk("a")), ("disk", "d2", disk("b")))
    plans = []
    rows = Store._rows

    def explained(self: Store, query: str, *arguments: Any) -> list[Any]:
        plans.append(str(base.connection.execute(f"EXPLAIN QUERY PLAN {query}", arguments).fetchall()))
        return rows(self, query, *arguments)

    monkeypatch.setattr(Store, "_rows", explained)
    first = base.snapshot().disks(sort=sort, limit=1)
    base.snapshot().disks(sort=sort, after=first.next, limit=1)
    pages = [plan for plan in plans if "'SCAN i'" in plan]
    assert len(pages) == 2
    # The rows of one page are sorted again after they were joined.
    assert all("COVERING INDEX index_disk_" in plan and plan.count("TEMP B-TREE") <= 1 for plan in pages), pages


def test_a_value_that_no_disk_has_is_refused() -> None:
    for value in ("a\0b", "\ud800"):
        with pytest.raises(UsageError, match="nothing can have this value"):
            parse(f"name='{value}'")


# Pages


@given(st.data())
def test_pages_lose_and_repeat_nothing_that_stays(data: st.DataObject) -> None:
    base = Written()
    names = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=20, unique=True))
    for number in names:
        base.write(NODES[number % 3], ("disk", f"d{number}", disk(f"{number % 7}", virtual_size=number % 5)))
    sort = data.draw(st.sampled_from(["node", "name", "-name", "size", "-size"]))
    limit = data.draw(st.integers(1, 5))
    stays, seen, after = set(names), list[str](), None
    for _ in range(100):
        page = base.snapshot().disks(sort=sort, after=after, limit=limit)
        seen += [one.id for one in page.records]
        if page.next is None:
            break
        after = page.next
        gone = data.draw(st.sampled_from(sorted(names)))
        stays.discard(gone)
        base.write(NODES[gone % 3], ("disk", f"d{gone}", None), ("disk", f"new{gone}", disk("5")))
    assert len(seen) == len(set(seen))
    assert {f"d{number}" for number in stays} <= set(seen)


def test_the_list_is_by_name_of_the_node() -> None:
    base = Written()
    for owner, name in zip(NODES, ("c", "a", "b"), strict=True):
        base.write(owner, ("node", owner, {"name": name, "fleet": "f"}), ("disk", "d", disk("x")))
    found, after = [], None
    for _ in NODES:
        page = base.snapshot().disks(after=after, limit=1)
        found += [base.snapshot().name(one.owner) for one in page.records]
        after = page.next
    assert (found, after) == (["a", "b", "c"], None)


# The tables

json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=5,
)


@pytest.mark.parametrize("index", [*REQUESTS, *INDEXES], ids=lambda one: one.kind)
@given(data=st.data())
def test_any_body_has_a_row_or_none(index: Any, data: st.DataObject) -> None:
    fields = ("datastore", "name", "file", "state", "plan", "chain", "disks", "target", "requester", "label", "disk")
    body = data.draw(st.dictionaries(st.sampled_from(fields), json_values))
    try:
        row = index.row(body)
    except InvalidColumnError:
        return
    assert len(row) == len(index.columns)
    sqlite3.connect(":memory:").execute(f"SELECT {', '.join('?' * (len(row) + 1))}", (*row, 0))


@given(st.data())
def test_indexes_are_those_of_the_records_after_any_writes(data: st.DataObject) -> None:
    base = Written()
    kinds = st.sampled_from(["disk", "job", "vm", "request", "thing"])
    ids = st.sampled_from(["a", "b", "c"])
    body = st.one_of(st.none(), st.just({"name": 5}), bodies.map(lambda one: {**one, "file": "f", "target": "t"}))
    rows = st.lists(st.tuples(kinds, ids, body), min_size=1, max_size=4)
    for _ in range(data.draw(st.integers(1, 5))):
        owner = data.draw(st.sampled_from(NODES))
        step = data.draw(st.sampled_from(["write", "clear", "replace", "undo"]))
        if step == "clear":
            with base.store.group():
                base.store.clear(owner)
        elif step == "replace":
            with base.store.group(), base.store.atomic():
                base.store.stage(1, base.made(owner, *data.draw(rows)))
                base.store.replace_by_staged(owner, 1)
                base.store.unstage(1)
        elif step == "undo":
            with pytest.raises(ZeroDivisionError), base.store.group(), base.store.atomic():
                base.store.extend(owner, base.made(owner, *data.draw(rows)))
                raise ZeroDivisionError
        else:
            base.write(owner, *data.draw(rows))
    kept = base.indexed()
    base.connection.execute("DELETE FROM meta WHERE name = 'indexes'")
    Store(base.connection, NODES[0], indexes=INDEXES)
    assert base.indexed() == kept


def test_what_is_deleted_or_dropped_leaves_the_indexes() -> None:
    written = Written()
    written.write(NODES[0], ("disk", "d1", disk("a")), ("disk", "d2", disk("b")))
    written.write(NODES[1], ("disk", "d1", disk("a")))
    written.write(NODES[0], ("disk", "d1", None))
    assert [(one.owner, one.id) for one, _ in written.store.listed("disk")] == [(NODES[0], "d2"), (NODES[1], "d1")]
    assert written.store.tally("disk") == [(2,)]
    with written.store.group():
        written.store.clear(NODES[0])
    assert written.store.tally("disk") == [(1,)]


def old_database(path: Path, rows: Sequence[tuple[str, str, Mapping[str, Any] | None]]) -> None:
    """Makes a database as version 1 did: without indexes, in a file that never shrinks."""
    base = Written(str(path))
    base.write(NODES[0], *rows)
    for index in (*REQUESTS, *INDEXES):
        base.connection.execute(f"DROP TABLE {index.table}")
    base.connection.execute("DELETE FROM meta WHERE name = 'indexes'")
    base.connection.execute("DROP INDEX executed_by_clock")
    for column in ("clock", "epoch", "seq"):
        base.connection.execute(f"ALTER TABLE executed DROP COLUMN {column}")
    base.connection.execute("INSERT INTO executed VALUES ('r.x', 1)")
    base.connection.execute("INSERT INTO meta VALUES ('executed-clock', 77)")
    base.connection.execute("PRAGMA auto_vacuum = NONE")
    base.connection.execute("VACUUM")
    base.connection.execute("PRAGMA user_version = 1")
    base.connection.close()


def test_a_database_of_version_1_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    old_database(path, [("disk", "d1", disk("a")), ("request", "r1", {"target": NODES[1]}), ("disk", "d2", None)])
    store = Store.open(str(path), NODES[0], indexes=INDEXES)
    assert [one.id for one, _ in store.listed("disk")] == ["d1"]
    assert store.tally("request") == [(1,)]
    assert store._connection.execute("PRAGMA auto_vacuum").fetchone() == (2,)
    assert store._connection.execute("SELECT * FROM executed").fetchall() == [("r.x", 1, 77, 0, 0)]
    assert store.position(NODES[0]).seq == 3
    store.close()
    # The version before refuses it, as this one refuses what is newer, and changes nothing.
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (VERSION,)
    connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    connection.close()
    with pytest.raises(StoreError, match=f"version {VERSION + 1}") as raised:
        Store.open(str(path), NODES[0], indexes=INDEXES)
    assert "downgrade" in str(raised.value.hint)


@pytest.mark.parametrize("fill", [False, True], ids=["as they come", "rebuilt"])
def test_a_clock_that_was_wrong_leaves_nothing_at_the_top_of_the_history(fill: bool) -> None:
    written = Written()
    for owner, number, clock in [
        (NODES[0], 1, 100),
        (NODES[1], 1, 110),
        (NODES[0], 2, 1 << 50),
        (NODES[0], 3, (1 << 50) + 1),
        (NODES[1], 2, 130),
        (NODES[0], 4, 140),
        (NODES[1], 3, 150),
    ]:
        written.write(owner, ("transaction", f"{number:012}", {"requester": "r", "request": "q"}), clock=clock)
    if fill:
        written.store._indexes.clear(1)
        written.store._indexes.fill(1)
    found = written.store.listed("transaction", order=("clock",), descending=True)
    order = [(NODES.index(record.owner), int(record.id)) for record, _ in found]
    assert order == [(1, 3), (0, 4), (0, 3), (0, 2), (1, 2), (1, 1), (0, 1)]
