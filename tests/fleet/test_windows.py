"""When jobs begin, and how fast they copy: windows, limits of datastores, bandwidth."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.asking import NOW, Replica
from vmconv.errors import UsageError, VmconvError
from vmconv_fleet.catalogue.conversion import ConversionPolicy
from vmconv_fleet.catalogue.windows import Waiting, WindowError, next_open_ms, parsed, waiting_of
from vmconv_fleet.cli import values
from vmconv_fleet.jobs.job import Job
from vmconv_fleet.jobs.schedule import Schedule
from vmconv_fleet.jobs.throttle import Bandwidth, Throttle

MINUTE = 60_000
DAY = 24 * 60 * MINUTE


def ms(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp() * 1000)


@pytest.mark.parametrize(
    ("windows", "now", "then"),
    [
        ([], "2026-11-30T12:00Z", "2026-11-30T12:00Z"),
        (["22:00-05:00"], "2026-11-30T12:00Z", "2026-11-30T22:00Z"),
        (["22:00-05:00"], "2026-11-30T04:59:59Z", "2026-11-30T04:59:59Z"),
        (["22:00-05:00"], "2026-11-30T05:00Z", "2026-11-30T22:00Z"),
        (["22:00-05:00 Europe/Berlin"], "2026-11-30T12:00Z", "2026-11-30T21:00Z"),
        (["22:00-05:00", "03:00-23:00"], "2026-11-30T23:30Z", "2026-12-01T03:00Z"),
        (["22:00-05:00", "06:00-07:00"], "2026-11-30T23:30Z", None),
        # Clocks are put forward at 01:00 UTC: 02:30 does not come. They are put back: 02:30 comes twice.
        (["02:30-05:00 Europe/Berlin"], "2026-03-28T23:00Z", "2026-03-29T01:00Z"),
        (["02:30-02:45 Europe/Berlin"], "2026-03-28T23:00Z", "2026-03-30T00:30Z"),
        (["02:30-02:45 Europe/Berlin"], "2026-10-25T00:50Z", "2026-10-25T01:30Z"),
        (["02:59-03:30 Europe/Berlin"], "2026-10-25T01:00Z", "2026-10-25T01:59Z"),
        (["22:00-02:30 Europe/Berlin"], "2026-10-25T00:40Z", "2026-10-25T01:00Z"),
    ],
)
def test_the_next_opening(windows: list[str], now: str, then: str | None) -> None:
    assert next_open_ms(windows, ms(now)) == (then and ms(then))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.times(), st.times(), st.sampled_from(["UTC", "Asia/Kolkata", "America/Lima"])), max_size=2),
    st.integers(ms("2026-01-01T00:00Z"), ms("2027-01-01T00:00Z")),
)
def test_the_next_opening_is_the_first_minute_in_all_windows(windows: list[Any], now: int) -> None:
    whole = [(f"{start:%H:%M}", f"{end:%H:%M}", zone) for start, end, zone in windows]
    whole = [one for one in whole if one[0] != one[1]]

    def is_open(moment: int) -> bool:
        def fits(start: str, end: str, zone: str) -> bool:
            at = f"{datetime.fromtimestamp(moment / 1000, ZoneInfo(zone)):%H:%M}"
            return start <= at < end if start < end else not end <= at < start

        return all(fits(*one) for one in whole)

    moments = [now, *range(now - now % MINUTE + MINUTE, now + DAY + 2 * MINUTE, MINUTE)]
    first = next((moment for moment in moments if is_open(moment)), None)
    assert next_open_ms([f"{start}-{end} {zone}" for start, end, zone in whole], now) == first


@pytest.mark.parametrize(
    "text", ["", "22-5", "24:00-05:00", "22:00-22:00", "22:00-05:60", "22:00-05:00 ", "22:00-05:00 No/Where",
             "22:00-05:00 ../../etc/passwd", "22:00-05:00 Europe", "22:00-05:00\n"],
)  # fmt: skip
def test_invalid_windows_are_refused(text: str) -> None:
    with pytest.raises(WindowError):
        parsed(text)


@pytest.mark.parametrize(
    "more", [{"at_ms": "soon"}, {"at_ms": 1 << 60}, {"between": 7}, {"between": "22:00-05:00 No/Where"}]
)
def test_unsound_jobs_of_other_nodes_wait_for_nothing(more: dict[str, Any]) -> None:
    policy = {"between": 5 if "at_ms" in more else None}
    assert waiting_of({"state": "queued", **more}, policy, NOW) == Waiting()


def test_a_job_waits_for_the_later_of_its_time_and_its_window() -> None:
    now, job = ms("2026-11-30T12:00Z"), {"state": "queued", "between": "22:00-05:00"}
    assert waiting_of(job, {}, now) == Waiting(ms("2026-11-30T22:00Z"))
    assert waiting_of(job | {"at_ms": ms("2026-12-01T08:00Z")}, {}, now) == Waiting(ms("2026-12-01T22:00Z"))
    assert waiting_of(job | {"at_ms": ms("2026-12-01T03:00Z")}, {}, now) == Waiting(ms("2026-12-01T03:00Z"))
    assert waiting_of({"state": "queued"}, {"between": "22:00-05:00"}, now) == Waiting(ms("2026-11-30T22:00Z"))
    assert waiting_of(job | {"dry_run": True}, {"between": "22:00-05:00"}, now) == Waiting()
    assert waiting_of(job, {"between": "05:00-22:00"}, now) == Waiting(None, is_forever=True)
    assert waiting_of(job | {"state": "running"}, {}, now) == Waiting()


def test_an_owner_refuses_windows_that_never_open() -> None:
    replica = Replica()
    replica.ask("policy-set", between="22:00-05:00 Europe/Berlin")
    with pytest.raises(VmconvError, match="do not overlap"):
        replica.ask("convert", disk="d1", format="qcow2", between="06:00-12:00 Europe/Berlin")
    with pytest.raises(VmconvError, match="No/Where: is not a time zone"):
        replica.ask("convert", disk="d1", format="qcow2", between="06:00-12:00 No/Where")
    with pytest.raises(VmconvError, match="No/Where: is not a time zone"):
        replica.ask("policy-set", between="06:00-12:00 No/Where")
    with pytest.raises(VmconvError, match="between"):
        replica.ask("convert", disk="d1", format="qcow2", between="at night")
    replica.ask("convert", disk="d1", format="qcow2", between="04:00-12:00 Europe/Berlin")


# The runner's schedule


def schedule(**policy: Any) -> Schedule:
    return Schedule(ConversionPolicy(**policy), ms("2026-11-30T12:00Z"))


def test_a_schedule_says_when_the_next_job_is_due() -> None:
    one = schedule(between="13:00-14:00")
    assert not one.is_due(Job("j1", {"at_ms": ms("2026-11-30T18:00Z")}))
    assert one.next_ms == ms("2026-11-30T18:00Z")
    assert not one.is_due(Job("j2", {}))
    assert one.next_ms == ms("2026-11-30T13:00Z")
    assert one.is_due(Job("j3", {"dry_run": True}))
    assert schedule(between="11:00-14:00").is_due(Job("j4", {"between": "12:00-12:01"}))
    assert not schedule(between="11:00-14:00").is_due(Job("j5", {"between": "12:01-12:02"}))


def test_a_datastore_has_as_many_jobs_as_it_may() -> None:
    one = schedule(datastore_parallel={"a": 1, "b": 2})
    running = [{"a"}, {"b", "c"}]

    def job(datastore: str, target: str | None = None) -> Job:
        return Job("j", {"datastore": datastore, "target_datastore": target})

    assert one.is_full(job("a"), running)
    assert one.is_full(job("c", "a"), running)
    assert not one.is_full(job("b"), running)
    assert one.is_full(job("b"), [*running, {"b"}])
    assert not one.is_full(job("c"), running)


# Bandwidth


class Clock:
    """A clock that a sleeper puts forward."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_bytes_take_their_time(tmp_path: Path) -> None:
    clock = Clock()
    one = Throttle([Bandwidth(str(tmp_path / "a"), 100)], clock, clock.sleep)
    one.moved(0)
    assert clock.now == 1000
    one.moved(300)
    assert clock.now == 1003
    one.moved(400)
    assert clock.now == 1004
    clock.now = 1050
    one.moved(500)
    assert clock.now == 1051
    # The next disk of a machine.
    one.moved(200)
    assert clock.now == 1053


