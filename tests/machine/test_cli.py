"""The verbs of `vmconv machine` as people and scripts see them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.toy_machines import machine
from vmconv.cli.main import main

pytestmark = pytest.mark.usefixtures("toys")


def test_a_machine_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = machine(tmp_path, nics=[{"mac": "00:50:56:00:00:01"}], description="two\nlines")
    assert main(["machine", "info", str(config)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "machine: web (toy machines)"
    assert "  cpu: count 2" in said
    assert "  memory: size 1 GiB" in said
    assert "  description: two / lines" in said
    assert "  nics[0]: mac 00:50:56:00:00:01" in said
    assert main(["machine", "info", "--output", "json", str(config)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["cpu"]) == ("toy", {"count": 2})


def test_a_plan_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = machine(tmp_path / "old", nics=[{"model": "e1000"}], sound="hda")
    assert main(["machine", "plan", "-O", "toy", str(config), str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    assert "changed: nics[0].model e1000 -> virtio: toys have virtio only" in said
    assert "not carried over: sound hda: toy has no place for it" in said
    assert "disk data.qcow2 (qcow2) -> web-disk2.raw (raw): shared" in said
    assert main(["machine", "plan", "-O", "toy", "--output", "json", str(config), str(tmp_path / "new")]) == 0
    assert json.loads(capsys.readouterr().out)["losses"][0]["path"] == "sound"


def test_a_plan_fails_where_copies_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = machine(tmp_path / "old")
    given = ["machine", "plan", "-O", "toy", "--backend", "copy", "--zero-copy", "require"]
    assert main([*given, str(config), str(tmp_path / "new")]) == 3
    captured = capsys.readouterr()
    assert "disk system.raw (raw) -> web-disk1.raw (raw): shared" in captured.out
    assert "bytes would have to be copied because" in captured.err


def test_a_conversion_reports_losses_before_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = machine(tmp_path / "old", sound="hda")
    assert main(["machine", "convert", "-O", "toy", str(config), str(tmp_path / "new")]) == 0
    captured = capsys.readouterr()
    assert "not carried over: sound hda" in captured.err
    assert captured.out.startswith(f"{tmp_path}/new/web.toy: 3 disks, ")
    assert main(["machine", "convert", "-q", "--force", "-O", "toy", str(config), str(tmp_path / "new")]) == 0
    assert capsys.readouterr() == ("", "")


def test_events_are_printed_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = machine(tmp_path / "old", sound="hda")
    given = ["machine", "convert", "--output", "json", "-O", "toy", str(config), str(tmp_path / "new")]
    assert main(given) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events if event["event"] != "progress"] == ["plan", "result"]
    assert events[-1]["plan"]["totals"] == events[0]["totals"]
    assert main(given) == 4
    (event,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (event["event"], event["exit-code"]) == ("error", 4)


def test_formats_are_listed_with_those_that_could_be_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["machine", "formats"]) == 0
    assert any(line.split()[:4] == ["toy", "yes", "yes", ".toy"] for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("name", ["web.vmx", "web.ovf", "web.vbox", "web.xml"])
def test_a_configuration_given_as_a_disk_names_the_other_command(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("something")
    assert main(["convert", str(tmp_path / name), str(tmp_path / "web.qcow2")]) == 1
    assert "vmconv machine convert" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["info", "plan", "convert", "check"])
@pytest.mark.parametrize(
    ("problem", "hint"),
    [
        (ModuleNotFoundError("No module named 'yaml'"), "pip install vmconv-toy installs what it needs"),
        (KeyError("x"), "this is a defect of vmconv-toy"),
    ],
    ids=["missing", "defect"],
)
def test_a_broken_machine_plugin_is_named_in_one_line(
    problem: Exception,
    hint: str,
    verb: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(*_: object) -> str:
        raise problem

    config = machine(tmp_path)
    # The toy format's reader calls it.
    monkeypatch.setattr("vmconv.machine.config_text", failing)
    target = [str(tmp_path / "new.toy")] if verb in ("plan", "convert") else []
    assert main(["machine", verb, str(config), *target]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"vmconv: vmconv-toy: failed with {type(problem).__name__}: {problem}"
    assert second.strip().removeprefix("hint: ").startswith(hint)


@pytest.mark.parametrize(
    "command", [["machine", "info"], ["machine", "check"], ["info"], ["check"], ["machine", "plan"]], ids="-".join
)
def test_an_error_is_no_json_document_where_the_answer_is_one(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = [str(tmp_path / "new.toy")] if "plan" in command else []
    assert main([*command, "--output", "json", str(tmp_path / "none.toy"), *target]) in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == "" and "none.toy" in captured.err


def test_an_error_is_an_event_where_events_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.toy").write_text("{}")
    assert main(["machine", "convert", "--output", "json", str(tmp_path / "a.toy"), str(tmp_path / "b.toy")]) == 1
    event = json.loads(capsys.readouterr().out)
    assert event["event"] == "error" and "a.toy" in event["message"]
