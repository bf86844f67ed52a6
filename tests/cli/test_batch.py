"""`vmconv convert --directory`: many disks, and conversions that were done before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk
from vmconv.cli.main import main
from vmconv.conversion import batch, pipeline
from vmconv.model.sources import stamp_of

Capture = pytest.CaptureFixture[str]


def run(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def events(capsys: Capture) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def states(found: list[dict[str, Any]]) -> dict[str, str]:
    return {Path(one["source"]).name: one["state"] for one in found if one["event"] == "outcome"}


@pytest.fixture
def disks(tmp_path: Path) -> list[Path]:
    return [make_disk(tmp_path / f"disk{number}.raw", MIB, seed=number) for number in range(5)]


@pytest.mark.parametrize("jobs", [1, 3])
def test_each_disk_becomes_an_image_named_after_it(
    disks: list[Path], tmp_path: Path, jobs: int, capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert run("-O", "qcow2", "--directory", out, "--jobs", jobs, "--output", "json", *disks) == 0
    found = events(capsys)
    assert states(found) == {disk.name: "made" for disk in disks}
    assert found[-1] == {
        "event": "summary",
        "images": 5,
        "made": 5,
        "exists": 0,
        "current": 0,
        "failed": 0,
        "stopped": 0,
    }
    assert sorted(path.name for path in out.iterdir()) == [f"{disk.stem}.qcow2" for disk in disks]
    for disk in disks:
        assert vmconv.compare(disk, out / f"{disk.stem}.qcow2")


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_failure_leaves_the_others(disks: list[Path], tmp_path: Path, jobs: int, capsys: Capture) -> None:
    broken = tmp_path / "broken.qcow2"
    broken.write_bytes(b"QFI\xfb" + bytes(100))
    out = tmp_path / "out"
    assert run("-O", "vmdk", "--directory", out, "--jobs", jobs, disks[0], broken, disks[1]) == 5
    printed = capsys.readouterr()
    assert "broken.qcow2" in printed.err and "3 images: 2 made, 1 failed" in printed.out
    assert sorted(path.name for path in out.iterdir()) == ["disk0.vmdk", "disk1.vmdk"]
    assert run("-O", "vmdk", "--directory", tmp_path / "none", broken) == 1
    assert not (tmp_path / "none").exists()


def test_a_run_is_resumed_by_running_it_again(disks: list[Path], tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert run("-O", "vhdx", "--directory", out, *disks[:2]) == 0
    capsys.readouterr()
    assert run("-O", "vhdx", "--directory", out, "--skip-existing", "--output", "json", *disks) == 0
    assert states(events(capsys)) == {disk.name: "exists" if disk in disks[:2] else "made" for disk in disks}
    # As for a single target that exists; with some of them made it is a partial failure.
    assert run("-O", "vhdx", "--directory", out, *disks) == 4
    assert capsys.readouterr().err.count("--skip-existing and --if-needed leave it") == len(disks)


def test_a_tree_is_converted_into_a_tree_of_the_same_shape(tmp_path: Path, qemu_img: QemuImg, capsys: Capture) -> None:
    tree, out = tmp_path / "tree", tmp_path / "out"
    (tree / "a" / "b").mkdir(parents=True)
    disk = make_disk(tree / "disk.raw", 8 * MIB)
    for name, subformat in (("flat", "monolithicFlat"), ("split", "twoGbMaxExtentSparse")):
        qemu_img("convert", "-O", "vmdk", "-o", f"subformat={subformat}", disk, tree / "a" / f"{name}.vmdk")
    qemu_img("create", "-f", "qcow2", "-b", "../split.vmdk", "-F", "vmdk", tree / "a" / "b" / "top.qcow2")
    (tree / "notes.txt").write_text("no disk")
    (tree / "linked.raw").symlink_to(disk)
    given = ("-O", "vdi", "--directory", out, "--allow-external", tree, tree)
    assert run(*given) == 2
    assert run("--recursive", "--output", "json", *given) == 0
    found = events(capsys)
    assert states(found) == dict.fromkeys(("disk.raw", "flat.vmdk", "split.vmdk", "top.qcow2"), "made")
    made = sorted(str(path.relative_to(out)) for path in out.rglob("*.vdi"))
    assert made == ["a/b/top.vdi", "a/flat.vdi", "a/split.vdi", "disk.vdi"]
    for name in made:
        assert vmconv.compare(disk, out / name)


def test_two_disks_of_one_name_are_refused_before_anything_is_made(disks: list[Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    same = make_disk(tmp_path / "other" / "disk0.img", MIB)
    assert run("-O", "qcow2", "--directory", tmp_path / "out", *disks, same) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("linked", ["tree/b", "a.qcow2"])
def test_two_disks_that_links_give_one_target_are_refused(tmp_path: Path, linked: str, capsys: Capture) -> None:
    tree, out = tmp_path / "tree", tmp_path / "out"
    for number, name in enumerate(["a.raw", "b.raw", "tree/a/disk.raw", "tree/b/disk.raw"]):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        make_disk(tree / name, MIB, seed=number)
    (out / "tree" / "a").mkdir(parents=True)
    (out / linked).symlink_to("a" if linked == "tree/b" else "b.qcow2")
    assert run("-O", "qcow2", "--recursive", "--force", "--directory", out, tree) == 2
    assert "would both become" in capsys.readouterr().err
    assert not list(out.rglob("disk.qcow2"))


def test_an_empty_directory_is_not_the_current_one(
    disks: list[Path], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(disks[0].parent)
    assert run("-O", "qcow2", "--directory", "", disks[0]) == 2
    assert "--directory: '' is empty" in capsys.readouterr().err


@pytest.mark.parametrize("jobs", [1, 2])
def test_no_target_replaces_another_source_of_the_run(
    tmp_path: Path, qemu_img: QemuImg, jobs: int, capsys: Capture
) -> None:
    """Neither a source itself, nor the base or the extent of one."""
    out = tmp_path / "in" / "out"
    out.mkdir(parents=True)
    for number, name in enumerate(["a.vmdk", "base.vmdk", "out/a.vmdk", "out/base.vmdk"]):
        raw = make_disk(tmp_path / "disk.raw", MIB, seed=number)
        qemu_img("convert", "-O", "vmdk", raw, out.parent / name)
    qemu_img("create", "-q", "-f", "vmdk", "-b", "out/base.vmdk", "-F", "vmdk", out.parent / "top.vmdk")
    before = {path: path.read_bytes() for path in out.parent.rglob("*.vmdk")}
    arguments = ["-O", "vmdk", "--directory", out, "--force", "--jobs", jobs, "--output", "json"]
    assert run(*arguments, *(out.parent / name for name in ("a.vmdk", "base.vmdk", "top.vmdk", "out/a.vmdk"))) == 2
    assert run(*arguments, *(out.parent / name for name in ("base.vmdk", "top.vmdk"))) == 5
    assert states(events(capsys)) == {"base.vmdk": "failed", "top.vmdk": "made"}
    assert before.items() <= {path: path.read_bytes() for path in out.parent.rglob("*.vmdk")}.items()
    arguments = ["-O", "vmdk", "--directory", out.parent, "--recursive", "--force", "--jobs", jobs, "--output", "json"]
    assert run(*arguments, out.parent) == 1
    assert set(states(events(capsys)).values()) == {"failed"}
    assert before.items() <= {path: path.read_bytes() for path in out.parent.rglob("*.vmdk")}.items()


@pytest.mark.parametrize("named", ["in/out", "link"])
def test_what_an_earlier_run_has_made_is_no_source(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, named: str
) -> None:
    out = tmp_path / "in" / "out"
    out.mkdir(parents=True)
    (tmp_path / "link").symlink_to(out)
    make_disk(tmp_path / "in" / "disk.raw", MIB)
    (tmp_path / "in" / "other").mkdir()
    make_disk(tmp_path / "in" / "other" / "disk.raw", MIB)
    for _ in range(2):
        assert run("-O", "raw", "--recursive", "--force", "--directory", tmp_path / named, tmp_path / "in") == 0
        assert "out: is no source, because the targets go there" in caplog.text
        assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == ["disk.raw", "other/disk.raw"]


@pytest.mark.parametrize("flags", [["-q"], []])
def test_errors_tell_disks_of_one_name_apart(tmp_path: Path, capsys: Capture, flags: list[str]) -> None:
    for name in ("one", "two"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "disk.qcow2").write_bytes(b"QFI\xfb" + bytes(100))
    arguments = ["-O", "raw", "--recursive", "--directory", tmp_path / "out", tmp_path / "in"]
    assert run(*flags, *arguments) == 1
    errors = capsys.readouterr().err
    for name in ("one", "two"):
        assert f"vmconv: {tmp_path}/in/{name}/disk.qcow2: " in errors
    assert "disk.qcow2: disk.qcow2" not in errors


WRONG = {
    "no format": (["--directory", "out"], "-O"),
    "no directory": (["--skip-existing", "-O", "qcow2"], "--directory"),
    "no jobs": (["--directory", "out", "-O", "qcow2", "--jobs", "0"], "--jobs"),
    "a layer": (["--directory", "out", "-O", "qcow2", "-B", "base"], "-B"),
    "a snapshot": (["--directory", "out", "-O", "qcow2", "-l", "one"], "--snapshot"),
    "two rules": (["--directory", "out", "-O", "qcow2", "--skip-existing", "--if-needed"], "--if-needed"),
    "in place": (["--directory", "out", "-O", "qcow2", "--skip-existing", "--in-place"], "--in-place"),
    "in place, if needed": (["--if-needed", "--in-place"], "--in-place"),
}


@pytest.mark.parametrize("case", WRONG)
def test_contradictions_are_refused(
    case: str, disks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    given, text = WRONG[case]
    (tmp_path / "target.qcow2").touch()
    monkeypatch.chdir(tmp_path)
    assert run(*given, "disk0.raw", "target.qcow2") == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("how", [["--if-needed"], ["--if-needed", "--directory"]])
def test_a_conversion_that_is_done_is_not_done_again(
    how: list[str], disks: list[Path], tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    target = out / "disk0.qcow2"
    names = [*how, out, disks[0]] if "--directory" in how else [*how, disks[0], target]
    assert run("-O", "qcow2", *names) == 0
    before = stamp_of(target.stat())
    assert run("-O", "qcow2", *names) == 0
    assert stamp_of(target.stat()) == before
    assert "already" in capsys.readouterr().out or "--directory" in how
    # Other options, or another disk, make another image.
    assert run("-O", "qcow2", "-o", "cluster_size=4096", *names) == 4
    assert "another cluster_size" in capsys.readouterr().err
    with disks[0].open("r+b") as file:
        file.seek(5000)
        file.write(b"changed")
    assert run("-O", "qcow2", *names) == 4
    assert "differs from the source at 5000" in capsys.readouterr().err
    assert stamp_of(target.stat()) == before
    assert run("-O", "qcow2", "--force", *names) == 0
    assert stamp_of(target.stat()) != before and vmconv.compare(disks[0], target)


def test_what_a_target_may_be_instead(disks: list[Path], tmp_path: Path, qemu_img: QemuImg, capsys: Capture) -> None:
    disk, target = disks[0], tmp_path / "target"

    def refused(text: str) -> None:
        assert run("--if-needed", "-O", "qcow2", disk, target) == 4
        assert text in capsys.readouterr().err
        target.unlink()

    qemu_img("convert", "-O", "vmdk", disk, target)
    refused("cannot be read as qcow2: target: header at 0x0: no qcow2 signature")
    qemu_img("create", "-f", "qcow2", "-b", disk, "-F", "raw", target)
    refused("on the backing file")
    qemu_img("convert", "-O", "qcow2", disk, target)
    qemu_img("resize", target, "2M")
    refused("has 2097152 bytes instead of 1048576")


def test_an_existing_target_has_its_own_exit_code(disks: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "target.vmdk"
    assert [run(disks[0], target), run(disks[0], target), run(disks[0], tmp_path / "missing" / "t.vmdk")] == [0, 4, 1]


def test_a_process_that_dies_is_the_failure_of_one_disk(
    disks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    real = pipeline.run

    def dies(request: Any, **how: Any) -> Any:
        if request.source == str(disks[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(request, **how)

    monkeypatch.setattr(batch, "run", dies)
    assert run("-O", "qcow2", "--directory", tmp_path / "out", "--jobs", 2, "--output", "json", *disks) == 5
    printed = capsys.readouterr()
    found = [json.loads(line) for line in printed.out.splitlines()]
    assert states(found) == {disk.name: "failed" if disk == disks[1] else "made" for disk in disks}
    assert "disk1.raw: its process was ended by SIGKILL" in printed.err


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_signal_ends_those_that_run_and_begins_no_other(disks: list[Path], tmp_path: Path, jobs: int) -> None:
    out, ready = tmp_path / "out", tmp_path / "ready"
    ready.mkdir()
    # Each conversion but the first waits for the signal, after its plan.
    program = (
        "import os, sys, time\n"
        "from vmconv.cli.main import main\n"
        "from vmconv.conversion import batch\n"
        "real = batch.run\n"
        "def slow(request, **how):\n"
        "    name = os.path.basename(request.source)\n"
        "    if name != 'disk0.raw':\n"
        f"        open(os.path.join({str(ready)!r}, name), 'w').close()\n"
        "        time.sleep(60)\n"
        "    return real(request, **how)\n"
        "batch.run = slow\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", program, "convert", "-O", "qcow2", "--directory", str(out), "--jobs", str(jobs)]
    with subprocess.Popen([*command, *map(str, disks)], stdout=subprocess.PIPE, text=True) as process:
        until(lambda: len(list(ready.iterdir())) == jobs)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"5 images: 1 made, {jobs} stopped, {4 - jobs} not begun" in printed
    assert [path.name for path in out.iterdir()] == ["disk0.qcow2"]


def until(holds: Callable[[], bool]) -> None:
    for _ in range(3000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("did not happen within 30 s")
