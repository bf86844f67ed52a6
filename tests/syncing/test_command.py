"""`vmconv sync`: what it prints, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.disks import MIB, make_disk
from vmconv.cli.main import main


@pytest.fixture
def disk(xfs_dir: Path) -> Path:
    return make_disk(xfs_dir / "disk.raw", 20 * MIB)


def write(disk: Path, offset: int, data: bytes) -> None:
    with disk.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_it_says_what_changed_and_on_what_evidence(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = disk.with_name("target.qcow2")
    arguments = ["sync", str(disk), str(target)]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"{target}: is new, 20 MiB; shared ")
    write(disk, MIB, bytes(range(256)) * 256)
    assert main([*arguments, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert planned.startswith(f"{disk} -> {target}: 64 KiB changed in 1 range\n  evidence: physical addresses")
    assert "  copied        0 B  (0 bytes)" in planned
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"{target}: 64 KiB changed in 1 range; shared ")
    assert main([*arguments, "--dry-run"]) == 0
    assert f"{target}: up to date\n" in capsys.readouterr().out
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"{target}: up to date in ")


def test_json_is_one_document_per_line(disk: Path, ext4_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = ext4_dir / "target.qcow2"
    arguments = ["sync", "--output", "json", str(disk), str(target)]
    assert main(arguments) == 0
    write(disk, 0, b"changed")
    capsys.readouterr()
    assert main(arguments) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    by_name = {event["event"]: event for event in events}
    assert [event["event"] for event in events if event["event"] in ("changes", "plan", "result")] == [
        "changes",
        "plan",
        "result",
    ]
    assert by_name["compare"]["done"] == by_name["compare"]["total"] == by_name["result"]["compared"]
    assert by_name["changes"]["changed"] == by_name["result"]["changed"] == 65536
    assert by_name["result"]["backend"] == "in-place"
    assert main([*arguments, "--dry-run"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["plan"], found["changed"]) == (None, 0)


def test_quiet_prints_nothing(disk: Path, ext4_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = ext4_dir / "target.qcow2"
    assert main(["sync", "-q", str(disk), str(target)]) == 0
    write(disk, 0, b"changed")
    assert main(["sync", "-q", str(disk), str(target)]) == 0
    assert capsys.readouterr() == ("", "")


def test_how_much_is_read_is_said_first(disk: Path, ext4_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = ext4_dir / "target.qcow2"
    assert main(["sync", "-q", str(disk), str(target)]) == 0
    write(disk, 0, b"changed")
    assert main(["sync", str(disk), str(target)]) == 0
    assert capsys.readouterr().err.startswith("reading ")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--since", "{}/disk.raw", "{}/disk.raw", "{}/none.qcow2"], 2),
        (["-o", "cluster_size=4K", "{}/disk.raw", "{}/target.qcow2"], 2),
        (["{}/disk.raw", "{}/disk.raw"], 1),
        (["--since", "{}/other.raw", "{}/disk.raw", "{}/target.qcow2"], 0),
        (["--compare", "--zero-copy", "require", "{}/disk.raw", "{}/target.qcow2"], 0),
    ],
    ids=str,
)
def test_exit_codes(disk: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int) -> None:
    assert main(["sync", "-q", str(disk), str(disk.with_name("target.qcow2"))]) == 0
    given = [word.replace("{}", str(disk.parent)) for word in arguments]
    if "other.raw" in arguments[1]:
        given[1] = str(disk)
    assert main(["sync", *given]) == code
    assert bool(capsys.readouterr().err) == bool(code)


def test_copying_that_is_not_allowed_has_its_own_code(disk: Path, ext4_dir: Path) -> None:
    target = ext4_dir / "target.qcow2"
    assert main(["sync", "-q", str(disk), str(target)]) == 0
    write(disk, 0, b"changed")
    assert main(["sync", "-q", "--zero-copy", "require", str(disk), str(target)]) == 3
