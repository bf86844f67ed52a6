"""Fan-out: many containers of one payload, made as one; each lives without the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk, process_io
from vmconv.cli import main as cli
from vmconv.errors import PlanError, UsageError, VmconvError, ZeroCopyError
from vmconv.io.known import qemu_name
from vmconv.io.opener import Opener
from vmconv.io.registry import installed

SIZE = 24 * MIB
FORMATS = sorted(name for name, one in installed().formats.items() if one.can_write and one.can_read and name != "raw")


@pytest.fixture
def golden(reflink_dir: Path) -> Path:
    """A raw disk on a filesystem that shares."""
    return make_disk(reflink_dir / "golden.raw", SIZE, pieces=300)


def used(directory: Path) -> int:
    """Returns the bytes that are taken from the filesystem, once all it has to do is done."""
    os.sync()
    space = os.statvfs(directory)
    return (space.f_blocks - space.f_bfree) * space.f_frsize


def images(results: tuple[vmconv.Result, ...]) -> list[tuple[str, str]]:
    return [(result.target, result.target_format) for result in results]


def test_all_formats_share_one_payload(golden: Path, qemu_img: QemuImg) -> None:
    results = vmconv.fanout(str(golden), FORMATS, directory=str(golden.parent), zero_copy="require")
    assert [result.target_format for result in results] == FORMATS
    for path, name in images(results):
        assert Path(path).name == f"golden{installed().formats[name].suffixes[0]}"
        assert vmconv.compare(str(golden), path)
        assert vmconv.prove(str(golden), path)
        qemu_img("compare", "-f", "raw", "-F", qemu_name(name), golden, path)
    assert {result.totals.copied for result in results} == {0}
    assert all(result.totals.shared > 0 for result in results)


def test_all_together_take_the_space_of_one(golden: Path) -> None:
    before = used(golden.parent)
    results = vmconv.fanout(str(golden), FORMATS, directory=str(golden.parent))
    grown = used(golden.parent) - before
    written = sum(result.totals.written for result in results)
    payload = results[0].totals.shared
    assert payload > 12 * MIB
    # What filesystems need for themselves: maps of the extents, blocks that are not full.
    assert grown < written + 2 * MIB, (grown, written, payload)


def test_any_can_be_deleted_without_the_others_noticing(golden: Path, qemu_img: QemuImg) -> None:
    with golden.open("rb") as file:
        content = file.read()
    left = dict(images(vmconv.fanout(str(golden), FORMATS, directory=str(golden.parent))))
    golden.unlink()
    while left:
        gone = next(iter(left))
        for path, name in left.items():
            back = golden.with_name("back.raw")
            qemu_img("convert", "-f", qemu_name(name), "-O", "raw", path, back)
            assert back.read_bytes() == content, (path, gone)
        Path(gone).unlink()
        del left[gone]
        os.sync()


def test_options_are_for_one_format_each(golden: Path) -> None:
    options = {"qcow2": {"cluster_size": "4K"}, "vpc": {"subformat": "fixed"}}
    results = vmconv.fanout(str(golden), ["qcow2", "vhd", "qed"], directory=str(golden.parent), options=options)
    qcow2, vhd, _ = (vmconv.info(result.target) for result in results)
    assert qcow2["cluster-size"] == 4096
    assert vhd["format-specific"]["data"]["subformat"] == "fixed"


def test_the_source_is_planned_once(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = Opener.image

    def counting(self: Opener, path: str, *arguments: Any, **more: Any) -> Any:
        opened.append(path)
        return real(self, path, *arguments, **more)

    monkeypatch.setattr(Opener, "image", counting)
    before = process_io()
    vmconv.fanout(str(golden), FORMATS, directory=str(golden.parent), zero_copy="require")
    assert opened == [str(golden)]
    # Nothing of the payload is read: reading back metadata, and nothing else.
    assert process_io()["read_bytes"] - before["read_bytes"] < 4 * MIB


def test_a_chain_is_flattened_into_each(golden: Path, qemu_img: QemuImg) -> None:
    top = golden.with_name("top.qcow2")
    qemu_img("create", "-f", "qcow2", "-b", golden.name, "-F", "raw", top)
    results = vmconv.fanout(str(top), ["vmdk", "vdi"], directory=str(golden.parent), zero_copy="require")
    assert [Path(result.target).name for result in results] == ["top.vmdk", "top.vdi"]
    assert all(vmconv.compare(str(golden), result.target) for result in results)


def test_chains_can_be_made_of_a_chain(golden: Path, qemu_img: QemuImg) -> None:
    top = golden.with_name("top.qcow2")
    qemu_img("create", "-f", "qcow2", "-b", golden.name, "-F", "raw", top)
    results = vmconv.fanout(str(top), ["vmdk", "vhdx"], directory=str(golden.parent), chain=True)
    assert [result.layers for result in results] == [("golden.vmdk",), ("golden.vhdx",)]
    assert all(vmconv.compare(str(golden), result.target) for result in results)


# All or none


def refused(golden: Path, error: type[VmconvError], match: str, formats: list[str], **request: Any) -> None:
    before = {path: path.lstat().st_mtime_ns for path in golden.parent.iterdir()}
    with pytest.raises(error, match=match):
        vmconv.fanout(str(golden), formats, directory=str(golden.parent), **request)
    assert before == {path: path.lstat().st_mtime_ns for path in golden.parent.iterdir()}


def test_an_existing_target_prevents_all(golden: Path) -> None:
    golden.with_name("golden.vhdx").write_bytes(b"old")
    refused(golden, PlanError, r"golden\.vhdx: already exists", ["qcow2", "vhdx", "vmdk"])
    results = vmconv.fanout(str(golden), ["qcow2", "vhdx", "vmdk"], directory=str(golden.parent), force=True)
    assert all(vmconv.compare(str(golden), result.target) for result in results)


def test_the_source_is_not_among_them(golden: Path) -> None:
    refused(golden, PlanError, r"golden\.raw: is part of the source", ["qcow2", "raw"], force=True)


def test_one_format_twice_is_refused(golden: Path) -> None:
    refused(golden, PlanError, "would be made twice", ["qcow2", "vmdk", "qcow2"])


def test_a_disk_too_large_for_one_target_is_refused_for_all(golden: Path) -> None:
    os.truncate(golden, 3 << 40)
    refused(golden, PlanError, "VHD cannot hold", ["qcow2", "vhd"])


def test_a_format_that_is_not_installed_is_refused_by_name(golden: Path) -> None:
    refused(golden, UsageError, "'qcow9' is not installed", ["qcow2", "qcow9"])
    refused(golden, UsageError, "no format", [])
    refused(golden, UsageError, "options for vmdk", ["qcow2"], options={"vmdk": {"hwversion": "7"}})


def test_a_link_that_leads_elsewhere_is_refused(golden: Path, tmp_path: Path) -> None:
    golden.with_name("golden.vmdk").symlink_to(tmp_path / "golden.vmdk")
    refused(golden, PlanError, "is not in the directory of the other targets", ["qcow2", "vmdk"])


def test_one_copied_target_fails_zero_copy_for_all(golden: Path) -> None:
    options = {"vmdk": {"subformat": "streamOptimized"}}
    refused(golden, ZeroCopyError, r"golden\.vmdk: .* bytes", ["qcow2", "vmdk"], options=options, zero_copy="require")


KILLED = """
import os, signal, sys
from vmconv import api
from vmconv.backends.files import FileOutput

