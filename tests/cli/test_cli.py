"""The command line: what it prints to people and machines, what it returns, and what it does not import."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import vmconv
import vmconv.cli
import vmconv.cli.machine
from support.disks import MIB, QemuImg, make_disk
from vmconv.cli.commands import COMMANDS
from vmconv.cli.machine import VERBS
from vmconv.cli.main import main
from vmconv.cli.verbs import Verb

Capture = pytest.CaptureFixture[str]


def test_convert_ends_with_what_was_shared_copied_and_written(reflink_dir: Path, capsys: Capture) -> None:
    raw = make_disk(reflink_dir / "disk.raw", 4 * MIB)
    assert main(["convert", str(raw), str(reflink_dir / "disk.qcow2")]) == 0
    output = capsys.readouterr()
    assert "shared" in output.out.splitlines()[-1]
    assert "copied 0 B" in output.out.splitlines()[-1]
    assert output.err == ""


def test_convert_announces_copies_with_their_reasons(ext4_dir: Path, capsys: Capture) -> None:
    raw = make_disk(ext4_dir / "disk.raw", 4 * MIB)
    assert main(["convert", str(raw), str(ext4_dir / "disk.qcow2")]) == 0
    announced = capsys.readouterr().err
    assert announced.startswith("copying ")
    assert "because ext4 at" in announced


def test_quiet_prints_nothing(ext4_dir: Path, capsys: Capture) -> None:
    raw = make_disk(ext4_dir / "disk.raw", MIB)
    assert main(["convert", "-q", str(raw), str(ext4_dir / "disk.qcow2")]) == 0
    assert capsys.readouterr() == ("", "")


def test_progress_is_a_bar_that_ends_at_all_of_it(ext4_dir: Path, capsys: Capture) -> None:
    raw = make_disk(ext4_dir / "disk.raw", 4 * MIB)
    assert main(["convert", "-p", str(raw), str(ext4_dir / "disk.qcow2")]) == 0
    assert "100.00%" in capsys.readouterr().err.split("\r")[-1]


def test_json_events_are_the_plan_progress_and_the_result(ext4_dir: Path, capsys: Capture) -> None:
    raw = make_disk(ext4_dir / "disk.raw", 4 * MIB)
    assert main(["convert", "--output", "json", str(raw), str(ext4_dir / "disk.qcow2")]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [events[0]["event"], events[-1]["event"]] == ["plan", "result"]
    progress = [event for event in events if event["event"] == "progress"]
    assert progress[0]["done"] == 0
    assert progress[-1]["done"] == progress[-1]["total"] == events[0]["copied"] + events[0]["written"]
    assert events[-1]["totals"]["copied"] == events[0]["copied"] == sum(c["bytes"] for c in events[0]["copies"])


def test_an_error_is_an_event_too(tmp_path: Path, capsys: Capture) -> None:
    assert main(["convert", "--output", "json", str(tmp_path / "none.raw"), str(tmp_path / "disk.qcow2")]) == 1
    output = capsys.readouterr()
    event = json.loads(output.out)
    assert (event["event"], event["exit-code"]) == ("error", 1)
    assert event["message"] in output.err


def test_plan_gives_the_reason_for_each_copied_byte(ext4_dir: Path, capsys: Capture) -> None:
    raw = make_disk(ext4_dir / "disk.raw", 4 * MIB)
    assert main(["plan", str(raw), str(ext4_dir / "disk.qcow2")]) == 0
    assert "copied because ext4 at" in capsys.readouterr().out
    assert main(["plan", "--output", "json", str(raw), str(ext4_dir / "disk.qcow2")]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["copied"] == sum(copy["bytes"] for copy in plan["copies"]) > 0
    assert not (ext4_dir / "disk.qcow2").exists()


def test_zero_copy_required_and_impossible_returns_3_and_touches_nothing(ext4_dir: Path, capsys: Capture) -> None:
    raw = make_disk(ext4_dir / "disk.raw", MIB)
    assert main(["convert", "--zero-copy=require", str(raw), str(ext4_dir / "disk.qcow2")]) == 3
    assert "would have to be copied" in capsys.readouterr().err
    assert [path.name for path in ext4_dir.iterdir()] == ["disk.raw"]


def test_formats_are_named_as_in_qemu_img(reflink_dir: Path, qemu_img: QemuImg) -> None:
    disk = make_disk(reflink_dir / "disk", MIB)
    arguments = ["-f", "raw", "-O", "qcow2", "-o", "cluster_size=128K,compat=v3", "-o", "lazy_refcounts=on"]
    assert main(["convert", *arguments, str(disk), str(reflink_dir / "image")]) == 0
    facts = json.loads(qemu_img("info", "-f", "qcow2", "--output=json", reflink_dir / "image").stdout)
    assert facts["cluster-size"] == 131072
    assert facts["format-specific"]["data"]["lazy-refcounts"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-O", "qcow3"], "format 'qcow3' is not installed"),
        (["-O", "ova"], "format 'ova' is not installed"),
        (["-O", "qcow2", "-o", "cluster=1M"], "no option 'cluster'"),
        (["-O", "qcow2", "-o", "cluster_size=3M"], "a cluster is a power of two"),
        (["-O", "qcow2", "-o", "extended_l2=maybe"], "extended_l2=maybe"),
        (["-O", "raw", "-o", "size=1"], "raw has no option 'size'"),
        (["-O", "raw", "--backend", "magic"], "backend 'magic' is not installed"),
        (["-O", "raw", "-F", "raw"], "a backing format needs a backing file"),
    ],
)
def test_a_request_that_makes_no_sense_returns_2(
    tmp_path: Path, capsys: Capture, arguments: list[str], words: str
) -> None:
    raw = make_disk(tmp_path / "disk.raw", MIB)
    assert main(["convert", *arguments, str(raw), str(tmp_path / "target")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def test_a_target_without_a_format_s_suffix_needs_a_format(tmp_path: Path, capsys: Capture) -> None:
    raw = make_disk(tmp_path / "disk.raw", MIB)
    assert main(["convert", str(raw), str(tmp_path / "target")]) == 2
    assert "name the format with -O" in capsys.readouterr().err


def test_backends_are_tested_on_the_directory(xfs_dir: Path, ext4_dir: Path, capsys: Capture) -> None:
    found = {}
    for directory in (xfs_dir, ext4_dir):
        assert main(["backends", "--output", "json", str(directory)]) == 0
        found[directory] = {one["name"]: one for one in json.loads(capsys.readouterr().out)["backends"]}
    assert (found[xfs_dir]["reflink"]["shares"], found[xfs_dir]["reflink"]["unit"]) == (True, 4096)
    assert not found[ext4_dir]["reflink"]["usable"]
    assert "cannot share" in found[ext4_dir]["reflink"]["reason"]
    assert found[ext4_dir]["copy"]["usable"]


def test_formats_lists_options(capsys: Capture) -> None:
    assert main(["formats"]) == 0
    output = capsys.readouterr().out
    assert "cluster_size=65536" in output


def demo_rows(output: str) -> dict[str, list[list[str]]]:
    """Returns the rows of the demo's table by way: conversion, copied, written, seconds, same bytes, blocks."""
    rows: dict[str, list[list[str]]] = {}
    for cells in (re.split(r"  +", line.strip()) for line in output.splitlines() if "  " in line and " -> " in line):
        rows.setdefault(cells[0], []).append(cells[1:])
    return rows


