"""What an appointed node converts for the owner of a storage, decided from records alone."""

from __future__ import annotations

from typing import Any

import pytest

from fleet.asking import ASKED, HERE, OTHER, THIRD, Replica
from vmconv.errors import VmconvError
from vmconv_fleet.catalogue.appointing import converters, may_convert

STORAGE = {"storage": "5" * 32, "owner": OTHER}
DISKS: dict[str, dict[str, Any]] = {
    "whole": {"name": "whole.raw"},
    "overlay": {"name": "overlay.qcow2", "chain": [{"name": "whole.raw", "disk": "whole"}]},
    "absolute": {"name": "absolute.qcow2", "chain": [{"name": "/srv/theirs/whole.raw", "disk": "whole"}]},
    "schemed": {"name": "schemed.qcow2", "chain": [{"name": "file:whole.raw", "disk": "whole"}]},
    "apart": {"name": "apart.qcow2", "chain": [{"name": "../more/base.raw", "disk": "base"}]},
    "unlisted": {"name": "unlisted.qcow2", "chain": [{"name": "base.raw"}]},
    "base": {"name": "base.raw", "datastore": "more"},
}
MACHINES: dict[str, list[dict[str, Any]]] = {
    "good": [{"name": "whole.raw", "disk": "whole"}, {"name": "overlay.qcow2", "disk": "overlay"}, {"name": ""}],
    "rooted": [{"name": "/srv/theirs/whole.raw", "disk": "whole"}],
    "below": [{"name": "absolute.qcow2", "disk": "absolute"}],
    "split": [{"name": "whole.raw", "disk": "whole"}, {"name": "apart.qcow2", "disk": "apart"}],
    "outside": [{"name": "base.raw", "disk": "base"}],
    "unknown": [{"name": "whole.raw"}],
}


@pytest.fixture
def replica() -> Replica:
    """A node that another one has appointed for its datastore `theirs`, which is `mine` here."""
    made = Replica()
    made.add(OTHER, "datastore", "theirs", {"path": "/srv/theirs", "converters": [HERE], **STORAGE})
    made.add(OTHER, "datastore", "more", {"path": "/srv/more"})
    made.add(HERE, "datastore", "mine", {"path": "/srv/mine", **STORAGE})
    for name, body in DISKS.items():
        made.add(OTHER, "disk", name, {"datastore": "theirs", "format": "raw", **body})
    for name, disks in MACHINES.items():
        body = {"datastore": "theirs", "file": f"{name}.vmx", "name": name, "disks": disks}
        made.add(OTHER, "vm", name, body)
    made.add(OTHER, "vm", "package", {"datastore": "theirs", "file": "p.ova", "name": "p", "packaged": True})
    return made


def ask(replica: Replica, verb: str, source: str, **more: Any) -> dict[str, Any]:
    kind = "vm" if verb == "convert-machine" else "disk"
    replica.ask(verb, **{**ASKED[verb], kind: source, "of": OTHER, "job": "j1", **more})
    return dict(replica.body("job", "j1"))


def test_a_machine_is_converted_for_its_owner(replica: Replica) -> None:
    job = ask(replica, "convert-machine", "good", strict=True)
    fields = {name: job[name] for name in ("vm", "of", "datastore", "source", "strict")}
    assert fields == {"vm": "good", "of": OTHER, "datastore": "mine", "source": "good.vmx", "strict": True}
    assert ask(replica, "convert-machine", "package", job="j1x")


@pytest.mark.parametrize(
    ("verb", "sources"),
    [
        ("convert", ["absolute", "schemed", "apart", "unlisted"]),
        ("convert-machine", ["rooted", "below", "split", "outside", "unknown"]),
    ],
)
def test_what_a_node_may_not_find_is_the_owner_s_to_convert(replica: Replica, verb: str, sources: list[str]) -> None:
    kind = "vm" if verb == "convert-machine" else "disk"
    for source in sources:
        with pytest.raises(VmconvError, match=f"this node may not find .* of {kind} {source}.*: ask node {OTHER}"):
            ask(replica, verb, source)
        record = replica.get(OTHER, kind, source)
        assert record
        assert may_convert(replica, OTHER, record)
        assert not may_convert(replica, HERE, record)


