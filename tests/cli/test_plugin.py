"""`vmconv plugin new`; tests/package installs its result and runs the kit."""

from __future__ import annotations

import ast
import stat
import tomllib
from pathlib import Path

import pytest

from vmconv.cli.main import main


def test_a_skeleton_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plugin", "new", "acme"]) == 0
    new = tmp_path / "vmconv-acme"
    assert [path.name for path in tmp_path.iterdir()] == ["vmconv-acme"]
    project = tomllib.loads((new / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vmconv"] == {"acme": "vmconv_acme"}
    assert (new / "tests/test_acme.py").is_file()
    assert b"ACMEDIS".decode() in (new / "src/vmconv_acme/image.py").read_text()
    for path in new.rglob("*.py"):
        ast.parse(path.read_text())
        assert "toy" not in path.read_text().lower()
    assert stat.S_IMODE(new.stat().st_mode) & 0o700 == 0o700


@pytest.mark.parametrize("name", ["", "a", "Acme", "a-b", "../a", "1a", "a" * 17, "qcow2", "vpc", "vhdx", "e01"])
def test_a_name_that_no_format_can_have_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plugin", "new", name]) == 2
    assert capsys.readouterr().err.startswith(f"vmconv: {name!r} is ")
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "here").mkdir()
    assert main(["plugin", "new", "acme", "--directory", str(tmp_path / "here")]) == 2
    assert "exists" in capsys.readouterr().err
    assert list(tmp_path.rglob("*")) == [tmp_path / "here"]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_name: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vmconv.cli.plugin.files", fails)
    assert main(["plugin", "new", "acme", "--directory", str(tmp_path / "new")]) == 1
    assert list(tmp_path.iterdir()) == []
