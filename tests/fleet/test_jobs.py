"""Conversions by a node: from a record to a file, also when they are cancelled, killed, or must not be."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fleet.in_memory import Node, nodes
from support import domains
from support.crash import KILLED, in_child, killed_at
from support.disks import MIB, QemuImg, make_disk
from vmconv.api import compare, machine_info
from vmconv.backends import naming
from vmconv.backends.targets import open_directory
from vmconv.backends.temporary import Temporary
from vmconv.errors import VmconvError
from vmconv.system.linux import generation
from vmconv_fleet.catalogue.places import disk_id
from vmconv_fleet.jobs import run, worker
from vmconv_fleet.jobs.journal import JobJournal
from vmconv_fleet.jobs.runner import MAX_ATTEMPTS, JobRunner
from vmconv_fleet.replication.clock import wall_ms
from vmconv_fleet.replication.records import Change, Record

HERE = Path(__file__).parent
A = disk_id("ds", "a.raw")


@pytest.fixture
def datastore(tmp_path: Path) -> Path:
    directory = tmp_path / "images"
    directory.mkdir()
    make_disk(directory / "a.raw", 4 * MIB)
    return directory


@pytest.fixture
def node(tmp_path: Path, datastore: Path) -> Iterator[Node]:
    with nodes(1, tmp_path) as (one,):
        catalogue(one, datastore, "a.raw")
        yield one


def catalogue(node: Node, datastore: Path, *names: str) -> None:
    bodies = [Change("disk", disk_id("ds", name), {"datastore": "ds", "name": name}) for name in names]
    node.write(Change("datastore", "ds", {"path": str(datastore)}), *bodies)


def job(disk: str = A, **more: Any) -> dict[str, Any]:
    return {"state": "queued", "disk": disk, "datastore": "ds", "source": "a.raw", "format": "qcow2", **more}


@contextmanager
def runner(node: Node, *command: str) -> Iterator[JobRunner]:
    made = JobRunner(node.service, str(node.directory), **({"command": command} if command else {}))
    made.start()
    try:
        yield made
    finally:
        made.stop()


def ended(node: Node, identifier: str) -> Mapping[str, Any]:
    """Returns the body of a job once it has ended."""
    states = ("done", "failed", "cancelled")
    return node.body_when(node.id, "job", identifier, lambda one: one.body["state"] in states).body


def states(node: Node, identifier: str) -> list[str]:
    """Returns a list that gets each state of a job as it is written."""
    seen: list[str] = []

    def note(records: list[Record]) -> None:
        for one in records:
            if (one.kind, one.id) == ("job", identifier) and one.body.get("state") not in seen[-1:]:
                seen.append(one.body.get("state", "gone"))

    node.service.subscribe(note)
    return seen


def test_a_job_is_done(node: Node, datastore: Path) -> None:
    seen = states(node, "j1")
    node.write(Change("job", "j1", job()))
    with runner(node):
        body = ended(node, "j1")
        assert node.body_when(node.id, "datastore", "ds", lambda one: bool(one.body.get("scan_asked_ms")))
    assert seen == ["queued", "planned", "running", "done"]
    assert (body["file"], body["attempts"], body["state"]) == ("a.qcow2", 1, "done")
    plan = body["plan"]
    assert plan["shared"] + plan["copied"] > 0
    assert plan["written"] > 0
    assert plan["files"] == ["a.qcow2"]
    assert body["progress"]["done"] == body["progress"]["total"] == plan["copied"] + plan["written"]
    lines = [one["text"].partition(":")[0] for one in body["log"]]
    assert [re.sub(r"[\d.]+ \w+$", "N", line) for line in lines] == [
        "started, attempt 1",
        "planned a.qcow2",
        "copies and writes N",
        "done after N",
    ]
    assert compare(str(datastore / "a.raw"), str(datastore / "a.qcow2"))
    assert not os.listdir(node.directory / "jobs")


def test_a_dry_run_makes_nothing(node: Node, datastore: Path) -> None:
    node.write(Change("job", "j1", job(dry_run=True)))
    with runner(node):
        body = node.body_when(node.id, "job", "j1", lambda one: bool(one.body.get("ended_ms"))).body
    assert (body["state"], body["file"]) == ("planned", "a.qcow2")
    assert body["plan"]["written"] > 0
    assert "p" in body["plan"]["source"]["parts"]
    assert [one["title"] for one in body["plan"]["strips"]] == ["a.qcow2"]
    assert os.listdir(datastore) == ["a.raw"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"format": "nosuch"}, "format 'nosuch' is not installed"),
        ({"target": "a.raw"}, "a.raw: already exists"),
        ({"target": "../b.qcow2"}, "is not the name of a file"),
        ({"options": {"cluster_size": "3"}}, "cluster_size"),
        ({"disk": "d9"}, "disk d9 no longer exists"),
        ({"target_datastore": "gone"}, "datastore gone no longer exists"),
    ],
)
def test_a_job_that_cannot_be_done_says_why(node: Node, datastore: Path, more: dict[str, Any], said: str) -> None:
    node.write(Change("job", "j1", job(**more)))
    with runner(node):
        body = ended(node, "j1")
    assert body["state"] == "failed"
    assert said in body["error"]
    assert "\n" not in body["error"]
    assert os.listdir(datastore) == ["a.raw"]


def test_zero_copy_is_required_before_anything_is_written(node: Node, ext4_dir: Path) -> None:
    make_disk(ext4_dir / "a.raw", MIB)
    catalogue(node, ext4_dir, "a.raw")
    node.write(Change("job", "j1", job(zero_copy="require")))
    with runner(node):
        body = ended(node, "j1")
    assert body["state"] == "failed"
    assert "would have to be copied because ext4" in body["error"]
    assert os.listdir(ext4_dir) == ["a.raw"]


def test_blocks_are_shared_where_storage_can(node: Node, xfs_dir: Path) -> None:
    make_disk(xfs_dir / "a.raw", 4 * MIB)
    catalogue(node, xfs_dir, "a.raw")
    node.write(Change("job", "j1", job(zero_copy="require")))
    with runner(node):
        body = ended(node, "j1")
    assert (body["state"], body["plan"]["copied"], body["plan"]["backend"]) == ("done", 0, "reflink")
    assert body["plan"]["shared"] > 0


# Nothing outside of the datastores


def test_a_link_out_of_the_datastore_is_not_converted(node: Node, datastore: Path, tmp_path: Path) -> None:
    make_disk(tmp_path / "secret.raw", MIB)
    (datastore / "link.raw").symlink_to(tmp_path / "secret.raw")
    (datastore / "directory").symlink_to(tmp_path)
    names = ("link.raw", "directory/secret.raw", "../secret.raw")
    catalogue(node, datastore, *names)
    node.write(*(Change("job", f"j{n}", job(disk_id("ds", name))) for n, name in enumerate(names)))
    with runner(node):
        for number in range(len(names)):
            body = ended(node, f"j{number}")
            assert body["state"] == "failed"
            assert "lies outside the datastores" in body["error"]
    assert sorted(os.listdir(datastore)) == ["a.raw", "directory", "link.raw"]


def test_a_chain_out_of_the_datastores_is_not_converted(
    node: Node, datastore: Path, tmp_path: Path, qemu_img: QemuImg
) -> None:
    make_disk(tmp_path / "secret.raw", MIB)
    qemu_img("create", "-q", "-f", "qcow2", "-b", tmp_path / "secret.raw", "-F", "raw", datastore / "top.qcow2")
    catalogue(node, datastore, "top.qcow2")
    node.write(Change("job", "j1", job(disk_id("ds", "top.qcow2"), format="raw")))
    with runner(node):
        body = ended(node, "j1")
    assert body["state"] == "failed"
    assert "lies outside" in body["error"]
    assert "vmconv fleet datastore add" in body["hint"]
    assert not (datastore / "top.raw").exists()


@pytest.mark.parametrize(
    ("hint", "kept"),
    [
        ("install it", True),
        ("--disk-format vhdx", True),
        ("omit --since: vmconv reads both disks", False),
        ("use --verify=bytes", False),
    ],
)
def test_hints_of_jobs_name_no_options_that_jobs_do_not_have(hint: str, kept: bool) -> None:
    assert worker._hint(VmconvError("x", hint=hint)) == (hint if kept else None)
    assert worker._hint(VmconvError("x")) is None


def test_a_chain_over_two_datastores_is_converted(
    node: Node, datastore: Path, tmp_path: Path, qemu_img: QemuImg
) -> None:
    more = tmp_path / "more"
    more.mkdir()
    qemu_img("create", "-q", "-f", "qcow2", "-b", datastore / "a.raw", "-F", "raw", more / "top.qcow2")
    top = disk_id("more", "top.qcow2")
    node.write(
        Change("datastore", "more", {"path": str(more)}),
        Change("disk", top, {"datastore": "more", "name": "top.qcow2"}),
        Change("job", "j1", {**job(top), "datastore": "more", "format": "vhdx", "target_datastore": "ds"}),
    )
    with runner(node):
        assert ended(node, "j1")["state"] == "done"
    assert (datastore / "top.vhdx").exists()


def test_a_link_in_the_targets_place_is_not_followed(node: Node, datastore: Path, tmp_path: Path) -> None:
    (datastore / "a.qcow2").symlink_to(tmp_path / "elsewhere")
    node.write(Change("job", "j1", job()))
    with runner(node):
        body = ended(node, "j1")
    assert "already exists" in body["error"]
    assert not (tmp_path / "elsewhere").exists()


# When and how many


def test_a_job_waits_for_its_time(node: Node, datastore: Path) -> None:
    node.write(
        Change("job", "late", job(at_ms=wall_ms() + 3_600_000, target="late.qcow2")), Change("job", "now", job())
    )
    with runner(node):
        assert ended(node, "now")["state"] == "done"
        late = node.service.view().get(node.id, "job", "late")
        assert late
        assert late.body["state"] == "queued"
        node.write(Change("job", "late", {**late.body, "at_ms": wall_ms()}))
        assert ended(node, "late")["state"] == "done"


def gated(gate: str, tmp_path: Path) -> tuple[str, ...]:
    """Returns the command of a worker that stops at a gate."""
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.go")
    return sys.executable, str(HERE / "gated_worker.py"), gate, str(tmp_path / "pipe")


def arrived(tmp_path: Path) -> None:
    """Waits until a worker is at the gate."""
    assert (tmp_path / "pipe").read_text() == "here\n"


def test_no_more_run_at_a_time_than_they_may(node: Node, datastore: Path, tmp_path: Path) -> None:
    node.write(Change("policy", "conversion", {"max_parallel": 3}))
    batch = {"batch": "b1", "max_parallel": 1}
    node.write(*(Change("job", f"j{n}", job(target=f"t{n}.qcow2", created_ms=n) | batch) for n in range(2)))
    with runner(node, *gated("begun", tmp_path)):
        arrived(tmp_path)
        waiting = node.service.view().get(node.id, "job", "j1")
        assert waiting
        assert "attempts" not in waiting.body
        (tmp_path / "pipe.go").write_text("")
        assert ended(node, "j0")["state"] == "done"
        arrived(tmp_path)
        (tmp_path / "pipe.go").write_text("")
        assert ended(node, "j1")["state"] == "done"


def closed_window() -> str:
    """Returns a window that neither is open nor opens soon."""
    now = datetime.now(UTC)
    return f"{now + timedelta(hours=11):%H:%M}-{now + timedelta(hours=12):%H:%M}"


def test_a_job_waits_for_its_window_and_for_that_of_its_node(node: Node, datastore: Path) -> None:
    node.write(Change("job", "j1", job(between=closed_window())), Change("job", "j2", job(target="b.qcow2")))
    node.write(Change("policy", "conversion", {"between": closed_window()}))
    node.write(Change("job", "plan", job(dry_run=True, target="c.qcow2")))
    with runner(node):
        node.body_when(node.id, "job", "plan", lambda one: bool(one.body.get("ended_ms")))
        for name in ("j1", "j2"):
            waiting = node.service.view().get(node.id, "job", name)
            assert waiting
            assert "attempts" not in waiting.body
        node.write(Change("policy", "conversion", {}))
        assert ended(node, "j2")["state"] == "done"
        node.write(Change("job", "j1", job()))
        assert ended(node, "j1")["state"] == "done"


def test_a_job_that_runs_when_its_window_ends_is_finished(node: Node, datastore: Path, tmp_path: Path) -> None:
    node.write(Change("job", "j1", job()))
    with runner(node, *gated("begun", tmp_path)):
        arrived(tmp_path)
        node.write(Change("policy", "conversion", {"between": closed_window()}))
        (tmp_path / "pipe.go").write_text("")
        assert ended(node, "j1")["state"] == "done"


def test_a_window_with_a_zone_that_is_gone_fails_its_job(node: Node, datastore: Path) -> None:
    node.write(Change("job", "j1", job(between="00:00-23:59 No/Where")))
    with runner(node):
        assert "No/Where: is not a time zone" in ended(node, "j1")["error"]


def test_no_more_run_in_a_datastore_than_it_allows(node: Node, datastore: Path, tmp_path: Path) -> None:
    node.write(Change("policy", "conversion", {"max_parallel": 3, "datastore_parallel": {"ds": 1}}))
    node.write(*(Change("job", f"j{n}", job(target=f"t{n}.qcow2", created_ms=n)) for n in range(2)))
    with runner(node, *gated("begun", tmp_path)):
        arrived(tmp_path)
        waiting = node.service.view().get(node.id, "job", "j1")
        assert waiting
        assert "attempts" not in waiting.body
        (tmp_path / "pipe.go").write_text("")
        arrived(tmp_path)
        (tmp_path / "pipe.go").write_text("")
        assert ended(node, "j1")["state"] == "done"


def test_copied_bytes_take_the_time_that_the_bandwidth_allows(node: Node, ext4_dir: Path) -> None:
    make_disk(ext4_dir / "a.raw", 4 * MIB)
    catalogue(node, ext4_dir, "a.raw")
    rate = 8 * MIB
    node.write(Change("policy", "conversion", {"bandwidth": {"ds": rate, "other": 1 << 16}}))
    node.write(Change("job", "j1", job()))
    with runner(node):
        body = ended(node, "j1")
    copied = body["plan"]["copied"] + body["plan"]["written"]
    assert copied > MIB
    assert body["seconds"] >= copied / rate * 0.99
    (file,) = (node.directory / "jobs" / "bandwidth").iterdir()
    assert file.name == "ds"


def test_shared_bytes_are_free(node: Node, xfs_dir: Path) -> None:
    make_disk(xfs_dir / "a.raw", 4 * MIB)
    catalogue(node, xfs_dir, "a.raw")
    node.write(Change("policy", "conversion", {"bandwidth": {"ds": MIB}}))
    node.write(Change("job", "j1", job(zero_copy="require")))
    with runner(node):
        body = ended(node, "j1")
    assert body["plan"]["shared"] > MIB
    assert body["progress"]["total"] == body["plan"]["written"] < MIB


# Cancelled, killed


def test_a_job_in_the_middle_is_cancelled(node: Node, datastore: Path, tmp_path: Path) -> None:
    node.write(Change("job", "j1", job()))
    with runner(node, *gated("begun", tmp_path)):
        arrived(tmp_path)
        # What is being made has no name yet.
        assert os.listdir(datastore) == ["a.raw"]
        body = node.service.view().get(node.id, "job", "j1")
        assert body
        node.write(Change("job", "j1", {**body.body, "cancel": True}))
        assert ended(node, "j1")["state"] == "cancelled"
    assert os.listdir(datastore) == ["a.raw"]


def test_a_late_cancellation_has_no_effect(node: Node, datastore: Path, tmp_path: Path) -> None:
    node.write(Change("job", "j1", job()))
    with runner(node, *gated("made", tmp_path)):
        arrived(tmp_path)
        assert (datastore / "a.qcow2").exists()
        body = node.service.view().get(node.id, "job", "j1")
        assert body
        node.write(Change("job", "j1", {**body.body, "cancel": True}))
        assert ended(node, "j1")["state"] == "done"


def test_a_node_that_ends_leaves_nothing_and_does_it_again(node: Node, datastore: Path, tmp_path: Path) -> None:
    node.write(Change("job", "j1", job()))
    with runner(node, *gated("begun", tmp_path)):
        arrived(tmp_path)
    assert os.listdir(datastore) == ["a.raw"]
    record = node.service.view().get(node.id, "job", "j1")
    assert record
    assert record.body["state"] in ("planned", "running")
    with runner(node):
        body = ended(node, "j1")
    assert (body["state"], body["attempts"]) == ("done", 2)


def test_a_worker_that_dies_fails_its_job(node: Node, datastore: Path) -> None:
    node.write(Change("job", "j1", job()))
    with runner(node, sys.executable, "-c", "import os; print('trouble', flush=True); os.kill(os.getpid(), 9)"):
        body = ended(node, "j1")
    assert (body["state"], body["error"]) == ("failed", "the worker ended with signal 9 trouble")


def test_a_worker_that_is_dead_before_it_gets_its_task_fails_its_job(
    node: Node, datastore: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_line = run.Run._send_line

    def late(self: run.Run, child: subprocess.Popen[bytes], line: str) -> None:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        send_line(self, child, line)

    monkeypatch.setattr(run.Run, "_send_line", late)
    node.write(Change("job", "j1", job()))
    with runner(node, sys.executable, "-c", "print('trouble')"):
        body = ended(node, "j1")
    assert (body["state"], body["error"]) == ("failed", "the worker ended with code 0 trouble")


def killed(tmp_path: Path, datastore: Path, gate: str) -> int:
    """Kills a node, and nothing else, while its worker is at a gate; returns the inode of the target, 0 without one."""
    gated(gate, tmp_path)
    program = [sys.executable, str(HERE / "node_to_kill.py"), str(tmp_path), gate, str(tmp_path / "pipe")]
    process = subprocess.Popen(program, env={**os.environ, "PYTHONPATH": str(HERE.parent)})
    try:
        arrived(tmp_path)
        target = datastore / "a.qcow2"
        return target.stat().st_ino if target.exists() else 0
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        if gate == "made":
            # What the worker has left to do is to tell of it, and nobody is there.
            (tmp_path / "pipe.go").write_text("")


@contextmanager
def node_again(tmp_path: Path) -> Iterator[Node]:
    """Yields the node once more, on the database that its predecessor left."""
    node = Node(1, tmp_path, {})
    try:
        node.start()
        yield node
    finally:
        node.service.close()


def prepared(tmp_path: Path, datastore: Path) -> None:
    """Leaves a node with one job to do."""
    with node_again(tmp_path) as node:
        catalogue(node, datastore, "a.raw")
        node.write(Change("job", "j1", job()))


def test_a_node_killed_in_the_middle_does_it_again(tmp_path: Path, datastore: Path) -> None:
    prepared(tmp_path, datastore)
    assert killed(tmp_path, datastore, "begun") == 0
    with node_again(tmp_path) as node, runner(node):
        body = ended(node, "j1")
    assert (body["state"], body["attempts"], body.get("recovered")) == ("done", 2, None)
    assert "interrupted: the node ended" in [one["text"] for one in body["log"]]
    assert sorted(os.listdir(datastore)) == ["a.qcow2", "a.raw"]
    assert compare(str(datastore / "a.raw"), str(datastore / "a.qcow2"))


def test_a_node_killed_after_it_was_done_finds_it_done(tmp_path: Path, datastore: Path) -> None:
    prepared(tmp_path, datastore)
    inode = killed(tmp_path, datastore, "made")
    assert inode
    with node_again(tmp_path) as node, runner(node):
        body = ended(node, "j1")
    assert (body["state"], body["attempts"], body["recovered"]) == ("done", 1, True)
    assert (datastore / "a.qcow2").stat().st_ino == inode
    assert sorted(os.listdir(datastore)) == ["a.qcow2", "a.raw"]


def test_a_file_of_the_same_name_that_the_job_did_not_make_is_not_its_own(tmp_path: Path, datastore: Path) -> None:
    prepared(tmp_path, datastore)
    killed(tmp_path, datastore, "begun")
    (datastore / "a.qcow2").write_bytes(b"somebody else's")
    with node_again(tmp_path) as node, runner(node):
        body = ended(node, "j1")
    assert (body["state"], body["error"]) == ("failed", "a.qcow2: already exists")
    assert (datastore / "a.qcow2").read_bytes() == b"somebody else's"


def test_a_file_that_has_got_the_inode_of_what_the_job_made_is_not_its_own(tmp_path: Path) -> None:
    """What was being made is gone with its worker, and the filesystem gives its number to the next file."""
    target, journal = tmp_path / "a.qcow2", JobJournal(str(tmp_path / "journal"))
    with open(target, "wb") as file:
        if generation(file.fileno()) is None:
            pytest.skip("this filesystem does not tell generations of inodes")
        journal.write(str(target), tmp_path.stat(), [file.fileno()])
    inode = target.stat().st_ino
    assert journal.made() == str(target)
    for _ in range(1000):
        target.unlink()
        target.write_bytes(b"somebody else's")
        if target.stat().st_ino == inode:
            break
    else:
        pytest.skip("this filesystem does not use inodes again")
    assert journal.made() is None


def test_a_job_that_was_killed_while_its_files_were_named_is_completed(tmp_path: Path) -> None:
    """At each call that changes storage: the journal says that the job made its target, and all files are there."""
    names, outcomes = ["web-disk1.qcow2", "web_VARS.fd", "web.xml"], []

    def name_them(journal: JobJournal, directory: Path) -> None:
        with open_directory(str(directory)) as place:
            files = [Temporary(place, name) for name in names]
            journal.write(str(directory / names[-1]), directory.stat(), [file.descriptor for file in files])
            naming.commit(place, files, replace=False, durable=True)

    for number in itertools.count():
        directory, journal = tmp_path / str(number), JobJournal(str(tmp_path / f"journal-{number}"))
        directory.mkdir()
        code = in_child(partial(name_them, journal, directory), killed_at(number))
        target = journal.made()
        there = sorted(path.name for path in directory.iterdir() if not path.name.startswith(".vmconv-"))
        assert (target, there) in ((None, []), (str(directory / "web.xml"), sorted(names))), number
        outcomes.append(target is not None)
        if code != KILLED:
            break
    assert code == 0 and outcomes == sorted(outcomes) and outcomes.count(True) > 3


def test_a_job_that_takes_its_node_with_it_is_given_up(node: Node) -> None:
    node.write(Change("job", "j1", job(state="running", attempts=MAX_ATTEMPTS, started_ms=1)))
    with runner(node):
        body = ended(node, "j1")
    assert body["state"] == "failed"
    assert "the job was interrupted" in body["error"]


def test_a_job_that_was_to_be_cancelled_when_the_node_died_is_cancelled(node: Node, datastore: Path) -> None:
    node.write(Change("job", "j1", job(state="running", attempts=1, started_ms=1, cancel=True)))
    with runner(node):
        assert ended(node, "j1")["state"] == "cancelled"
    assert os.listdir(datastore) == ["a.raw"]


# Sources


def test_a_source_is_removed_on_request_if_no_disk_needs_it(node: Node, datastore: Path, qemu_img: QemuImg) -> None:
    make_disk(datastore / "b.raw", MIB)
    catalogue(node, datastore, "a.raw", "b.raw")
    child = {"datastore": "ds", "name": "child.qcow2", "chain": [{"name": "b.raw", "disk": disk_id("ds", "b.raw")}]}
    node.write(
        Change("policy", "conversion", {"may_remove_source": True}),
        Change("disk", "child", child),
        Change("job", "j1", job(keep_source=False)),
        Change("job", "j2", job(disk_id("ds", "b.raw"), keep_source=False)),
    )
    with runner(node):
        assert ended(node, "j1")["state"] == ended(node, "j2")["state"] == "done"
    assert sorted(os.listdir(datastore)) == ["a.qcow2", "b.qcow2", "b.raw"]
    qemu_img("check", datastore / "a.qcow2")


def test_targets_are_called_as_the_policy_has_it(node: Node, datastore: Path) -> None:
    node.write(Change("policy", "conversion", {"naming": "{stem}-{format}-{job}{suffix}"}), Change("job", "j1", job()))
    with runner(node):
        assert ended(node, "j1")["file"] == "a-qcow2-j1.qcow2"
    assert (datastore / "a-qcow2-j1.qcow2").exists()


# Machines

SHOP = disk_id("ds", "shop.xml")


@pytest.fixture
def shop(node: Node, datastore: Path) -> Path:
    """The directory of a machine that is in the catalogue."""
    domains.shop(datastore)
    node.write(Change("vm", SHOP, {"datastore": "ds", "file": "shop.xml", "name": "shop", "format": "libvirt"}))
    return datastore


def machine_job(**more: Any) -> dict[str, Any]:
    return {"state": "queued", "vm": SHOP, "datastore": "ds", "source": "shop.xml", "format": "vmx", **more}


def files(directory: Path) -> list[str]:
    """Returns the paths of all files and directories below a directory."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_a_machine_is_converted_with_its_disks(node: Node, shop: Path) -> None:
    seen = states(node, "j1")
    node.write(Change("job", "j1", machine_job()))
    with runner(node):
        body = ended(node, "j1")
        assert node.body_when(node.id, "datastore", "ds", lambda one: bool(one.body.get("scan_asked_ms")))
    assert seen == ["queued", "planned", "running", "done"], body
    assert (body["file"], body["plan"]["files"]) == ("shop.vmx/shop.vmx", ["shop-disk1.vmdk", "shop.vmx"])
    assert body["progress"]["done"] == body["progress"]["total"] > 0
    assert any(loss.startswith("watchdog i6300esb: ") for loss in body["plan"]["losses"])
    assert any(change.startswith("nics[0].model virtio -> vmxnet3: ") for change in body["plan"]["changes"])
    assert compare(str(shop / "shop.raw"), str(shop / "shop.vmx/shop-disk1.vmdk"))
    assert machine_info(shop / "shop.vmx/shop.vmx").name == "shop"
    assert not os.listdir(node.directory / "jobs")


