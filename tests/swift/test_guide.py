"""The commands of docs/guide/object-storage.md on Swift, in their order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import vmconv
from support.containers import Container, let_time_pass
from support.swift import CLOUD
from vmconv.cli.main import main

PAGE = Path(__file__).parents[2] / "docs/guide/object-storage.md"


def test_the_commands_do_what_the_page_says(
    container: Container, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = container.swift.clouds.read_text().replace(f"  {CLOUD}:", "  cloud:")
    (tmp_path / "clouds.yaml").write_text(text)
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(tmp_path / "clouds.yaml"))
    monkeypatch.chdir(tmp_path)
    vmconv.convert(str(disk), "server.qcow2")
    page = PAGE.read_text().partition("\n## S3\n")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("vmconv ")]
    assert len(lines) == 6
    for line in lines:
        _, *arguments = shlex.split(line.replace("/images", f"/{container.name}"))
        assert main(arguments) == 0, line
        if "vhdx swift" in line:
            assert vmconv.compare(str(disk), f"swift://cloud/{container.name}/server.vhdx")
    assert container.names() == ["server.qcow2", "server.vhdx"]
    let_time_pass()
    assert main(["unpublish", "--unused", "--older-than=0s", f"swift://cloud/{container.name}"]) == 0
    assert vmconv.compare(str(disk), f"swift://cloud/{container.name}/server.vhdx")