def test_paths_from_the_root_are_the_same_where_the_storage_has_the_same_path(replica: Replica) -> None:
    replica.add(HERE, "datastore", "mine", {"path": "/srv/theirs", **STORAGE})
    assert ask(replica, "convert", "absolute")["datastore"] == "mine"
    for machine in ("rooted", "below"):
        del replica.records[HERE, "job", "j1"]
        assert ask(replica, "convert-machine", machine)["datastore"] == "mine"
    with pytest.raises(VmconvError, match="it is in another datastore"):
        ask(replica, "convert-machine", "split", job="j2")


@pytest.mark.parametrize(
    ("owner", "rules", "said"),
    [
        (OTHER, {"formats": ["vmdk"]}, "converts to vmdk, not to qcow2"),
        (HERE, {"formats": ["vmdk"]}, "converts to vmdk, not to qcow2"),
        (OTHER, {"naming": "-{stem}"}, "the target would be called"),
    ],
)
def test_the_rules_of_both_count_for_machines(replica: Replica, owner: str, rules: dict[str, Any], said: str) -> None:
    replica.add(owner, "policy", "conversion", rules)
    with pytest.raises(VmconvError, match=said):
        ask(replica, "convert-machine", "good")


def test_copying_is_ruled_out_by_either(replica: Replica) -> None:
    replica.add(OTHER, "policy", "conversion", {"zero_copy": "require"})
    assert ask(replica, "convert-machine", "good")["zero_copy"] == "require"


def test_the_owner_alone_makes_targets_elsewhere(replica: Replica) -> None:
    for verb, source in (("convert", "whole"), ("convert-machine", "good")):
        with pytest.raises(VmconvError, match="made beside its source"):
            ask(replica, verb, source, target_datastore="ds")


@pytest.mark.parametrize("said", [None, 5, "abc", [5], {"a": 1}])
def test_records_of_another_node_may_be_anything(replica: Replica, said: Any) -> None:
    replica.add(OTHER, "disk", "whole", {"datastore": "theirs", "name": "whole.raw", "chain": said})
    replica.add(OTHER, "vm", "good", {"datastore": "theirs", "file": "good.vmx", "disks": said})
    for kind, name in (("disk", "whole"), ("disk", "overlay"), ("vm", "good"), ("vm", "split")):
        record = replica.get(OTHER, kind, name)
        assert record
        assert may_convert(replica, HERE, record) == (name == "overlay")
    replica.add(OTHER, "datastore", "theirs", {"path": "/srv/theirs", "converters": said, **STORAGE})
    assert converters(replica, OTHER, "theirs") == [OTHER]
    record = replica.get(OTHER, "disk", "overlay")
    assert record
    assert not may_convert(replica, HERE, record)


def test_without_an_appointment_no_machine_is_converted(replica: Replica) -> None:
    replica.add(OTHER, "datastore", "theirs", {"path": "/srv/theirs", "converters": [THIRD], **STORAGE})
    with pytest.raises(VmconvError, match="has not appointed this node"):
        ask(replica, "convert-machine", "good")


def test_an_id_is_not_used_for_the_same_disk_of_two_nodes(replica: Replica) -> None:
    """Datastores and disks of the same names have the same ids on all nodes."""
    replica.add(HERE, "disk", "whole", {"datastore": "ds", "name": "whole.raw"})
    assert ask(replica, "convert", "whole")["of"] == OTHER
    with pytest.raises(VmconvError, match="a different conversion"):
        replica.ask("convert", disk="whole", format="qcow2", job="j1", request="r2")
    again = replica.ask("convert", disk="whole", of=OTHER, format="qcow2", job="j1", request="r3")
    assert again.body == {"job": "j1", "state": "queued"}


@pytest.mark.parametrize("role", ["operator", "viewer"])
def test_the_role_in_the_owner_s_datastore_counts(replica: Replica, role: Any) -> None:
    by = replica.token(THIRD, "viewer", datastores={f"{OTHER}/theirs": role, f"{HERE}/mine": "operator"})
    by |= {"node": OTHER}
    if role == "viewer":
        with pytest.raises(VmconvError, match="needs the role operator"):
            ask(replica, "convert-machine", "good", requester=OTHER, by=by)
    else:
        assert ask(replica, "convert-machine", "good", requester=OTHER, by=by)["within"] == ["mine"]
