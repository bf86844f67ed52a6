"""The verbs of `vmconv fleet`, against nodes in this process; the demo runs real ones."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from fleet.in_memory import Node, nodes
from fleet.serving import Served, served
from support import domains
from support.disks import MIB, make_disk
from vmconv.cli import main as cli
from vmconv.errors import UsageError
from vmconv_fleet.api import bulk
from vmconv_fleet.catalogue.differences import differences
from vmconv_fleet.catalogue.scanning import Scanner
from vmconv_fleet.cli import doctor
from vmconv_fleet.cli.client import NodeClient, NotThereError, OlderNodeError
from vmconv_fleet.cli.converting import moment
from vmconv_fleet.cli.fleet import COMMAND, VERBS
from vmconv_fleet.config import NodeConfig, save
from vmconv_fleet.jobs.runner import JobRunner
from vmconv_fleet.replication.records import Change
from vmconv_fleet.testing import PATIENCE, wait_until
from vmconv_fleet.words import age_text

Run = Callable[..., str]


class Fleet(NamedTuple):
    """Two nodes: the first is asked, the second has the disks."""

    here: Node
    other: Node
    api: Served


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("web-1", "web-2"):
        make_disk(images / f"{name}.raw", MIB)
    domains.shop(images, "web-1.raw")
    (images / "old.vmx").write_bytes(b"not a configuration")
    with nodes(2, tmp_path) as (here, other), served(here) as api:
        parts = Scanner(other.service, {"ds": str(images)}), JobRunner(other.service, str(other.directory))
        for part in parts:
            part.start()
        here.until(lambda: len(here.service.view().find("disk", other.id)) == 2)
        here.body_when(other.id, "datastore", "ds", lambda one: one.body.get("scanned_ms", 0) > 0)
        yield Fleet(here, other, api)
        for part in parts:
            part.stop()


@pytest.fixture
def run(fleet: Fleet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `vmconv fleet ...` on the first node; returns what was printed, errors included when one was expected."""
    monkeypatch.setenv("VMCONV_NODE", str(fleet.here.directory))

    def call(*arguments: str, code: int = 0) -> str:
        assert cli.main(["fleet", *arguments]) == code, capsys.readouterr()
        said = capsys.readouterr()
        return said.out + (said.err if code else "")

    return call


def test_nodes(run: Run, fleet: Fleet) -> None:
    lines = run("nodes").splitlines()
    assert lines[0].split() == ["NODE", "STATE", "HEARD", "BEHIND", "AT", "ID"]
    assert [line.split()[:2] for line in lines[1:]] == [["n01", "here"], ["n02", "up"]]
    assert [one["node"] for one in json.loads(run("nodes", "--output", "json"))] == [fleet.here.id, fleet.other.id]


def test_datastores(run: Run) -> None:
    assert run("datastores").splitlines()[1].split()[:2] == ["n02", "ds"]


def test_disks(run: Run) -> None:
    assert [line.split()[-1] for line in run("disks").splitlines()[1:]] == ["web-1.raw", "web-2.raw"]
    assert [line.split()[-1] for line in run("disks", "--select", "name=*2.raw").splitlines()[1:]] == ["web-2.raw"]
    assert run("disks", "--of", "n01").count("\n") == 1
    assert "hint: fields" in run("disks", "--select", "colour=red", code=2)


def test_names_of_strangers_do_not_command_the_terminal(run: Run, fleet: Fleet) -> None:
    fleet.other.write(Change("disk", "evil", {"datastore": "ds", "name": "\x1b]0;owned\x07\n.raw"}))
    fleet.here.body_when(fleet.other.id, "disk", "evil", lambda _one: True)
    assert "\x1b" not in run("disks")
    assert "\\x1b]0;owned" in run("disks")


def test_vms(run: Run, fleet: Fleet) -> None:
    head, old, shop = (line.split() for line in run("vms").splitlines())
    assert head == ["ID", "NODE", "VM", "FORMAT", "SYSTEM", "CPUS", "MEMORY", "DISKS"]
    assert old[1:7] == ["n02", "old", "-", "-", "-", "-"]
    assert " ".join(old[7:]).startswith("unreadable: old.vmx: is not a configuration")
    assert shop[1:] == ["n02", "shop", "libvirt", "x86_64", "2", "512", "MiB", "web-1.raw"]