def test_demo_shares_and_proves_it(reflink_dir: Path, capsys: Capture) -> None:
    assert main(["demo", "--size", "16M", "--directory", str(reflink_dir)]) == 0
    rows = demo_rows(capsys.readouterr().out)["shared"]
    others = sorted(name for name, one in vmconv.installed().formats.items() if one.can_write and name != "raw")
    assert [row[0] for row in rows] == [pair for name in others for pair in (f"raw -> {name}", f"{name} -> raw")]
    assert all([row[1], row[4], row[5]] == ["0 B", "yes", "all 8 MiB"] for row in rows)
    assert list(reflink_dir.iterdir()) == []


def test_demo_shows_every_other_way_without_reflink(ext4_dir: Path, capsys: Capture) -> None:
    assert main(["demo", "--size", "8M", "--directory", str(ext4_dir)]) == 0
    output = capsys.readouterr().out
    rows = demo_rows(output)
    assert {"in place", "undo", "reference", "view", "qemu-img"} <= set(rows)
    assert "shared" not in rows
    assert all(row[4] == "yes" for ways in rows.values() for row in ways)
    assert ["qcow2 -> raw", "all 4 MiB"] in [[row[0], row[5]] for row in rows["undo"]]
    assert ["raw -> qcow2", "64 KiB", "3.94 MiB of 4 MiB"] in [[row[0], row[1], row[5]] for row in rows["in place"]]
    assert all(row[1] == "0 B" for way in ("reference", "view") for row in rows[way])
    assert "mkfs.xfs" in output
    assert list(ext4_dir.iterdir()) == []