real, calls = FileOutput.finish, 0

def dying(self):
    global calls
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self)

FileOutput.finish = dying
api.fanout(sys.argv[1], ["qcow2", "vmdk", "vhdx", "vdi"], directory=sys.argv[2])
"""


def test_a_killed_run_makes_no_target_and_the_next_cleans_up(golden: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(golden), str(golden.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not [name for name in os.listdir(golden.parent) if name != golden.name and not name.endswith(".tmp")]
    vmconv.fanout(str(golden), ["qcow2", "vmdk", "vhdx", "vdi"], directory=str(golden.parent))
    assert len(os.listdir(golden.parent)) == 5


# The command line


def test_the_command_line_makes_all(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = golden.parent / "published"
    there.mkdir()
    arguments = ["fanout", str(golden), "--to", "qcow2,vpc", "--directory", str(there), "-o", "qcow2.cluster_size=2M"]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{there}/golden.qcow2: shared ")
    assert lines[1].startswith(f"{there}/golden.vhd: shared ")
    assert lines[2].startswith("2 images in ")
    assert vmconv.info(str(there / "golden.qcow2"))["cluster-size"] == 2 * MIB
    assert cli.main([*arguments, "--force", "--output", "json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [file["name"] for file in events[0]["files"]] == ["golden.qcow2", "golden.vhd"]
    results = [event for event in events if event["event"] == "result"]
    assert [result["target_format"] for result in results] == ["qcow2", "vhd"]
    shared = sum(result["totals"]["shared"] for result in results)
    assert shared == events[0]["shared"] > 0


def test_an_option_must_name_its_format(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fanout", str(golden), "--to", "qcow2", "-o", "cluster_size=2M"]) == 2
    assert "write FORMAT.cluster_size=2M" in capsys.readouterr().err
    assert cli.main(["fanout", str(golden), "--to", "qcow2", "-o", "qcow2.colour=red", "--output", "json"]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["event"] == "error"