def test_vms_are_searched_selected_and_sorted(run: Run) -> None:
    def names(*arguments: str) -> list[str]:
        return [line.split()[2] for line in run("vms", *arguments).splitlines()[1:]]

    assert names("--sort=-memory") == ["shop", "old"]
    assert names("--select", "memory>=512M and not problem") == ["shop"]
    assert names("--select", "disks=0 or node=n01") == ["old"]
    assert names("--search", "OLD vmx") == ["old"]
    assert names("--search", "old xml") == []
    assert names("--of", "n01") == []
    assert "'depth' at character 1 where a field was expected" in run("vms", "--select", "depth=1", code=2)


def test_a_disk_of_a_machine_that_is_elsewhere_is_marked(run: Run, fleet: Fleet) -> None:
    disks = [{"name": "web-9.vmdk"}, {"name": "", "capacity": 512}]
    fleet.other.write(Change("vm", "v1", {"datastore": "ds", "file": "x", "name": "x", "disks": disks}))
    fleet.here.body_when(fleet.other.id, "vm", "v1", lambda _one: True)
    assert run("vms").splitlines()[3].endswith("web-9.vmdk (not here), empty disk")


def test_a_name_of_two_machines_is_refused(run: Run, fleet: Fleet) -> None:
    fleet.other.write(Change("vm", "v1", {"datastore": "ds", "file": "copy.xml", "name": "shop"}))
    fleet.here.body_when(fleet.other.id, "vm", "v1", lambda _one: True)
    said = run("convert", "n02:shop", "-O", "vmx", code=2)
    assert "'n02:shop' is not one vm but 2: " in said
    assert "hint: name it by its id" in said


def test_convert_of_a_machine_says_what_changes_and_what_is_lost(run: Run, tmp_path: Path) -> None:
    # What it becomes is another VM of this name, as soon as the node has seen it.
    wanted = ["convert", "n02:shop.xml", "-O", "vmx", "--wait", "30"]
    planned = run(*wanted, "--dry-run").splitlines()
    assert planned[0].split() == ["VM", "BECOMES", "STATE", "PLAN"]
    assert planned[1].split()[:3] == ["shop", "shop.vmx/shop.vmx", "planned"]
    assert "not carried over: watchdog i6300esb: vmx has no place for it" in planned
    assert any(line.startswith("changed: nics[0].model virtio -> vmxnet3: ") for line in planned)
    assert not (tmp_path / "images/shop.vmx").exists()
    assert run(*wanted, "--follow").splitlines()[1].split()[:3] == ["shop", "shop.vmx/shop.vmx", "done"]
    assert (tmp_path / "images/shop.vmx/shop-disk1.vmdk").exists()
    assert "would be lost" in run(*wanted, "--follow", "--strict", "--target", "other", code=1)


def test_convert_takes_the_options_of_a_machine_only_with_its_format(run: Run) -> None:
    assert "name its format with -O" in run("convert", "n02:web-1.raw", "--to", "raw", "--strict", code=2)
    assert "no vm is selected by 'name=none'" in run("convert", "--select", "name=none", "-O", "vmx", code=2)
    assert "no vm 'n02:web-1.raw'" in run("convert", "n02:web-1.raw", "-O", "vmx", code=2)
    assert "refused: this node cannot write qcow2 machines" in run(
        "convert", "n02:shop.xml", "-O", "qcow2", "--wait", "30", code=1
    )


def test_convert_follows_to_the_end(run: Run) -> None:
    said = run("convert", "n02:web-1.raw", "--to", "qcow2", "--follow", "--wait", "30").splitlines()
    assert said[1].split()[:3] == ["web-1.raw", "web-1.qcow2", "done"]
    assert "already exists" in run("convert", "n02:web-1.raw", "--to", "qcow2", "--follow", "--wait", "30", code=1)