def test_jobs_share_the_bandwidth_of_a_datastore(tmp_path: Path) -> None:
    clock = Clock()
    one, other = (Throttle([Bandwidth(str(tmp_path / "a"), 100)], clock, lambda _seconds: None) for _ in range(2))
    slept: list[float] = []
    third = Throttle([Bandwidth(str(tmp_path / "a"), 100)], clock, slept.append)
    one.moved(100)
    other.moved(300)
    third.moved(100)
    assert slept == [5.0]


def test_the_slower_datastore_counts(tmp_path: Path) -> None:
    clock = Clock()
    limits = [Bandwidth(str(tmp_path / "a"), 100), Bandwidth(str(tmp_path / "b"), 50)]
    Throttle(limits, clock, clock.sleep).moved(100)
    assert clock.now == 1002


# The command line


@pytest.mark.parametrize(
    ("zone", "text", "said"),
    [
        ("Europe/Berlin", "22:00-05:00", "22:00-05:00 Europe/Berlin"),
        (":/usr/share/zoneinfo/Asia/Kolkata", "22:00-05:00", "22:00-05:00 Asia/Kolkata"),
        ("Europe/Berlin", "22:00-05:00 UTC", "22:00-05:00 UTC"),
    ],
)
def test_a_window_has_the_zone_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, zone: str, text: str, said: str
) -> None:
    monkeypatch.setenv("TZ", zone)
    assert values.window(text) == said


def test_values_that_are_not_valid_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="is not a window"):
        values.window("22")
    for text in ("a", "a=b", "=1", ""):
        with pytest.raises(UsageError):
            values.numbers(int)(text)
    assert values.numbers(int)("a=1,b=2") == {"a": 1, "b": 2}
    assert values.none_or(values.numbers(int))("none") == "none"