def test_demo_keeps_its_files(tmp_path: Path, capsys: Capture) -> None:
    assert main(["demo", "--size", "8M", "--directory", str(tmp_path), "--keep"]) == 0
    kept = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("All files are kept in "))
    assert kept.parent == tmp_path
    assert (kept / "disk.raw").stat().st_size == 8 * MIB
    assert main(["check", str(kept / "reference.vmdk")]) == 0


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("convet a.raw b.qcow2", "convert"),
        ("convert --in-plce a.raw b.qcow2", "--in-place"),
        ("convert --zero-copy=requier a.raw b.qcow2", "require"),
        ("convert -O qcwo2 a.raw b", "qcow2"),
        ("convert -o clustersize=64k a.raw b.qcow2", "cluster_size"),
        ("machine cnovert a.vmx b.xml", "convert"),
    ],
)
def test_a_wrong_word_is_answered_with_the_right_one(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, arguments: str, meant: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_disk(tmp_path / "a.raw", MIB)
    with pytest.raises(SystemExit) as stopped:
        sys.exit(main(arguments.split()))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert f"did you mean {meant}?" in said
    assert len(said.splitlines()) == 2


def test_another_option_is_not_suggested_for_its_dashes(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["undo", "--jobs", "2", "a.qcow2"])
    assert "did you mean" not in capsys.readouterr().err


def test_the_version_is_that_of_the_distribution(capsys: Capture) -> None:
    from importlib.metadata import version

    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"vmconv {version('vmconv')}\n"


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        (["--help"], {"numpy", "pydantic", "construct", "zstandard", "json"}),
        (["formats"], {"numpy", "pydantic", "construct", "zstandard", "json"}),
        (["convert", "disk.raw", "disk.qcow2"], {"pydantic", "zstandard", "numpy.ma", "concurrent.futures", "json"}),
        (["convert", "-o", "subformat=reference", "disk.raw", "by.vmdk"], {"pydantic", "zstandard", "json"}),
        (
            ["convert", "-o", "cluster_size=2M,lazy_refcounts=on,refcount_bits=32", "disk.raw", "disk.qcow2"],
            {"pydantic", "zstandard", "json"},
        ),
        (["info", "disk.raw"], {"construct", "zstandard", "concurrent.futures"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_imports_no_more_than_it_needs(xfs_dir: Path, arguments: list[str], unwanted: set[str]) -> None:
    """Start-up is most of the time of a conversion; what is imported decides it, and can be told without a clock."""
    make_disk(xfs_dir / "disk.raw", MIB)
    assert not unwanted & _imported(xfs_dir, arguments)


def _imported(directory: Path, arguments: list[str]) -> set[str]:
    """Returns the modules that a command has imported when it ends."""
    code = (
        "import sys\nfrom vmconv.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('\\n' + ' '.join(sys.modules))"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=directory)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "arguments", [["formats"], ["convert", "disk.raw", "disk.qcow2"]], ids=lambda arguments: arguments[0]
)
def test_a_command_imports_no_other_verb(xfs_dir: Path, arguments: list[str]) -> None:
    make_disk(xfs_dir / "disk.raw", MIB)
    verbs = {f"vmconv.cli.{name}" for name, _ in COMMANDS}
    assert verbs & _imported(xfs_dir, arguments) == {f"vmconv.cli.{arguments[0]}"}


@pytest.mark.parametrize(("package", "table"), [(vmconv.cli, COMMANDS), (vmconv.cli.machine, VERBS)])
def test_the_table_of_commands_names_every_module_with_a_verb(
    package: ModuleType, table: tuple[tuple[str, str], ...]
) -> None:
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    modules = {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}
    verbs = sorted(name for name, module in modules.items() if isinstance(getattr(module, "VERB", None), Verb))
    assert verbs == sorted(name for name, _ in table)


def test_the_program_postpones_what_only_other_uses_of_its_libraries_need(xfs_dir: Path) -> None:
    make_disk(xfs_dir / "disk.raw", MIB)
    command = [sys.executable, "-X", "importtime", "-m", "vmconv", "convert", "disk.raw", "disk.qcow2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=xfs_dir)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"numpy", "construct"} <= imported
    assert (
        not {"pdb", "hashlib", "pickle", "gettext", "numpy._core._add_newdocs", "numpy._typing._array_like"} & imported
    )


def test_a_postponed_module_is_imported_when_it_is_used() -> None:
    code = """if True:
        import sys
        from vmconv.__main__ import _Postponed
        sys.modules["colorsys"] = stand_in = _Postponed("colorsys")
        import colorsys
        assert colorsys is stand_in
        assert colorsys.rgb_to_hsv(0, 0, 1)[2] == 1
        import colorsys
        assert colorsys is not stand_in
        assert not hasattr(stand_in, "no_such_thing")
    """
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["formats"], 0), (["no-such-command"], 2), (["info", "no-such-file"], 1)]
)
def test_the_program_ends_with_the_exit_code_of_the_command(arguments: list[str], code: int) -> None:
    done = subprocess.run([sys.executable, "-m", "vmconv", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stdout if code == 0 else done.stderr.startswith(("vmconv: argument COMMAND", "vmconv: no-such-file"))


def test_the_output_pipe_may_close(tmp_path: Path) -> None:
    command = f"{sys.executable} -m vmconv formats | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("FORMAT")
    assert done.stderr == ""


def test_the_command_line_uses_the_api(reflink_dir: Path) -> None:
    raw, image = make_disk(reflink_dir / "disk.raw", 4 * MIB), reflink_dir / "disk.qcow2"
    result = vmconv.convert(str(raw), str(image))
    assert isinstance(result, vmconv.Result)
    assert vmconv.compare(str(raw), str(image))
    assert vmconv.prove(str(raw), str(image))
    assert vmconv.info(str(image))["format"] == "qcow2"
    assert sum(row.length for row in vmconv.map_disk(str(image))) == 4 * MIB
    report = vmconv.check(str(image))
    assert report is not None
    assert report.corruptions == ()
    assert set(vmconv.installed().formats) >= {"raw", "qcow2"}


TRAP = "a\x1b]0;title\x07b\nc: shared 99 TiB"


@pytest.mark.parametrize("way", ["reflink", "copy"])
def test_names_of_files_do_not_reach_the_terminal(
    request: pytest.FixtureRequest, capfdbinary: pytest.CaptureFixture[bytes], way: str
) -> None:
    directory: Path = request.getfixturevalue("xfs_dir" if way == "reflink" else "ext4_dir")
    raw = make_disk(directory / f"{TRAP}.raw", MIB)
    made, synced, named = (str(directory / f"{TRAP}{end}") for end in (".qcow2", ".vdi", " named.qcow2"))
    for command in (
        ["plan", raw, made],
        ["convert", raw, made],
        ["info", made],
        ["map", "-f", "raw", raw],
        ["check", made],
        ["compare", raw, made],
        ["prove", raw, made],
        ["sync", "--dry-run", raw, synced],
        ["sync", raw, synced],
        ["sync", raw, synced],
        ["convert", "--in-place", "--keep-undo", raw, named],
        ["undo", named],
        ["convert", raw, made],
    ):
        main([*map(str, command)])
        said = b"".join(capfdbinary.readouterr())
        assert not {*said} & {0x07, 0x1B}, command
        assert b"\nc: shared" not in said, command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert", "DISK", ""], "argument target: '' is empty"),
        (["convert", "-n", "DISK", ""], "argument target: '' is empty"),
        (["plan", "-O", "qcow2", "DISK", ""], "argument target: '' is empty"),
        (["sync", "DISK", ""], "argument target: '' is empty"),
        (["info", ""], "'': cannot be opened: No such file"),
        (["convert", "--parent", "", "LAYER", "new.raw"], "'': cannot be opened: No such file"),
    ],
)
def test_an_empty_name_is_told(tmp_path: Path, arguments: list[str], said: str, capsys: Capture) -> None:
    """A variable of a shell that is not set."""
    disk, layer = make_disk(tmp_path / "disk.raw", MIB), tmp_path / "layer.qcow2"
    base = make_disk(tmp_path / "base.raw", MIB)
    vmconv.create(layer, backing_file=base.name)
    base.unlink()
    names = {"DISK": str(disk), "LAYER": str(layer), "new.raw": str(tmp_path / "new.raw")}
    assert main([names.get(each, each) for each in arguments]) in (1, 2)
    assert said in capsys.readouterr().err