def test_convert_says_what_was_accepted(run: Run) -> None:
    said = run(
        "convert", "n02:web-1.raw", "--to", "raw", "--target", "b.raw", "--at", "2999-01-01T10:00", "--id", "mine-1"
    )
    assert said.splitlines()[1].split() == ["web-1.raw", "mine-1", "accepted"]
    assert re.search(r"begins 2999-01-01 10:00:00 \S+\n$", said)


def test_convert_of_many_is_planned_first(run: Run, fleet: Fleet, tmp_path: Path) -> None:
    many = ["convert", "--select", "format=raw and node=n0*", "--to", "vhdx", "--max-parallel", "4", "--wait", "30"]
    said = run(*many, "--dry-run").splitlines()
    assert [line.split()[:3] for line in said[1:3]] == [
        ["web-1.raw", "web-1.vhdx", "planned"],
        ["web-2.raw", "web-2.vhdx", "planned"],
    ]
    assert said[-1].endswith("of 2 disks")
    assert not list((tmp_path / "images").glob("*.vhdx"))
    assert run(*many, "--follow").count("done") == 2
    assert len(list((tmp_path / "images").glob("*.vhdx"))) == 2
    assert "no disk is selected" in run("convert", "--select", "format=dmg", "--to", "raw", code=2)
    assert "--target applies to one conversion" in run(*many, "--target", "x", code=2)


def test_convert_of_several_by_name(run: Run, fleet: Fleet, tmp_path: Path) -> None:
    said = run("convert", "n02:web-1.raw", "n02:web-2.raw", "--to", "vhdx", "--follow", "--wait", "30")
    assert said.count(" done ") == 2
    (batch,) = {one["body"]["batch"] for one in fleet.api.local.everything("/api/v1/jobs")}
    assert run("jobs", "--batch", batch, "--search", "WEB-2").splitlines()[1].split()[-1] == "web-2.vhdx"
    # One of two fails, and the other one is done.
    said = run("convert", "n02:web-1.raw", "n02:web-2.raw", "--to", "luks", "--wait", "30", code=1)
    assert said.count("refused: this node cannot write luks") == 2
    lines = run("convert", "n02:shop", "n02:old", "-O", "vmx", "--wait", "30", "--follow", code=1).splitlines()
    assert [line.split()[:3] for line in lines[1:3]] == [
        ["shop", "shop.vmx/shop.vmx", "done"],
        ["old", "-", "refused:"],
    ]


@pytest.mark.parametrize(("answer", "jobs"), [("y", 2), ("n", 0), ("", 0)])
def test_convert_of_many_asks_on_a_terminal(
    run: Run, fleet: Fleet, monkeypatch: pytest.MonkeyPatch, answer: str, jobs: int
) -> None:
    terminal = SimpleNamespace(isatty=lambda: True, readline=lambda: f"{answer}\n")
    monkeypatch.setattr("sys.stdin", terminal)
    many = ["convert", "--select", "format=raw", "--to", "qcow2", "--wait", "30"]
    said = run(*many, code=0 if jobs else 2)
    assert "n02:web-1.raw\nn02:web-2.raw\nConvert 2 disks (" in said
    assert "of n02 to qcow2: each becomes a new file beside its source, the sources stay? [y/N]" in said
    assert len(fleet.api.local.everything("/api/v1/jobs")) == jobs
    run(*many, "--yes")


def test_a_refused_conversion_fails(run: Run) -> None:
    assert "refused: this node cannot write" in run("convert", "n02:web-1.raw", "--to", "luks", "--wait", "30", code=1)
    assert "target: '-rf.raw' is not the name of a file: it begins with '-'" in run(
        "convert", "n02:web-1.raw", "--to", "raw", "--target=-rf.raw", code=2
    )
    assert "no disk" in run("convert", "n02:nothing.raw", "--to", "raw", code=2)


