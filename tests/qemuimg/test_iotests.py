"""A sample of QEMU's own tests, with the front end as qemu-img. `iotests.py` runs all of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qemuimg import iotests
from qemuimg.accepted import ACCEPTED, BY_QEMU, LEFT_OUT, TESTS
from support.mounts import Mounts
from support.requirements import missing

PROGRAM = str(Path(sys.executable).with_name("vmconv-qemu-img"))

SAMPLE = {
    "parallels": ("011",),
    "qcow2": ("004", "009", "021"),
    "qed": ("004", "111"),
    "raw": ("106",),
    "vdi": ("084",),
    "vhdx": ("009",),
    "vmdk": ("010",),
    "vpc": ("002",),
}
"""Of each format, tests that take seconds."""


@pytest.fixture(scope="module")
def tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """QEMU's tests."""
    try:
        return iotests.unpacked(tmp_path_factory.mktemp("qemu"))
    except (OSError, StopIteration, subprocess.CalledProcessError) as exc:
        missing("oracle", f"apt gives no source package of QEMU: {exc}")
        raise


@pytest.mark.parametrize("format_name", SAMPLE)
def test_qemus_own_tests_see_no_difference(format_name: str, tests: Path, mounts: Mounts) -> None:
    room = mounts.get("xfs") / "iotests"
    counts = iotests.compare(tests, room, PROGRAM, format_name, SAMPLE[format_name])
    shutil.rmtree(room)
    assert counts["run"] == counts["same"] + counts["accepted"] > 0
    assert counts["commands by vmconv"] > 0


def test_a_difference_is_noticed(tests: Path, mounts: Mounts, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text('#!/bin/sh\nqemu-img "$@" | sed "s/Formatting/Forgetting/"\n')
    wrong.chmod(0o755)
    room = mounts.get("xfs") / "iotests"
    counts = iotests.compare(tests, room, str(wrong), "qcow2", ["004"])
    shutil.rmtree(room)
    assert (counts["run"], counts["different"]) == (1, 1)


def test_each_exception_is_of_a_test_that_is_run_and_has_a_reason() -> None:
    assert {name for name, _ in LEFT_OUT} | set(BY_QEMU) | {name for one in ACCEPTED for name in one.tests} <= set(
        TESTS
    )
    assert all(one.reason for one in ACCEPTED)
    assert all(LEFT_OUT.values())