def test_a_machine_goes_where_and_how_the_request_says(node: Node, shop: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    node.write(Change("datastore", "more", {"path": str(tmp_path / "more")}))
    more = {"target": "clone", "target_datastore": "more", "new_identity": True}
    disks = {"disk_format": "qcow2", "disk_options": {"cluster_size": "1M"}}
    node.write(Change("job", "j1", machine_job(format="libvirt", **more, **disks)))
    with runner(node):
        assert ended(node, "j1")["state"] == "done"
    assert files(tmp_path / "more") == ["clone", "clone/shop-disk1.qcow2", "clone/shop.xml"]
    assert machine_info(tmp_path / "more/clone/shop.xml").nics[0].mac is None
    assert (tmp_path / "more/clone/shop-disk1.qcow2").read_bytes()[20:24] == (20).to_bytes(4, "big")


def test_a_field_that_must_be_kept_fails_the_job(node: Node, shop: Path) -> None:
    before = files(shop)
    node.write(Change("job", "j1", machine_job(keep=["watchdog"], uuid="text")))
    with runner(node):
        body = ended(node, "j1")
    assert body["state"] == "failed" and "watchdog i6300esb would be lost" in body["error"]
    assert files(shop) == before


def test_a_machine_shares_its_blocks_where_storage_can(node: Node, xfs_dir: Path) -> None:
    domains.shop(xfs_dir)
    vm = {"datastore": "ds", "file": "shop.xml", "name": "shop"}
    node.write(Change("datastore", "ds", {"path": str(xfs_dir)}), Change("vm", SHOP, vm))
    node.write(Change("job", "j1", machine_job(format="ova", zero_copy="require")))
    with runner(node):
        body = ended(node, "j1")
    assert (body["state"], body["plan"]["copied"], body["plan"]["backend"]) == ("done", 0, "reflink"), body
    assert body["plan"]["shared"] > 0
    assert files(xfs_dir) == ["shop.ova", "shop.ova/shop.ova", "shop.raw", "shop.xml"]


def test_a_dry_run_of_a_machine_makes_nothing(node: Node, shop: Path) -> None:
    before = files(shop)
    node.write(Change("job", "j1", machine_job(dry_run=True)))
    with runner(node):
        body = node.body_when(node.id, "job", "j1", lambda one: bool(one.body.get("ended_ms"))).body
    assert (body["state"], body["file"]) == ("planned", "shop.vmx/shop.vmx")
    assert body["plan"]["losses"]
    assert files(shop) == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"format": "nosuch"}, "machine format 'nosuch' is not installed"),
        ({"strict": True}, "watchdog i6300esb would be lost"),
        ({"target": "shop.raw"}, "shop.raw: already exists"),
        ({"target": "taken"}, "taken: already exists"),
        ({"target": "link"}, "link: already exists"),
        ({"disk_format": "raw"}, "machines have no raw disks"),
        ({"zero_copy": "require"}, "would have to be copied because"),
        ({"vm": "v9"}, "vm v9 no longer exists"),
    ],
    ids=lambda value: "-".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_a_machine_that_cannot_be_converted_says_why(
    node: Node, shop: Path, ext4_dir: Path, more: dict[str, Any], said: str
) -> None:
    directory = ext4_dir / "images"
    directory.mkdir()
    domains.shop(directory)
    (directory / "taken/below").mkdir(parents=True)
    (directory / "taken/below/file").touch()
    (directory / "link").symlink_to("/nowhere")
    node.write(Change("datastore", "ds", {"path": str(directory)}), Change("job", "j1", machine_job(**more)))
    before = files(directory)
    with runner(node):
        body = ended(node, "j1")
    assert (body["state"], said in body["error"]) == ("failed", True), body["error"]
    assert "\n" not in body["error"]
    assert files(directory) == before


