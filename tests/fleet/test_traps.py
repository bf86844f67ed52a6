"""Names that are traps are given to nothing, and a member that has one is called by its id."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fleet.in_memory import Node, nodes
from fleet.serving import Served, served
from vmconv.errors import AccessError, UsageError, VmconvError
from vmconv_fleet import config as settings
from vmconv_fleet.catalogue.places import refuse_as_file_name
from vmconv_fleet.config import ConfigError, NodeConfig
from vmconv_fleet.jobs.arguments import ARGUMENTS
from vmconv_fleet.replication.records import Change
from vmconv_fleet.trust import tokens
from vmconv_fleet.words import trap_in

TRAPS = {
    "empty": "",
    "option": "-rf",
    "hidden": ".hidden",
    "parent": "..",
    "below": "a/b",
    "newline": "a\nb",
    "end-of-line": "a\n",
    "escape": "a\x1b[2J",
    "nul": "a\0b",
    "c1": "a\x9bb",
    "bidi-override": "invoice\u202egnp.exe",
    "bidi-isolate": "a\u2066b",
    "zero-width": "a\u200bb",
    "line-separator": "a\u2028b",
    "surrogate": "a\udcffb",
    "private-use": "a\ue000b",
    "space-before": " a",
    "space-after": "a ",
    "long": "a" * 201,
    "long-in-bytes": "ä" * 101,
}
NAMES = ["n01", "web server.raw", "Änne", "a.b-c_d", "日本語", "a" * 200, "x..y", "n--1"]
HASH = "0" * 64


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with nodes(1, tmp_path) as (one,):
        yield one


@pytest.fixture
def api(node: Node) -> Iterator[Served]:
    with served(node) as one:
        yield one


@pytest.mark.parametrize("name", NAMES)
def test_a_name_may_be_any_plain_text(name: str) -> None:
    assert trap_in(name) is None
    refuse_as_file_name(name)
    ARGUMENTS["token-create"].model_validate({"id": "0" * 12, "label": name, "role": "viewer", "hash": HASH})


@pytest.mark.parametrize("name", TRAPS.values(), ids=TRAPS)
def test_a_trap_is_no_name_of_anything(name: str, tmp_path: Path) -> None:
    with pytest.raises(AccessError):
        refuse_as_file_name(name)
    wishes: list[tuple[str, dict[str, Any]]] = [
        ("token-create", {"id": "0" * 12, "label": name, "role": "viewer", "hash": HASH}),
        ("convert", {"disk": "d1", "format": "qcow2", "target": name}),
        ("convert-machine", {"vm": "v1", "format": "vmx", "target": name}),
        ("datastore-add", {"name": name, "path": "/srv"}),
    ]
    for verb, wish in wishes:
        with pytest.raises(ValueError, match="validation error"):
            ARGUMENTS[verb].model_validate(wish)
    if name.isprintable():
        plain = NodeConfig(directory=str(tmp_path), fleet="f", node="a" * 32, name="n")
        for field, config in (("name", replace(plain, name=name)), ("fleet", replace(plain, fleet=name))):
            settings.save(config)
            with pytest.raises(ConfigError, match=field):
                settings.load(str(tmp_path))


@pytest.mark.parametrize("name", ["-rf", "a\nb", "\u202ea"])
def test_the_api_refuses_traps(api: Served, name: str) -> None:
    with pytest.raises(UsageError):
        api.local.call("POST", "/api/v1/tokens", {"label": name, "role": "viewer"})
    with pytest.raises(VmconvError):
        api.local.call("POST", "/api/v1/datastores", {"name": name, "path": str(api.node.directory)})
    # Around the API's own models.
    new = tokens.make(api.node.id)
    with pytest.raises(UsageError):
        given = {"id": new.id, "hash": new.hash, "label": name, "role": "viewer"}
        api.local.call("POST", "/api/v1/requests", {"target": api.node.id, "verb": "token-create", "arguments": given})


@pytest.mark.parametrize("name", ["-rf", "\u202en01", "n01\nn02"])
def test_a_member_with_a_trap_for_a_name_is_called_by_its_id(node: Node, api: Served, name: str) -> None:
    node.write(Change("node", node.id, {"name": name, "fleet": "test"}))
    assert [one["name"] for one in api.local.get("/api/v1/nodes")["items"]] == [node.id[:8]]
    assert {one["node"] for one in api.local.get("/api/v1/records/node")["items"]} == {node.id[:8]}
