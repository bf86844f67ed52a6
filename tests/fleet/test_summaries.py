"""Transactions in one line: names instead of ids, whatever other nodes write."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.written import NODES, Written
from vmconv_fleet.catalogue.summaries import summary

JOB = {"disk": "d1", "datastore": "ds", "source": "web.raw", "format": "qcow2"}


def said(verb: str, *changes: dict[str, Any], base: Written | None = None) -> str:
    return summary((base or Written()).snapshot(), NODES[0], {"verb": verb, "changes": list(changes)})


def change(kind: str, id: str, before: Any = None, after: Any = None) -> dict[str, Any]:
    return {"kind": kind, "id": id, "before": before, "after": after}


@pytest.mark.parametrize(
    ("verb", "changes", "text"),
    [
        ("convert", [change("job", "j1", None, JOB)], "web.raw -> a qcow2"),
        ("convert", [change("job", "j1", None, {**JOB, "target": "new"})], "web.raw -> new"),
        ("convert", [change("job", "j1", None, {**JOB, "dry_run": True})], "web.raw -> a qcow2 (dry run)"),
        ("convert", [], "the same conversion again"),
        ("cancel", [change("job", "j1", JOB, JOB)], "cancelled web.raw -> a qcow2"),
        ("scan", [change("datastore", name, {"path": "/"}, {}) for name in "abcd"], "scan of a, b, c and 1 more"),
        ("scan", [], "scan"),
        ("datastore-add", [change("datastore", "ds", None, {"path": "/srv"})], "new datastore ds at /srv"),
        ("datastore-remove", [change("datastore", "ds", {"path": "/srv"})], "removed datastore ds"),
        (
            "policy-set",
            [change("policy", "conversion", {"keep_days": 9}, {"keep_days": 90, "naming": "{stem}"})],
            "policy: keep_days 9 -> 90, naming default -> {stem}",
        ),
        ("token-create", [change("token", "t", None, {"label": "anna", "role": "admin"})], "new token of anna (admin)"),
        (
            "retire",
            [change("retirement", "x", None, {"name": "n07"}), change("revocation", "y", None, {"node": "z"})],
            "retired n07",
        ),
        ("revoke", [change("revocation", "y", None, {"node": NODES[1]})], f"revoked all keys of {NODES[1][:8]}"),
        ("of-tomorrow", [change("thing", "t1", None, {})], "of-tomorrow thing t1"),
    ],
)
def test_a_transaction_says_what_it_did(verb: str, changes: list[dict[str, Any]], text: str) -> None:
    assert said(verb, *changes) == text


def test_a_target_is_named_once_its_job_knows_it() -> None:
    base = Written()
    base.write(NODES[0], ("job", "j1", {**JOB, "file": "web-2.qcow2"}))
    assert said("convert", change("job", "j1", None, JOB), base=base) == "web.raw -> web-2.qcow2"


anything = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["role", "datastores", "x"]), inner),
    max_leaves=4,
)


@given(st.sampled_from(["job", "token", "policy", "revocation", "retirement", "datastore"]), anything, anything)
def test_no_body_of_another_node_breaks_the_history(kind: str, before: Any, after: Any) -> None:
    assert isinstance(said("retire", change(kind, "x", before, after)), str)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"merge": True}, "merged the histories of this node"),
        ({"without": ["b" * 32, "c" * 32]}, "resumed without bbbbbbbb, cccccccc"),
        ({"alone": True, "without": []}, "resumed without other nodes"),
        ({"without": 7}, "resumed without other nodes"),
        (None, "resumed without other nodes"),
    ],
    ids=["merge", "without", "alone", "no list", "no body"],
)
def test_a_node_that_resumes(body: object, said: str) -> None:
    assert summary(Written().snapshot(), NODES[0], {"verb": "resume", "changes": [], "body": body}) == said
