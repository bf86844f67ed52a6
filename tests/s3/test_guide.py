"""The commands of docs/guide/object-storage.md on S3, in their order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import vmconv
from support.buckets import Bucket
from vmconv.cli.main import main

PAGE = Path(__file__).parents[2] / "docs/guide/object-storage.md"


def test_the_commands_do_what_the_page_says(
    bucket: Bucket, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vmconv.convert(str(disk), "server.qcow2")
    bucket.put("server.raw", disk.read_bytes())
    (block,) = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text().partition("\n## S3\n")[2], re.MULTILINE | re.DOTALL)
    lines = [line for line in block.splitlines() if line.startswith("vmconv ")]
    assert len(lines) == 2
    for line in lines:
        _, *arguments = shlex.split(line.replace("//images", f"//{bucket.name}"))
        assert main(arguments) == 0, line
    for key in ("server.qcow2", "server.vmdk"):
        assert vmconv.compare(str(disk), bucket.url(key))
