"""`-r RATE`, and arguments of `qemu-img convert` that scripts give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.disks import MIB, make_disk
from vmconv.backends.files import FileOutput
from vmconv.cli.main import main
from vmconv.conversion.rate import limited
from vmconv.errors import UsageError
from vmconv.model.sources import File

SIZE = 12 * MIB


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def test_waiting_makes_up_for_the_bytes_and_nothing_else() -> None:
    clock, seen = Clock(), []
    moved = limited(lambda done, to_do: seen.append((done, to_do)), 1000, clock.time, clock.sleep)
    moved(0, 5000)
    assert clock.now == 100
    moved(3000, 5000)
    assert clock.now == 103
    # Storage was slower than the rate: there is nothing to wait for, and nothing is made up later.
    clock.now = 200
    moved(4000, 5000)
    assert clock.now == 201
    moved(5000, 5000)
    assert clock.now == 202
    # The next output counts from 0.
    moved(500, 500)
    assert clock.now == 202.5
    assert seen == [(0, 5000), (3000, 5000), (4000, 5000), (5000, 5000), (500, 500)]


@pytest.mark.parametrize("way", ["convert", "fanout"])
def test_a_conversion_takes_the_time_of_its_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    clock = Clock()
    monkeypatch.setattr("vmconv.conversion.rate.limited.__defaults__", (clock.time, clock.sleep))
    source = make_disk(tmp_path / "source.raw", SIZE)
    plans: list[vmconv.Plan] = []
    given: dict[str, Any] = {"backend": "copy", "rate": MIB, "announce": plans.append}
    if way == "convert":
        vmconv.convert(source, tmp_path / "target.qcow2", **given)
    else:
        vmconv.fanout(source, ["qcow2", "vdi"], directory=tmp_path, **given)
    totals = plans[0].totals
    assert clock.now - 100 == pytest.approx((totals.copied + totals.written) / MIB)


@pytest.mark.parametrize("rate", [0, -1])
def test_a_rate_that_never_ends_is_refused(tmp_path: Path, rate: int) -> None:
    source = make_disk(tmp_path / "source.raw", SIZE)
    with pytest.raises(UsageError, match="copies nothing"):
        vmconv.convert(source, tmp_path / "target.raw", rate=rate)
    assert not (tmp_path / "target.raw").exists()


@pytest.mark.parametrize("cache", ["none", "writethrough", "directsync", "writeback", "unsafe"])
def test_cache_modes_of_qemu_img_are_durable_but_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    durable: list[bool] = []
    real = FileOutput.finish

    def noted(output: FileOutput) -> File:
        durable.append(output.durable)
        return real(output)

    monkeypatch.setattr(FileOutput, "finish", noted)
    source = make_disk(tmp_path / "source.raw", SIZE)
    ignored = ["-T", cache, "-m", "16", "-W"]
    assert main(["convert", "-q", "-t", cache, *ignored, str(source), str(tmp_path / "target.qcow2")]) == 0
    assert durable == [cache != "unsafe"]


def test_the_plan_takes_the_same_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_disk(tmp_path / "source.raw", SIZE)
    assert main(["plan", "-r", "10M", "-W", "-m", "8", "-T", "none", str(source), str(tmp_path / "x.qcow2")]) == 0