def test_a_machine_with_a_disk_outside_of_the_datastores_is_not_converted(
    node: Node, shop: Path, tmp_path: Path
) -> None:
    make_disk(tmp_path / "secret.raw", MIB)
    (shop / "link.raw").symlink_to(tmp_path / "secret.raw")
    for number, disk in enumerate((str(tmp_path / "secret.raw"), "../secret.raw", "link.raw")):
        (shop / "shop.xml").write_text(domains.SHOP.format(disk=disk))
        node.write(Change("job", f"j{number}", machine_job()))
        with runner(node):
            body = ended(node, f"j{number}")
        assert body["state"] == "failed"
        assert "outside" in body["error"]
    assert not (shop / "shop.vmx").exists()


def test_a_cancelled_conversion_of_a_machine_leaves_nothing(node: Node, shop: Path, tmp_path: Path) -> None:
    before = files(shop)
    node.write(Change("job", "j1", machine_job()))
    with runner(node, *gated("begun", tmp_path)):
        arrived(tmp_path)
        body = node.service.view().get(node.id, "job", "j1")
        assert body
        node.write(Change("job", "j1", {**body.body, "cancel": True}))
        assert ended(node, "j1")["state"] == "cancelled"
    assert files(shop) == before


def prepared_machine(tmp_path: Path, datastore: Path) -> None:
    """Leaves a node with a machine to convert."""
    domains.shop(datastore)
    with node_again(tmp_path) as node:
        catalogue(node, datastore, "a.raw")
        vm = Change("vm", SHOP, {"datastore": "ds", "file": "shop.xml", "name": "shop"})
        node.write(vm, Change("job", "j1", machine_job()))


@pytest.mark.parametrize(("gate", "attempts", "recovered"), [("begun", 2, None), ("made", 1, True)])
def test_a_node_killed_during_the_conversion_of_a_machine_has_it_in_the_end(
    tmp_path: Path, datastore: Path, gate: str, attempts: int, recovered: bool | None
) -> None:
    prepared_machine(tmp_path, datastore)
    killed(tmp_path, datastore, gate)
    with node_again(tmp_path) as node, runner(node):
        body = ended(node, "j1")
    assert (body["state"], body["attempts"], body.get("recovered")) == ("done", attempts, recovered), body
    assert files(datastore / "shop.vmx") == ["shop-disk1.vmdk", "shop.vmx"]
    assert compare(str(datastore / "shop.raw"), str(datastore / "shop.vmx/shop-disk1.vmdk"))