def test_cancel_and_jobs(run: Run) -> None:
    run("convert", "n02:web-1.raw", "--to", "qcow2", "--at", "2999-01-01T10:00", "--id", "job-one")
    assert run("jobs", "--state", "queued").splitlines()[1].split()[:3] == ["job-one", "n02", "queued"]
    assert run("cancel", "job-o", "--wait", "30").startswith("job job-one: cancelled (transaction ")
    assert run("jobs", "--state", "queued").count("\n") == 1
    assert "already cancelled" in run("cancel", "job-one", "--wait", "30", code=1)


def test_a_job_shows_what_it_waits_for(run: Run, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    now = datetime.now(UTC)
    window = f"{now + timedelta(hours=2):%H:%M}-{now + timedelta(hours=3):%H:%M}"
    run("convert", "n02:web-1.raw", "--to", "vhdx", "--between", window, "--wait", "30")
    (body,) = (one["body"] for one in json.loads(run("jobs", "--output", "json")))
    assert body["between"] == f"{window} UTC"
    waits = datetime.fromtimestamp(json.loads(run("jobs", "--output", "json"))[0]["waits_until_ms"] / 1000, UTC)
    assert f"{waits:%H:%M}" == window.partition("-")[0]
    assert " queued (waits for " in run("jobs")
    run("policy", "n02", "--between", window, "--bandwidth", "ds=100M", "--datastore-parallel", "ds=1", "--wait", "30")
    policy = json.loads(run("policy", "n02", "--output", "json"))
    assert policy == {"between": f"{window} UTC", "bandwidth": {"ds": 100 * MIB}, "datastore_parallel": {"ds": 1}}
    other = f"{now + timedelta(hours=5):%H:%M}-{now + timedelta(hours=6):%H:%M}"
    run("policy", "n02", "--between", other, "--wait", "30")
    assert "never overlap" in run("jobs")
    assert re.search(r"WRONG  n02 job \S+: never begins, because its window", run("doctor", code=1))
    run("policy", "n02", "--between", "none", "--bandwidth", "none", "--wait", "30")
    assert "no problems" in run("doctor")
    assert json.loads(run("policy", "n02", "--output", "json"))["bandwidth"] == {}
    assert "is not a window" in run("convert", "n02:web-1.raw", "--to", "vhdx", "--between", "night", code=2)


def test_scan(run: Run, fleet: Fleet, tmp_path: Path) -> None:
    make_disk(tmp_path / "images" / "web-3.raw", MIB)
    assert run("scan", "n02", "--wait", "30").startswith("scan begun")
    fleet.here.until(lambda: "web-3.raw" in run("disks"))


def test_requests_and_history(run: Run) -> None:
    run("policy", "n02", "--max-parallel", "7", "--wait", "30")
    assert run("requests").splitlines()[1].split()[-2:] == ["transaction", "1"]
    said = run("history", "--of", "n02")
    assert "policy: max_parallel default -> 7 by" in said
    assert "        max_parallel: - -> 7" in said
    assert json.loads(run("history", "--output", "json"))[0]["body"]["number"] == 1


def test_history_is_about_names_and_without_scans(run: Run, fleet: Fleet) -> None:
    run("scan", "n02", "--wait", "30")
    run("convert", "n02:web-1.raw", "--to", "qcow2", "--follow", "--wait", "30")
    lines = [line for line in run("history").splitlines() if not line.startswith(" ")]
    assert [line.split("  ")[-1].partition(" by ")[0] for line in lines] == ["web-1.raw -> web-1.qcow2"]
    assert " by scan" not in run("requests")
    assert "  scan of ds by " in run("history", "--scans")
    assert " scan " in run("requests", "--scans")


def test_a_node_of_an_earlier_version_states_no_summary(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("policy", "n02", "--max-parallel", "7", "--wait", "30")
    get = NodeClient.get

    def earlier(client: NodeClient, path: str, **query: Any) -> Any:
        answer = get(client, path, **query)
        for one in answer["items"]:
            one.pop("summary", None)
        return answer

    monkeypatch.setattr(NodeClient, "get", earlier)
    assert "  policy-set by " in run("history", "--of", "n02")


@pytest.mark.parametrize("said", ["body.select: Field required", "select: Field required"])
def test_a_node_of_an_earlier_version_converts_no_list(run: Run, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    def refuse(*_arguments: Any, **_more: Any) -> Any:
        raise UsageError(said)

    monkeypatch.setattr(bulk, "_chosen", refuse)
    error = run("convert", "--select", "format=raw", "--to", "qcow2", "--yes", code=1)
    assert (
        error.splitlines()[0] == "vmconv: the node runs an earlier version, which does not know conversions of a list"
    )


def test_a_request_that_no_route_takes_is_one_of_a_later_version(fleet: Fleet) -> None:
    for method, path in (("GET", "/api/v1/later"), ("PUT", "/api/v1/keys")):
        with pytest.raises(OlderNodeError, match="the node runs an earlier version, which does not know this request"):
            fleet.api.local.call(method, path)
    with pytest.raises(NotThereError, match="no node 'n77'"):
        fleet.api.local.get("/api/v1/nodes/n77")


def test_policy(run: Run) -> None:
    assert "no policy of its own" in run("policy")
    run("policy", "--naming", "{stem}-new{suffix}", "--formats", "raw,qcow2", "--may-remove-source", "yes")
    body = json.loads(run("policy", "--output", "json"))
    assert body == {"naming": "{stem}-new{suffix}", "formats": ["raw", "qcow2"], "may_remove_source": True}
    run("policy", "--formats", "all", "--zero-copy", "require")
    assert json.loads(run("policy", "--output", "json"))["formats"] is None
    for wrong, said in (
        (("--naming", "../x"), "naming: '../x' is not allowed: a name with {stem}, {suffix}, {format} or {job}, "),
        (("--naming=-{stem}",), "naming: '-{stem}' makes names such as '-name', which begins with '-'"),
        (("--keep-days", "6"), "keep_days: 6 is not allowed: 7 or more"),
        (("--keep-days", "99999"), "keep_days: 99999 is not allowed: 36500 or less"),
        (("--max-parallel", "0"), "max_parallel: 0 is not allowed: 1 or more"),
    ):
        assert f"vmconv: {said}" in run("policy", *wrong, code=2)
    assert "no node 'n77'" in run("policy", "--administrators-of", "n02,n77", code=1)


def test_nodes_in_a_policy_are_given_by_name(run: Run, fleet: Fleet) -> None:
    run("policy", "--administrators-of", "n02")
    body = json.loads(run("policy", "--output", "json"))
    assert body["administrators_of"] == [fleet.other.id, fleet.here.id]


def test_datastore(run: Run, fleet: Fleet, tmp_path: Path) -> None:
    assert run("datastore", "add", "more", str(tmp_path)).startswith(f"datastore more is {tmp_path}")
    assert "already exists" in run("datastore", "add", "more", str(tmp_path), code=1)
    assert "name: 'a b' is not allowed: up to 64 of letters, digits, '.', '_' and '-'" in run(
        "datastore", "add", "a b", str(tmp_path), code=2
    )
    assert "is not a directory" in run("datastore", "add", "none", str(tmp_path / "none"), code=2)
    assert "files stay" in run("datastore", "remove", "more")
    assert "files stay" in run("datastore", "remove", "ds", "--of", "n02", "--wait", "30")


def test_token(run: Run, fleet: Fleet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = run("token", "create", "eve", "--role", "operator", "--days", "3").strip()
    (tmp_path / "token").write_text(text + "\n")
    there = ["--node", fleet.api.url, "--ca", fleet.api.ca, "--token-file", str(tmp_path / "token")]
    assert "n02" in run("nodes", *there)
    assert "needs the role admin" in run("policy", "--max-parallel", "3", *there, code=1)
    assert "a token is needed" in run("nodes", "--node", fleet.api.url, code=2)
    listed = run("token", "list").splitlines()[1].split()
    assert listed[1:3] == ["eve", "operator"]
    assert "revoked" in run("token", "revoke", listed[0])
    assert "not known" in run("nodes", *there, code=1) or "revoked" in run("nodes", *there, code=1)
    for days in ("0", "nan", "3651"):
        assert f"--days {days}: more than 0 and at most 3650 is allowed" in run(
            "token", "create", "x", "--days", days, code=2
        )
    run("token", "create", "ever")
    assert [line.split()[-3:-1] for line in run("token", "list").splitlines() if " ever " in line] == [
        ["without", "end"]
    ]


def test_a_token_for_some_datastores(run: Run, fleet: Fleet, tmp_path: Path) -> None:
    text = run("token", "create", "eve", "--role", "operator", "--datastore", "n02:ds").strip()
    (tmp_path / "token").write_text(text)
    there = ["--node", fleet.api.url, "--ca", fleet.api.ca, "--token-file", str(tmp_path / "token")]
    assert "operator of n02:ds" in run("token", "list")
    run("scan", "n02", "--datastore", "ds", *there)
    assert "scan needs the role operator, eve has viewer" in run("scan", "n02", *there, code=1)


def test_webhook(run: Run, fleet: Fleet, tmp_path: Path) -> None:
    save(NodeConfig(directory=str(fleet.here.directory), fleet="test", node=fleet.here.id, name="n01"))
    secret = "whsec_" + "A" * 44
    (tmp_path / "secret").write_text(secret)
    arguments = ("--events", "job.*", "--secret-file", str(tmp_path / "secret"), "--allow-http")
    said = run("webhook", "add", "http://127.0.0.1:1/key", *arguments)
    match = re.fullmatch(rf"webhook (\w{{12}})\nsecret {secret}\n", said)
    assert match
    assert re.search(rf"{match[1]} +n01 +http://127.0.0.1:1 +job\.\* ", run("webhook", "list", "--of", "n01"))
    assert "loopback addresses are refused" in run("webhook", "test", match[1], code=1)
    assert run("webhook", "remove", match[1]).startswith(f"webhook {match[1]} is removed")
    assert "no webhook" in run("webhook", "test", match[1], code=2)
    assert "http is not encrypted" in run("webhook", "add", "http://127.0.0.1:1/key", code=2)
    assert json.loads(run("webhook", "list", "--output", "json")) == []


def test_group(run: Run) -> None:
    run("group", "set", "/dc/ops", "--role", "operator", "--datastore", "n02:ds")
    run("group", "set", "staff", "--role", "viewer")
    assert run("group", "list").splitlines()[1:] == ["n01   /dc/ops  operator of n02:ds", "n01   staff    viewer"]
    assert json.loads(run("group", "list", "--output", "json"))[0]["body"]["group"] == "/dc/ops"
    assert "has no role" in run("group", "remove", "/dc/ops")
    assert "has no role at this node" in run("group", "remove", "/dc/ops", code=2)
    assert "does not accept administrators" in run("group", "set", "staff", "--role", "admin", "--of", "n02", code=1)


def test_watch(run: Run, fleet: Fleet) -> None:
    command = [sys.executable, "-u", "-m", "vmconv", "fleet", "watch", "--kinds", "vm"]
    heard = threading.Event()

    def change() -> None:
        # It does not say since when it listens: there are changes until it has told of one.
        number = 0
        while not heard.is_set():
            number += 1
            body = {"datastore": "ds", "file": "x", "name": f"new-{number}"}
            fleet.other.write(Change("vm", "v1", body))

    changing = threading.Thread(target=change)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout
        changing.start()
        try:
            line = watching.stdout.readline()
        finally:
            heard.set()
            watching.kill()
            changing.join(PATIENCE)
    assert "  n02  vm v1  new-" in line


def test_export(run: Run, tmp_path: Path) -> None:
    said = run("export", str(tmp_path / "all.ndjson"))
    records = [json.loads(line) for line in (tmp_path / "all.ndjson").read_text().splitlines()]
    assert said == f"{tmp_path / 'all.ndjson'}: {len(records)} records\n"
    assert {"node", "disk", "datastore"} <= {one["kind"] for one in records}
    assert "cannot be written" in run("export", str(tmp_path / "all.ndjson"), code=1)
    assert run("export").count("\n") == len(records)


def test_audit(run: Run, fleet: Fleet) -> None:
    run("scan", "n02")
    run("cancel", "nothing", code=2)
    entry = json.loads(run("audit", "--output", "json"))
    assert (entry["verb"], entry["target_name"], entry["result"]) == ("scan", "n02", "executed")
    assert re.search(r"  \S+ from n01  scan of n02: executed\n", run("audit", "--since", "2026-01-01"))
    assert run("audit", "--until", "2001-01-01T10:00") == ""
    assert "is neither" in run("audit", "--since", "yesterday", code=2)


def test_doctor(run: Run, fleet: Fleet) -> None:
    assert run("doctor") == "no problems\n"
    fleet.other.write(Change("disk", "bad", {"datastore": "ds", "name": "x", "problem": "no signature"}))
    fleet.here.body_when(fleet.other.id, "disk", "bad", lambda _one: True)
    assert run("doctor") == "note   n02 disk bad: no signature\nno problems\n"
    fleet.here.wire.disconnect()
    wait_until(lambda: not fleet.here.service.neighbours(), PATIENCE, "the service learns of it")
    said = run("doctor", code=1)
    assert "WRONG  n01: is disconnected from the others" in said
    assert "WRONG  n02: is unreachable" in said


def test_a_member_without_a_record_is_a_problem() -> None:
    member: dict[str, Any] = {"node": "2" * 32, "name": "n02", "state": "silent", "age_ms": None, "problems": []}
    shown = {**member, "body": {}, "has_record": False}
    assert [one.what.partition(":")[0] for one in doctor._of_nodes([shown])] == [
        "is a member without a valid record of itself"
    ]
    assert [one.what for one in doctor._of_nodes([{**shown, "state": "up", "problems": ["late"]}])][1:] == ["late"]
    for state in ("here", "retired"):
        assert not list(doctor._of_nodes([{**shown, "state": state}]))


def test_what_concerns_retired_nodes_is_over() -> None:
    retired: dict[str, Any] = {"node": "2" * 32, "name": "n01", "state": "retired", "body": {}, "problems": []}
    here = {**retired, "node": "1" * 32, "state": "here"}
    assert not list(doctor._of_nodes([here, retired]))
    assert [one.what for one in doctor._of_nodes([here, {**retired, "state": "up"}])] == ["is the name of 2 nodes"]
    request = {"id": "r1", "written_ms": 0, "body": {"target": retired["node"]}}
    lists = {"/api/v1/requests": [request], "/api/v1/jobs": []}
    client: Any = SimpleNamespace(everything=lambda path, **_: lists[path])
    assert not list(doctor._of_work(client, {retired["node"]}))
    assert [one.where for one in doctor._of_work(client, set())] == ["request r1"]


def test_hints_name_commands_that_exist(run: Run) -> None:
    said = run("token", "revoke", "null", code=2)
    assert said.endswith("hint: vmconv fleet token list lists them\n")
    assert "VALID UNTIL" in run("token", "list")


def test_retire(run: Run, fleet: Fleet) -> None:
    assert "refused" in run("retire", "n02", "--wait", "30", code=1)
    assert "no node 'n77'" in run("retire", "n77", code=1)


def test_a_node_that_does_not_run_is_one_line(run: Run, tmp_path: Path) -> None:
    assert run("nodes", "--node", str(tmp_path), code=1).startswith(f"vmconv: {tmp_path}: no node runs here\n  hint:")


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vmconv", "fleet", "demo", "--size", "8M", "--directory", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "n01 asks n02 for one more conversion: its request is queued" in done.stdout
    assert [line.split()[-1] for line in done.stdout.splitlines() if line.split()[1:2] and "yes" in line] == ["yes"] * 3
    assert done.stdout.endswith("All nodes have ended, and their directories are removed.\n")
    assert not os.listdir(tmp_path)


def test_each_verb_has_a_test() -> None:
    tested = " ".join(name for name in globals() if name.startswith("test_"))
    assert [verb for verb in VERBS if verb not in tested] == []


def test_the_help_of_each_verb_can_be_shown() -> None:
    parser = argparse.ArgumentParser()
    COMMAND.configure(parser)
    (verbs,) = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    assert verbs.choices.keys() == VERBS.keys()
    for sub in verbs.choices.values():
        assert "usage" in sub.format_help()


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yields a parser and those of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from parsers(sub)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_and_option_is_in_the_guide(verb: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "fleet.md").read_text()
    parser = argparse.ArgumentParser()
    VERBS[verb].configure(parser)
    options = {name for one in parsers(parser) for action in one._actions for name in action.option_strings[-1:]}
    assert re.search(rf"^\| `{verb}\b", page, re.MULTILINE)
    assert [name for name in options - {"--help"} if not re.search(rf"`{name}\b", page)] == []


def test_starting_imports_nothing_heavy() -> None:
    script = """
import sys
from vmconv.cli.main import main
try:
    main(["fleet", "--help"])
except SystemExit:
    heavy = ("pydantic", "fastapi", "zenoh", "numpy", "sqlite3", "ssl", "json")
    print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


NOW = datetime(2026, 11, 24, 18, 30)


@pytest.mark.parametrize(
    ("text", "then"),
    [
        ("22:00", datetime(2026, 11, 24, 22, 0)),
        ("18:30", datetime(2026, 11, 25, 18, 30)),
        ("6:05", datetime(2026, 11, 25, 6, 5)),
        ("2026-12-24T18:00", datetime(2026, 12, 24, 18, 0)),
    ],
)
def test_times_of_day_are_the_next_ones(text: str, then: datetime) -> None:
    assert moment(text, NOW) == then


@pytest.mark.parametrize("text", ["25:00", "12:60", "noon", "2020-01-01T00:00"])
def test_invalid_times_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--at"):
        moment(text, NOW)


@pytest.mark.parametrize(
    ("milliseconds", "said"),
    [
        (None, "never"),
        (10, "now"),
        (5_000, "5 s"),
        (252_000, "4 min 12 s"),
        (7_200_000, "2 h"),
        (90_061_000, "1 d 1 h"),
    ],
)
def test_ages(milliseconds: int | None, said: str) -> None:
    assert age_text(milliseconds) == said


def test_differences_are_fields() -> None:
    before: dict[str, Any] = {"a": 1, "b": {"c": "x", "d": [1]}, "hash": "s1", "e": None}
    after: dict[str, Any] = {"a": 1, "b": {"c": "y", "d": [1, 2]}, "hash": "s2", "f": "new"}
    found = {one.field: (one.before, one.after) for one in differences(before, after)}
    assert found == {"b.c": ("x", "y"), "b.d": ("[1]", "[1, 2]"), "e": ("null", None), "f": (None, "new")}
    assert [one.field for one in differences(None, {"x": 1})] == ["x"]
    assert differences(before, before) == []


def test_shared_storage_is_converted_by_all_that_are_appointed(run: Run, fleet: Fleet) -> None:
    here, other = fleet.here, fleet.other
    record = here.service.view().get(other.id, "datastore", "ds")
    assert record
    shared = {name: record.body[name] for name in ("path", "storage", "owner")}
    here.write(Change("datastore", "mine", shared))
    asked = ("datastore", "appoint", "ds", "--of", "n02", "--wait", "30", "--nodes")
    assert run(*asked, "n01").startswith("datastore ds is converted by its owner and n01 (")
    here.body_when(other.id, "datastore", "ds", lambda one: one.body.get("converters") == [here.id])
    run("convert", "--select", "format=raw", "--to", "qcow2", "--yes", "--wait", "30")
    (job,) = here.service.view().find("job", here.id)
    assert (job.body["of"], job.body["datastore"]) == (other.id, "mine")
    here.until(lambda: len(here.service.view().find("job", other.id)) == 1)
    assert run(*asked, "none").startswith("datastore ds is converted by its owner (")
    said = run("datastore", "appoint", "mine", "--wait", "30", "--nodes", "n02", code=1)
    assert f"datastore mine is not this node's to convert: it belongs to {other.id}" in said
